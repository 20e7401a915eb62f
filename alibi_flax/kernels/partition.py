"""How a computation is divided among devices: each computes its own sequences and heads.

XLA can divide neither a loop over blocks nor a Pallas kernel: by default it gathers everything
on every device. So the loops and kernels of `windowed` tell it which axes can be divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Arrays = dict[str, Any]  # arrays by name


def divided(
    function: Callable[[Arrays], tuple[Array, ...]],
    layouts: Mapping[str, str],
    results: tuple[str, ...],
    arrays: Mapping[str, Array | None],
) -> tuple[Array, ...]:
    """`function` of the arrays, by as many devices as their sharding says.

    Sequences and heads may be sharded over any axes of a mesh. Any other axis is gathered first; so
    are heads when their devices do not divide the heads of keys, unless there is only one of those.

    Args:
        function: computes any whole sequences and heads, given the heads of keys that they need.
        layouts: the names of each array's axes; "batch", "heads" and "kv_heads" may be sharded.
        results: the same of each result.
        arrays: include "query" and "key"; None values are not passed on.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:  # inside of a shard_map that has divided it
        return function({name: array for name, array in arrays.items() if array is not None})
    given = {name: array for name, array in arrays.items() if array is not None}
    query = tuple(given).index("query")
    axes = [layouts[name].split() for name in given]
    axes_of_results = [result.split() for result in results]
    sizes = {
        axis: size
        for name, array in given.items()
        for axis, size in zip(layouts[name].split(), array.shape, strict=True)
    }
    kv_heads, group = sizes["kv_heads"], sizes["heads"] // sizes["kv_heads"]

    def local(*operands: Array) -> tuple[Array, ...]:
        return function(dict(zip(given, operands, strict=True)))

    def specs(mesh: Any, shapes: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        batch, heads, *_ = (*shapes[query].sharding.spec, *[None] * 2)
        if kv_heads > 1 and kv_heads % _devices(mesh, heads):
            heads = None
        places = {"batch": batch, "heads": heads, "kv_heads": heads if kv_heads > 1 else None}

        def placed(names: list[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(places.get(name) for name in names)))

        return tuple(map(placed, axes)), tuple(map(placed, axes_of_results))

    def partition(mesh: Any, shapes: Any, _: Any) -> tuple[Any, ...]:
        operands, outcomes = specs(mesh, shapes)
        return mesh, local, outcomes, operands

    def inferred(mesh: Any, shapes: Any, _: Any) -> tuple[Any, ...]:
        return specs(mesh, shapes)[1]

    rule, whole = _sharding_rule(axes, axes_of_results, kv_heads, group)
    partitioned: Any = custom_partitioning(local)
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=inferred,
        sharding_rule=rule,
        need_replication_factors=whole,
    )
    # Under vmap the arrays have one more axis, and XLA decides how to divide them.
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[tuple[Array, ...], Any]:
        in_axes = [0 if each else None for each in is_mapped]
        found = jax.vmap(local, in_axes=in_axes, axis_size=size)(*operands)
        return found, (True,) * len(found)

    return mapped(*given.values())


def _sharding_rule(
    operands: list[list[str]], results: list[list[str]], kv_heads: int, group: int
) -> tuple[str, tuple[str, ...]]:
    """Shardy's sharding rule, and its undivided factors.

    Fewer heads of keys than of queries are a factor of their own: more devices than heads of keys
    would otherwise divide these over a part of a mesh's axis, which JAX cannot express.
    """
    factors = {"batch": "batch", "heads": "heads"}
    if group == 1:
        factors["kv_heads"] = "heads"
    elif kv_heads > 1:
        factors["kv_heads"] = "kv_heads"
    lines = [
        " ".join(factors.get(name, f"{name}{number}") for name in names)
        for number, names in enumerate([*operands, *results])
    ]
    left, right = ", ".join(lines[: len(operands)]), ", ".join(lines[len(operands) :])
    in_order = dict.fromkeys(re.findall(r"\w+", f"{left} {right}"))
    whole = tuple(name for name in in_order if name not in ("batch", "heads", "kv_heads"))
    return f"{left} -> {right}", whole


def _devices(mesh: Any, axes: Any) -> int:
    """The number of devices over which an axis of an array is divided."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def automatic_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if there is one whose axes XLA divides arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(mesh.axis_types) == {AxisType.Auto} else None


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """The axes of the mesh along which, inside of `jax.shard_map`, any of the arrays varies."""
    return frozenset().union(*(_varying_axes(x) for x in arrays if x is not None))


def varying(x: Array, axes: frozenset[str]) -> Array:
    """`x` as an array that varies along these axes, as the carry of a loop must from the start."""
    missing = tuple(sorted(axes - _varying_axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009, before JAX 0.8.2
    return pvary(x, missing)


def shape_of(x: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `x`, as those of an array that varies along these axes."""
    return jax.eval_shape(lambda: varying(jnp.zeros(x.shape, x.dtype), axes))


def _varying_axes(x: Array) -> frozenset[str]:
    kind: Any = jax.typeof(x)
    # Before JAX 0.10 the axes stood in the type itself.
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
