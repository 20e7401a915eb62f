"""Keys and values of the positions that a model has read (SPEC.md §10, §16).

A model called with a cache returns another cache, which also holds the new positions. Both have the
same shapes, so that one program serves every step; donate the old one to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Float, Int, Int32, Integer

from alibi_flax.dispatch import attention_within
from alibi_flax.kernels import decode
from alibi_flax.kernels.call import wide_dtype
from alibi_flax.kernels.certificate import bounding_norm, keys_needed
from alibi_flax.sharding import constrained, on_each_device
from alibi_spec import ALiBiConfig
from alibi_spec.cache import Ring, rings
from alibi_spec.checks import (
    OTHER_CACHE,
    USED_CACHE,
    check_cache,
    check_cache_dtype,
    check_capacity,
)

# Of one ring: [batch, ring_heads, size, head_dim]; rings differ in both.
_Heads = Float[Array, "batch _ _ head_dim"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("keys", "values", "largest", "is_proved", "visible", "length", "interpolated_len"),
    ),
    meta_fields=("config", "capacity", "rings", "is_new"),
)
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions that a model has read; created by `empty`.

    Attributes:
        config: of the model.
        capacity: the most positions that may be read; None is any number.
        rings: of each layer: which heads keep how many positions.
        keys, values: by layer and ring, as attention takes them, but heads first: a step reads them
            head by head. Position p is in slot p mod size.
        largest: by layer, the largest norm of a key that was ever read; None without rings.
        is_proved: whether every key that was needed was still there.
        visible: False for padding, and before the first position: of the last positions, the
            newest at the end.
        length: positions that were read, padding included: the next query stands there.
        interpolated_len: number of keys for interpolated slopes; None is `length`.
        is_new: it is known to the program that nothing was read yet.
    """

    config: ALiBiConfig
    capacity: int | None
    rings: tuple[tuple[Ring, ...], ...]
    keys: tuple[tuple[_Heads, ...], ...]
    values: tuple[tuple[_Heads, ...], ...]
    largest: tuple[Float[Array, "batch kv_heads"], ...] | None
    is_proved: Bool[Array, ""]
    visible: Bool[Array, "batch recent"]
    length: Int32[Array, ""]
    interpolated_len: Int32[Array, ""] | None = None
    is_new: bool = False

    @classmethod
    def empty(
        cls,
        config: ALiBiConfig,
        batch_size: int,
        capacity: int | None,
        *,
        windows: Int[Any, "layers heads"] | None = None,
        dtype: Any = jnp.float32,
    ) -> Self:
        """The cache of a model that has read nothing.

        Args:
            config: of the model: an `ALiBiLM`, or the `ALiBiTransformer` in it.
            capacity: the most positions that may be read, padding included; None, with windows
                that bound every head, is any number.
            windows: keep only about this many positions of each head: the result of
                `alibi_spec.bounds.model_windows`, -1 for all. Every call proves anew that the keys
                that are gone carry no more than half an ulp of attention mass.
            dtype: of the model's computation.

        Raises:
            ValueError: the configuration is an encoder's, or windows do not fit it.
        """
        check_cache(config, batch_size, batch_size)
        every = rings(config, windows, capacity)

        def memory(ring: Ring) -> _Heads:
            shape = (batch_size, len(ring.heads), ring.size, config.head_dim)
            return _on_devices(jnp.zeros(shape, dtype))

        keys, values = (tuple(tuple(map(memory, of_layer)) for of_layer in every) for _ in range(2))
        sizes = [ring.size for of_layer in every for ring in of_layer]
        largest = None
        if min(sizes) != capacity:
            wide = wide_dtype(keys[0][0])
            largest = tuple(jnp.zeros((batch_size, config.kv_heads), wide) for _ in every)
        visible = jnp.zeros((batch_size, max(sizes)), jnp.bool_)
        config, length = replace(config, vocab_size=None), jnp.int32(0)
        return cls(
            *(config, capacity, every, keys, values, largest, jnp.bool_(True), visible, length)
        )

    @property
    def slope_factor(self) -> float | Float[Array, ""]:
        """The factor on the slopes of the model."""
        limit = self.config.slope_interpolation
        if limit is None:
            return 1.0
        keys = self.length if self.interpolated_len is None else self.interpolated_len
        return limit / jnp.maximum(limit, keys).astype(float)  # JAX divides int32 in float32

    def grown(
        self,
        config: ALiBiConfig,
        shape: tuple[int, int],
        attention_mask: Integer[Array, "batch seq"] | Bool[Array, "batch seq"] | None,
    ) -> Self:
        """A cache that includes new positions, [batch, seq], whose keys and values `attend` writes.

        `finished` completes it.

        Raises:
            ValueError: it was donated, belongs to another model or batch, or is full (outside
                `jit`, where its length is known).
        """
        if not isinstance(self.length, Tracer) and self.length.is_deleted():
            raise ValueError(USED_CACHE)
        if config != self.config:
            raise ValueError(OTHER_CACHE)
        check_cache(config, self.visible.shape[0], shape[0])
        if self.capacity is not None:
            check_capacity(0, shape[1], self.capacity)
            if not isinstance(self.length, Tracer):
                check_capacity(int(self.length), shape[1], self.capacity)
        new = jnp.ones(shape, jnp.bool_) if attention_mask is None else attention_mask
        visible = jnp.concatenate([self.visible, new.astype(jnp.bool_)], axis=1)
        return replace(self, visible=visible, length=self.length + shape[1])

    def attend(
        self, layer: int, inputs: Any, implementation: str
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Self]:
        """Store the keys and values of the newest positions, and attend to all.

        Args:
            inputs: of `alibi_flax.attention`, for the newest positions.

        Raises:
            ValueError: a dtype other than the cache's.
        """
        cache, of_layer = self._proved(layer, inputs), self.rings[layer]
        check_cache_dtype(str(self.keys[layer][0].dtype), str(inputs["key"].dtype))
        parts, order, keys, values = [], [], [], []
        for number, ring in enumerate(of_layer):
            readers = self._readers(ring)
            some = inputs if len(of_layer) == 1 else _of_heads(inputs, ring.heads, readers)
            attended, (key, value) = self._attend(layer, number, some, implementation)
            parts.append(attended)
            keys.append(_on_devices(key))
            values.append(_on_devices(value))
            order += readers
        cache = replace(
            cache,
            keys=_with(self.keys, layer, tuple(keys)),
            values=_with(self.values, layer, tuple(values)),
        )
        if len(parts) == 1:
            return parts[0], cache
        place = sorted(range(len(order)), key=order.__getitem__)
        return jnp.concatenate(parts, axis=2)[:, :, jnp.array(place)], cache

    def _attend(
        self, layer: int, number: int, inputs: Any, implementation: str
    ) -> tuple[Float[Array, "batch seq heads head_dim"], tuple[_Heads, _Heads]]:
        """Attention of the heads that read one ring, and its new keys and values."""
        size, new_len = self.rings[layer][number].size, inputs["key"].shape[1]
        old = (self.keys[layer][number], self.values[layer][number])
        new = (inputs["key"].swapaxes(1, 2), inputs["value"].swapaxes(1, 2))
        first = (self.length - new_len) % size
        if new_len == 1 or size == self.capacity:
            where = (jnp.int32(0), jnp.int32(0), first, jnp.int32(0))
            kept = _both(lambda x, y: jax.lax.dynamic_update_slice(x, y, where), old, new)
            if new_len == 1:
                return self._step(inputs, *kept), kept
            # Positions after the newest are not used yet: no query sees them.
            seen, query_start = kept, self.length - new_len
            visible = jnp.roll(self.visible, self.length, axis=1)[:, :size]
        else:
            # The first of these queries see keys that the last ones overwrite.
            seen = _both(
                lambda x, y: jnp.concatenate([jnp.roll(x, -first, axis=2), y], axis=2), old, new
            )
            kept = _both(
                lambda x, _: jnp.roll(x[:, :, -size:], self.length % size, axis=2), seen, new
            )
            query_start, visible = jnp.int32(size), self.visible[:, -size - new_len :]
        if self.is_new:  # the queries see no keys but the new ones
            query_start, visible = jnp.int32(0), self.visible[:, -new_len:]
        else:
            key, value = _both(lambda x, _: x.swapaxes(1, 2), seen, new)
            inputs = inputs | {"key": key, "value": value}
        options: Any = {"implementation": implementation, "query_start": query_start}
        inputs = inputs | {"attention_mask": visible}
        return attention_within(None, **inputs, **options), kept

    def _step(
        self, inputs: Any, key: _Heads, value: _Heads
    ) -> Float[Array, "batch 1 heads head_dim"]:
        # In a loop of steps XLA would move the whole cache into another layout before, and back.
        key, value = _in_order(key), _in_order(value)
        size = key.shape[2]
        age = (self.length - 1 - jnp.arange(size)) % size
        visible = self.visible[:, self.visible.shape[1] - 1 - age]
        options: Any = {name: inputs[name] for name in ("query", "slopes", "scale", "distance")}
        return decode.attention(**options, key=key, value=value, age=age, visible=visible)

    def _proved(self, layer: int, inputs: Any) -> Self:
        """With the norms of the newest keys, and whether all that their queries need is there."""
        if self.largest is None:
            return self
        query, key = (inputs[name].swapaxes(1, 2) for name in ("query", "key"))
        is_seen = self.visible[:, None, -key.shape[2] :]
        newest = jnp.where(is_seen, bounding_norm(key.astype(wide_dtype(key))), 0).max(axis=-1)
        largest = jnp.maximum(self.largest[layer], newest)
        needed = keys_needed(query, key, largest, inputs["slopes"], inputs["scale"])
        # Nothing is promised for queries that are padding.
        of_heads = jnp.where(is_seen, needed, 1).max(axis=(0, 2), initial=1)  # of any batch
        is_proved = self.is_proved
        for ring in self.rings[layer]:
            most = of_heads[jnp.array(self._readers(ring))].max()
            is_proved &= ~ring.has_lost(self.length, key.shape[2]) | (most <= ring.size)
        return replace(self, largest=_with(self.largest, layer, largest), is_proved=is_proved)

    def _readers(self, ring: Ring) -> list[int]:
        """The heads of queries that read a ring."""
        group = self.config.num_heads // self.config.kv_heads
        return [head * group + each for head in ring.heads for each in range(group)]

    def finished(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[Float[Array, "batch seq embed"], Self]:
        """The results of the last layer, and the cache for the next call.

        NaN if more was read than fits, or a key was needed that is gone: a compiled program cannot
        raise an error.
        """
        is_right = self.is_proved
        if self.capacity is not None:
            is_right &= self.length <= self.capacity
        recent = max(ring.size for of_layer in self.rings for ring in of_layer)
        visible = self.visible[:, -recent:]
        return jnp.where(is_right, x, jnp.nan), replace(self, visible=visible, is_new=False)


_AXES = ("batch", "kv_heads", "slots", "head_dim")


def _on_devices(x: _Heads) -> _Heads:
    return constrained(x, *_AXES)


def _in_order(x: _Heads) -> _Heads:
    """The array in memory as its axes are in order: on each device, as XLA would gather it."""
    return on_each_device(lambda x: with_layout_constraint(x, Layout((0, 1, 2, 3))), x, *_AXES)


def _both(f: Any, xs: tuple[Array, Array], ys: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same of keys and values."""
    return f(xs[0], ys[0]), f(xs[1], ys[1])


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _of_heads(inputs: Any, heads: tuple[int, ...], readers: list[int]) -> Any:
    """The inputs of attention of some heads of keys and the heads of queries that read them."""
    heads_, readers_ = jnp.array(heads), jnp.array(readers)
    return inputs | {
        "query": inputs["query"][:, :, readers_],
        "key": inputs["key"][:, :, heads_],
        "value": inputs["value"][:, :, heads_],
        "slopes": inputs["slopes"][readers_],
    }
