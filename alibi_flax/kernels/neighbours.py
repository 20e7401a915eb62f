"""Positions divided over devices: each attends with its queries to the keys of its neighbours, too.

A device is sent the keys of as many devices before it as the windows of its heads reach (SPEC.md
§19), of each head its own number; without windows those of all, and for an encoder also of those
behind it. Every call proves anew that a key which was not sent does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from alibi_flax.kernels.call import wide_dtype
from alibi_flax.kernels.certificate import bounding_norm, keys_needed
from alibi_spec.sharding import MeshAxes, neighbours_needed

Arrays = dict[str, Any]  # arrays, or None, by the names of their layouts


def attend(
    attend_here: Callable[[int, Arrays], Float[Array, "batch own heads value_dim"]],
    arrays: Arrays,
    axes: MeshAxes,
    layouts: Mapping[str, str],
    *,
    causal: bool,
    scale: float,
    windows: Sequence[int] | None,
) -> Float[Array, "batch own heads value_dim"]:
    """The attended values of one device's queries; NaN where a key is needed that was not sent.

    Args:
        attend_here: attention of arrays, whose first query stands at a position among the keys.
        arrays: the device's own part, with an attention mask.
        axes: of the mesh, that divide the positions.
        layouts: the names of each array's axes.
        causal, scale: of the call.
        windows: for each head, how many keys its queries need; -1 is all; None for all heads.
    """
    devices, own = jax.lax.axis_size(axes), arrays["query"].shape[2]
    if not causal:
        hops = range(devices - 1, -devices, -1)
        return attend_here((devices - 1) * own, _joined(arrays, axes, layouts, hops))
    heads, kv_heads = (arrays[name].shape[1] for name in ("query", "key"))
    group = heads // kv_heads
    needed = neighbours_needed(windows, heads, own, devices)
    of_keys = [max(needed[head * group : (head + 1) * group]) for head in range(kv_heads)]
    parts, order = [], []
    for count in sorted(set(of_keys)):
        keys = [head for head in range(kv_heads) if of_keys[head] == count]
        queries = [head * group + each for head in keys for each in range(group)]
        some = _of_heads(arrays, layouts, keys, queries)
        found = attend_here(count * own, _joined(some, axes, layouts, range(count, -1, -1)))
        if count < devices - 1:
            found = jnp.where(_is_proved(some, axes, scale, count * own), found, jnp.nan)
        parts.append(found)
        order += queries
    if len(parts) == 1:
        return parts[0]
    place = sorted(range(len(order)), key=order.__getitem__)
    return jnp.concatenate(parts, axis=2)[:, :, jnp.array(place)]


def _of_heads(
    arrays: Arrays, layouts: Mapping[str, str], keys: list[int], queries: list[int]
) -> Arrays:
    if len(queries) == arrays["query"].shape[1]:
        return arrays
    chosen = {"heads": jnp.array(queries), "kv_heads": jnp.array(keys)}

    def part(name: str, x: Array | None) -> Array | None:
        for place, axis in enumerate(layouts[name].split()):
            if x is not None and axis in chosen:
                x = jnp.take(x, chosen[axis], axis=place)
        return x

    return {name: part(name, x) for name, x in arrays.items()}


def _joined(
    arrays: Arrays, axes: MeshAxes, layouts: Mapping[str, str], hops: Sequence[int]
) -> Arrays:
    """With the keys of some devices in order, by how many places each is before this one.

    Where there is no device the keys are zeros, and hidden.
    """

    def joined(x: Array, place: int) -> Array:
        return jnp.concatenate([_from_device(x, axes, hop) for hop in hops], axis=place)

    places = {name: layouts[name].split() for name in arrays}
    return {
        name: x if x is None or "key_len" not in axes_ else joined(x, axes_.index("key_len"))
        for (name, x), axes_ in zip(arrays.items(), places.values(), strict=True)
    }


def _from_device(x: Array, axes: MeshAxes, hop: int) -> Array:
    """What the device `hop` places before this one holds; zeros where there is none."""
    if hop == 0:
        return x
    devices = jax.lax.axis_size(axes)
    pairs = [(i, i + hop) for i in range(devices) if 0 <= i + hop < devices]
    return jax.lax.ppermute(x, axes, pairs)


def _is_proved(arrays: Arrays, axes: MeshAxes, scale: float, before: int) -> Bool[Array, ""]:
    """Whether no query of this device needs a key that is there, and not among its own.

    Those are the keys of this device, and of `before` positions before them.
    """
    query, key = (jax.lax.stop_gradient(arrays[name]) for name in ("query", "key"))
    is_seen = arrays["attention_mask"].astype(jnp.bool_)[:, None]
    norms = jnp.where(is_seen, bounding_norm(key.astype(wide_dtype(key))), 0)
    largest = jax.lax.pmax(norms.max(axis=-1), axes)
    slopes = jax.lax.stop_gradient(arrays["slopes"])
    needed = keys_needed(query, key, largest, slopes, scale)
    own = query.shape[2]
    here = jnp.arange(own) + 1 + before
    # Nothing is promised for queries that are padding.
    is_enough = jnp.where(is_seen, needed <= here, True).all()
    return is_enough | (jax.lax.axis_index(axes) * own <= before)
