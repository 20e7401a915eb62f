"""Parameters and activations on a mesh of devices, by the rules of `alibi_spec.sharding`.

New params are plain arrays: linen's boxes, which hold axes, cannot be bridged to NNX without a
mesh. So the axes are a separate tree, which also serves loaded params.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alibi_flax.kernels.partition import automatic_mesh
from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.parameters import stacked_table
from alibi_spec.sharding import (
    AXES,
    Rules,
    activation_axes,
    batch_axes,
    check_mesh_axes,
    parameter_axes,
)


def device_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh of all devices with these sizes, of all processes if there are several.

    Args:
        sizes: by axis, of "data", "fsdp", "sequence" and "tensor".

    Raises:
        ValueError: an unknown axis, or another number of devices.
    """
    check_mesh_axes(sizes)
    written = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    needed, there = math.prod(sizes.values()), jax.device_count()
    if needed != there:
        raise ValueError(
            f"a mesh of {written} is of {needed}, and the number of JAX's devices is {there} "
            f"({jax.default_backend()}); give sizes whose product is {there}"
        )
    names = tuple(axis for axis in AXES if axis in sizes)
    shape = tuple(sizes[axis] for axis in names)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def partition_specs(config: ALiBiConfig, *, scan_layers: bool = False) -> dict[str, Any]:
    """The logical axes of every parameter, in a tree like that of the params.

    `flax.linen.logical_to_mesh_sharding` makes shardings of them, by a mesh and rules of linen's.
    The names are those of `alibi_spec.parameters.axis_sizes`: "embed", "heads", "mlp", "vocab", …

    Args:
        scan_layers: of a model with stacked layers, whose first axis is "layers".
    """
    return parameter_tree(config, lambda row: PartitionSpec(*row.logical_axes), scan_layers)


def shardings(
    config: ALiBiConfig, mesh: Mesh, rules: Rules | None = None, *, scan_layers: bool = False
) -> dict[str, Any]:
    """The sharding of every parameter on a mesh, in a tree like that of the params (SPEC.md §19).

    Args:
        mesh: with axes among "data", "fsdp", "tensor" and "sequence", or others that `rules` name.
        rules: in place of some of `alibi_spec.sharding.RULES`.
        scan_layers: of a model with stacked layers.

    Raises:
        ValueError: a parameter cannot be divided like this, or axes of the mesh are explicit.
    """
    return parameter_tree(config, lambda row: parameter_sharding(row, mesh, rules), scan_layers)


def parameter_sharding(row: Parameter, mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """The sharding of one parameter; arguments and errors as for `shardings`."""
    _require_automatic(mesh)
    return NamedSharding(mesh, _spec(*parameter_axes(row, mesh.shape, rules)))


def batch_sharding(shape: tuple[int, ...], mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """The sharding of tokens and masks, [batch, seq].

    Raises:
        ValueError: their devices do not divide the batch.
    """
    return NamedSharding(mesh, _spec(*batch_axes(shape, mesh.shape, rules)))


def constrained(x: Array, *axes: str) -> Array:
    """The array, divided by the standard rules over the mesh of `jax.set_mesh`, if there is one.

    Args:
        axes: logical names of the array's axes, as for `activation_axes`.
    """
    mesh = automatic_mesh()
    if mesh is None or not (isinstance(x, Tracer) or _is_on_a_mesh(x)):
        return x  # outside of jit it stays where it is
    divided = activation_axes(dict(zip(axes, x.shape, strict=True)), mesh.shape)
    return jax.lax.with_sharding_constraint(x, _spec(*divided.values()))


def _is_on_a_mesh(x: Array | np.ndarray) -> bool:
    return isinstance(x, Array) and isinstance(x.sharding, NamedSharding)


def on_each_device(function: Callable[[Array], Array], x: Array, *axes: str) -> Array:
    """`function`, which keeps the shape, of each device's part of what `constrained` divides."""
    mesh = automatic_mesh()
    if mesh is None:
        return function(x)
    spec = _spec(*activation_axes(dict(zip(axes, x.shape, strict=True)), mesh.shape).values())
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))


def _require_automatic(mesh: Mesh) -> None:
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"the mesh has axes of the types {mesh.axis_types}, on which linen's modules cannot "
            "compute; make it with axis_types=(AxisType.Auto,) * "
            f"{len(mesh.axis_names)}, of jax.sharding"
        )


def parameter_tree(
    config: ALiBiConfig, value: Callable[[Parameter], Any], scan_layers: bool = False
) -> dict[str, Any]:
    """A value for each parameter, in a tree like that of the params, or of stacked ones."""
    table = stacked_table(config) if scan_layers else parameter_table(config)
    return unflatten_dict({row.flax_path: value(row) for row in table})
