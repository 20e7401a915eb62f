"""Which axes of a mesh of devices divide which axes of the arrays (SPEC.md §19).

Axes of arrays are logical: "batch" and "seq" of activations, and those of the parameter table.
Axes of a mesh have names and sizes. The rules say which divide which, for every framework.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from alibi_spec.config import ALiBiConfig
from alibi_spec.parameters import Parameter, parameter_table

# Of a mesh, from the outermost: devices that are next to each other share what they tell most.
AXES = ("data", "fsdp", "sequence", "tensor")
MeshAxes = tuple[str, ...]  # that divide one axis of an array together; none keep it whole
Rules = Mapping[str, str | Sequence[str] | None]

# What the axes of a mesh mean by their names; a mesh may lack any of them. The weights of linear
# maps and embeddings all have "embed", so that each device of "fsdp" keeps a part of every one.
RULES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "seq": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
}


def check_mesh_axes(axes: Iterable[str]) -> None:
    """Raise ValueError for an axis of a mesh that is none of `AXES`."""
    for axis in axes:
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r} of a mesh; expected some of {', '.join(AXES)}")


def resolved_rules(mesh: Mapping[str, int], rules: Rules | None = None) -> dict[str, MeshAxes]:
    """The standard rules on the axes that a mesh has, with some in place of them.

    Args:
        mesh: size of every axis, by name.
        rules: by logical axis: the axis of the mesh that divides it, several, or None for none.

    Raises:
        ValueError: an axis that no array or no mesh of this kind has.
    """
    found = {axis: tuple(n for n in names if n in mesh) for axis, names in RULES.items()}
    for axis, given in (rules or {}).items():
        if axis not in RULES:
            raise ValueError(
                f"a rule is for {axis!r}, which is no axis that can be divided; expected one of "
                f"{', '.join(RULES)}"
            )
        names = () if given is None else (given,) if isinstance(given, str) else tuple(given)
        for name in names:
            if name not in mesh:
                raise ValueError(
                    f"{axis} is to be divided over {name!r}, and the mesh has "
                    f"{', '.join(mesh) or 'no axes'}; name one of these, or None to keep it whole"
                )
        found[axis] = names
    return found


def parameter_axes(
    row: Parameter, mesh: Mapping[str, int], rules: Rules | None = None
) -> tuple[MeshAxes, ...]:
    """The axes of a mesh that divide each axis of a parameter in the Flax layout.

    Vectors along "embed" (norms, and biases of maps into the model) are whole everywhere.

    Args:
        row: of `parameter_table`.
        mesh: as for `resolved_rules`.
        rules: as for `resolved_rules`.

    Raises:
        ValueError: an axis that no array or mesh has; one that its devices do not divide; or one
            axis of the mesh that divides two of the parameter's.
    """
    known = resolved_rules(mesh, rules)
    is_whole = [axis for axis in row.logical_axes if axis != "layers"] == ["embed"]
    axes = tuple(() if is_whole else known.get(axis, ()) for axis in row.logical_axes)
    _require_once(row, axes)
    for axis, names in zip(row.logical_axes, axes, strict=True):
        hint = f"keep it whole with rules={{{axis!r}: None}}"
        _require_divided(f"{axis} of {row.name}", row.axis_sizes[axis], names, mesh, hint)
    return axes


def torch_axes(
    row: Parameter, mesh: Mapping[str, int], rules: Rules | None = None
) -> tuple[MeshAxes, ...]:
    """The same for each axis of the torch layout, in which "heads" and "head_dim" are one.

    Raises:
        ValueError: as for `parameter_axes`.
    """
    by_axis = dict(zip(row.logical_axes, parameter_axes(row, mesh, rules), strict=True))
    return tuple(by_axis[group[0]] for group in row.torch_axes)


def check_sharding(
    config: ALiBiConfig, mesh: Mapping[str, int], rules: Rules | None = None
) -> None:
    """Raise ValueError unless every parameter of the model can be divided, as above."""
    for row in parameter_table(config):
        parameter_axes(row, mesh, rules)


def batch_axes(
    shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules | None = None
) -> tuple[MeshAxes, MeshAxes]:
    """The axes of a mesh that divide the first two axes of a batch: "batch" and "seq".

    Raises:
        ValueError: their devices do not divide the batch.
    """
    known = resolved_rules(mesh, rules)
    axes = known["batch"], known["seq"]
    for axis, size, names in zip(("batch", "seq"), shape, axes, strict=False):
        _require_divided(f"{axis} of a batch", size, names, mesh, f"another {axis}")
    return axes


def activation_axes(sizes: Mapping[str, int], mesh: Mapping[str, int]) -> dict[str, MeshAxes]:
    """The axes of a mesh that divide each axis of an activation, by the standard rules.

    What its devices do not divide stays whole, as the batch of one sequence must.

    Args:
        sizes: of the axes, by logical name; those without a rule stay whole.
        mesh: size of every axis, by name.
    """
    known, used = resolved_rules(mesh), set()
    axes: dict[str, MeshAxes] = {}
    for axis, size in sizes.items():
        names = tuple(name for name in known.get(axis, ()) if name not in used)
        axes[axis] = names if size % devices_of(names, mesh) == 0 else ()
        used.update(axes[axis])
    return axes


def neighbours_needed(
    windows: Sequence[int] | None, heads: int, own: int, devices: int
) -> list[int]:
    """For each head, how many devices before one hold keys that its queries can need.

    Args:
        windows: of each head of the model, its own key included; -1 is all; None for all heads.
        heads: that a device has. If these are not all, each must be able to be any of them.
        own: positions that a device has.
        devices: among which the positions are divided.
    """
    every = [-1] * heads if windows is None else list(windows)
    needed = [
        devices - 1 if window < 0 else min(devices - 1, -(-(window - 1) // own)) for window in every
    ]
    return needed if len(needed) == heads else [max(needed)] * heads


def devices_of(names: Iterable[str], mesh: Mapping[str, int]) -> int:
    """The number of devices along some axes of a mesh."""
    return math.prod(mesh[name] for name in names)


def _require_once(row: Parameter, axes: tuple[MeshAxes, ...]) -> None:
    users: dict[str, str] = {}
    for axis, names in zip(row.logical_axes, axes, strict=True):
        for name in names:
            if name in users:
                raise ValueError(
                    f"{name} divides both {users[name]} and {axis} of {row.name}; an axis of the "
                    "mesh can divide one of them: give the other one None"
                )
            users[name] = axis


def _require_divided(
    what: str, size: int, names: MeshAxes, mesh: Mapping[str, int], hint: str
) -> None:
    count = devices_of(names, mesh)
    if size % count == 0:
        return
    sizes = " x ".join(f"{name}={mesh[name]}" for name in names)
    relation = "is fewer than" if size < count else "is not a multiple of"
    raise ValueError(
        f"{what}, {size}, {relation} the {count} devices of {sizes}; take a mesh that divides it, "
        f"or {hint}"
    )
