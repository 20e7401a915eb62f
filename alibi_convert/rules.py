"""Reversible layout rules, and the checks that a set of tensors is exactly what a table expects.

A rule is data: einops patterns and names. Nothing here knows a file format or a framework.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.parameters import pattern_shape

_SHOWN = 8  # names listed per kind of mistake


@dataclass(frozen=True)
class Rule:
    """One foreign tensor and the canonical tensors that it holds.

    Attributes:
        foreign: name in the foreign checkpoint.
        canonical: names in ours, torch layout; several are stacked along the axis `part`.
        pattern: einops pattern, foreign layout -> canonical layout, with a leading `part` axis.
    """

    foreign: str
    canonical: tuple[str, ...]
    pattern: str

    def apply(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Foreign to canonical."""
        parts = einops.rearrange(tensor, self.pattern, part=len(self.canonical))
        return dict(zip(self.canonical, parts, strict=True))

    def invert(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Canonical to foreign."""
        source, target = self.pattern.split("->")
        parts = np.stack([tensors[name] for name in self.canonical])
        return einops.rearrange(parts, f"{target}->{source}", part=len(self.canonical))

    def foreign_shape(self, canonical_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the foreign tensor, from the shape of each canonical one."""
        source, target = self.pattern.split("->")
        sizes = (len(self.canonical), *canonical_shape)
        return pattern_shape(source, dict(zip(target.split(), sizes, strict=True)))


def to_flax_layout(row: Parameter, tensor: np.ndarray) -> np.ndarray:
    """One parameter from the torch layout to the Flax layout."""
    return _rearrange(tensor, row.pattern, row)


def to_torch_layout(row: Parameter, tensor: np.ndarray) -> np.ndarray:
    """One parameter from the Flax layout to the torch layout."""
    source, target = row.pattern.split("->")
    return _rearrange(tensor, f"{target}->{source}", row)


def _rearrange(tensor: np.ndarray, pattern: str, row: Parameter) -> np.ndarray:
    sizes = {axis: row.axis_sizes[axis] for axis in re.findall(r"\w+", pattern)}
    # A copy, never a view of somebody's live parameters; contiguous, because safetensors 0.8.0
    # writes a strided array as if it were.
    return np.array(einops.rearrange(tensor, pattern, **sizes), order="C")


def flax_tree(tensors: Tensors, config: ALiBiConfig) -> dict[str, Any]:
    """Canonical tensors as a nested Flax params tree of NumPy arrays.

    Raises:
        CheckpointError: tensors missing, unexpected or of the wrong shape.
    """
    table = parameter_table(config)
    check_shapes({row.name: row.shape for row in table}, tensors.shapes)
    tree: dict[str, Any] = {}
    for row in table:
        node = tree
        for key in row.flax_path[:-1]:
            node = node.setdefault(key, {})
        node[row.flax_path[-1]] = to_flax_layout(row, tensors[row.name])
    return tree


def canonical_tensors(params: Mapping[str, Any], config: ALiBiConfig) -> dict[str, np.ndarray]:
    """A nested Flax params tree as canonical tensors: the inverse of `flax_tree`.

    Raises:
        CheckpointError: leaves missing, unexpected or of the wrong shape.
    """
    leaves = dict(_leaves(params, ()))
    table = parameter_table(config)
    check_shapes(
        {"/".join(row.flax_path): row.flax_shape for row in table},
        {"/".join(path): tuple(leaf.shape) for path, leaf in leaves.items()},
    )
    return {row.name: to_torch_layout(row, np.asarray(leaves[row.flax_path])) for row in table}


def _leaves(node: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _leaves(child, (*path, str(key)))
    elif hasattr(node, "shape") and hasattr(node, "dtype"):
        yield path, node
    else:
        raise CheckpointError(
            f"{'/'.join(path)} is a {type(node).__name__}, expected an array; give the params alone"
        )


def check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> None:
    """Every expected name is there once with its shape, and nothing else.

    Raises:
        CheckpointError: a readable difference: missing and unexpected names with their nearest
            counterparts, and wrong shapes with the likely reason.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])
    ]
    if not (missing or unexpected or misshapen):
        return
    lines = [
        f"{len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(misshapen)} of the wrong shape (of {len(expected)})"
    ]
    lines += _listed(
        f"  missing     {name}  {_shape(expected[name])}{_nearest(name, unexpected)}"
        for name in missing
    )
    lines += _listed(
        f"  unexpected  {name}  {_shape(found[name])}{_nearest(name, missing)}"
        for name in unexpected
    )
    lines += _listed(
        f"  shape       {name}  is {_shape(found[name])}, expected {_shape(expected[name])}"
        f"{_shape_reason(found[name], expected[name])}"
        for name in misshapen
    )
    raise CheckpointError("\n".join(lines))


def _listed(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"  … and {more} more"] if more > 0 else [])


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, candidates, n=1)
    return f"   nearest: {nearest[0]}" if nearest else ""


def _shape_reason(found: Sequence[int], expected: Sequence[int]) -> str:
    if len(found) > 1 and tuple(found) == tuple(reversed(expected)):
        return ": it is transposed"
    if len(found) != len(expected):
        return f": it has {len(found)} axes instead of {len(expected)}"
    differing = [axis for axis in range(len(found)) if found[axis] != expected[axis]]
    return f": axis {', '.join(map(str, differing))} disagrees with the configuration"
