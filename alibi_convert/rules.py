"""Reversible layout rules, and the checks that a set of tensors is exactly what a table expects.

A rule is data: einops patterns and names. Nothing here knows a file format or a framework.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.tensors import LazyTensor, Tensors, as_numpy, contiguous_chunks
from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.parameters import pattern_shape

_SHOWN = 8  # names listed per kind of mistake
_AXIS = r"\([^)]*\)|\w+"


@dataclass(frozen=True)
class Row:
    """One line of a family's table: a foreign name, ours, and the layouts between them.

    In names, `{i}` stands for every layer and `{a,b,c}` for each of the words, in order.

    Attributes:
        foreign: name in the foreign checkpoint.
        canonical: name or names in ours.
        pattern: einops pattern, foreign layout -> canonical layout. With an axis `part`, first on
            the right, several canonical tensors are interleaved in the foreign one; without it
            they follow one another along the first axis. Empty for the same layout.
    """

    foreign: str
    canonical: str
    pattern: str = ""

    def rules(self, table: Mapping[str, Parameter], num_layers: int) -> Iterator[Rule]:
        """This row for every layer, as far as the parameters exist in this configuration."""
        for index in range(num_layers if "{i}" in self.canonical else 1):
            names = _alternatives(self.canonical.replace("{i}", str(index)))
            parameters = tuple(table[name] for name in names if name in table)
            if parameters:
                foreign = self.foreign.replace("{i}", str(index))
                yield Rule(foreign, parameters, self.pattern)


def both(foreign: str, canonical: str) -> tuple[Row, Row]:
    """The rows of a module's weight and bias."""
    return (
        Row(f"{foreign}.weight", f"{canonical}.weight"),
        Row(f"{foreign}.bias", f"{canonical}.bias"),
    )


def _alternatives(name: str) -> list[str]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    if found is None:
        return [name]
    before, words, after = found.groups()
    return [f"{before}{word}{after}" for word in words.split(",")]


@dataclass(frozen=True)
class Rule:
    """One foreign tensor and the parameters that it holds: a `Row`, made definite.

    Attributes:
        foreign: name in the foreign checkpoint.
        parameters: entries of `parameter_table`.
        pattern: as in `Row`.
    """

    foreign: str
    parameters: tuple[Parameter, ...]
    pattern: str

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Shape of the foreign tensor."""
        if self.pattern:
            return pattern_shape(self.pattern.split("->")[0], self._sizes)
        return self._stacked_shape

    @property
    def transposes(self) -> bool:
        """Whether the foreign matrix is the canonical one with its two axes exchanged."""
        source, _, target = self.pattern.partition("->")
        axes = re.findall(_AXIS, source)
        return len(axes) == 2 and re.findall(_AXIS, target) == axes[::-1]

    def extract(self, tensor: np.ndarray, index: int) -> np.ndarray:
        """The canonical tensor number `index`; a view where that is possible."""
        return self.elements(tensor, index).reshape(self.parameters[index].shape)

    def elements(self, tensor: np.ndarray, index: int) -> np.ndarray:
        """A view whose elements are those of `extract`, in that order; its axes may be unmerged."""
        if "part" in self.pattern:
            source, target = self.pattern.split("->")
            return self._rearrange(tensor, f"{source}->{_unmerged(target)}")[index]
        first = sum(parameter.shape[0] for parameter in self.parameters[:index])
        rearranged = self._rearrange(tensor, self.pattern)
        return rearranged[first : first + self.parameters[index].shape[0]]

    def build(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The foreign tensor from the canonical ones: the inverse of `extract`."""
        parts = [tensors[parameter.name] for parameter in self.parameters]
        if "part" in self.pattern:
            views, axis = self._unmerged_parts(parts)
            return np.stack(views, axis).reshape(self.foreign_shape)
        source, _, target = self.pattern.partition("->")
        stacked = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._rearrange(stacked, f"{target}->{source}" if self.pattern else "")

    def built_chunks(self, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """The elements of `build`, piece by piece, without putting it together where possible."""
        if "part" in self.pattern:
            views, axis = self._unmerged_parts([tensors[each.name] for each in self.parameters])
            for place in np.ndindex(views[0].shape[:axis]):
                for view in views:
                    yield from contiguous_chunks(view[place])
        elif not self.pattern:
            for parameter in self.parameters:
                yield from contiguous_chunks(tensors[parameter.name])
        else:
            yield from contiguous_chunks(self.build(tensors))

    def _unmerged_parts(self, parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
        """Views of the canonical tensors that, stacked along an axis, are the foreign tensor."""
        source, target = self.pattern.split("->")
        axes = _unmerged(source).split()
        pattern = f"{target}->{' '.join(axes)}".replace("part", "")
        return [self._rearrange(part, pattern) for part in parts], axes.index("part")

    @property
    def _sizes(self) -> dict[str, int]:
        rows = self._stacked_shape[0] if self._stacked_shape else 1
        return {**self.parameters[0].axis_sizes, "part": len(self.parameters), "rows": rows}

    @property
    def _stacked_shape(self) -> tuple[int, ...]:
        first = self.parameters[0].shape
        return (sum(parameter.shape[0] for parameter in self.parameters), *first[1:])

    def _rearrange(self, tensor: np.ndarray, pattern: str) -> np.ndarray:
        if not pattern:
            return tensor
        sizes = {axis: size for axis, size in self._sizes.items() if axis in _axes(pattern)}
        return einops.rearrange(tensor, pattern, **sizes)


def _unmerged(side: str) -> str:
    return re.sub(r"[()]", "", side)


def _axes(pattern: str) -> set[str]:
    return set(re.findall(r"\w+", pattern))


def flax_view(row: Parameter, tensor: np.ndarray) -> np.ndarray:
    """One parameter in the Flax layout, without a copy where strides can say it."""
    return _rearrange(tensor, row.pattern, row)


def to_flax_layout(row: Parameter, tensor: np.ndarray) -> np.ndarray:
    """One parameter from the torch layout to the Flax layout."""
    # A copy, never a view of somebody's live parameters, and contiguous.
    return np.array(flax_view(row, tensor), order="C")


def torch_view(row: Parameter, array: Any) -> LazyTensor:
    """One parameter in the torch layout, unread; without a copy where strides can say it."""
    source, target = row.pattern.split("->")
    return LazyTensor(
        row.shape,
        np.dtype(array.dtype),
        lambda: _rearrange(as_numpy(array), f"{target}->{source}", row),
    )


def to_torch_layout(row: Parameter, array: Any) -> np.ndarray:
    """One parameter from the Flax layout to the torch layout."""
    return np.array(torch_view(row, array).read(), order="C")


def _rearrange(tensor: np.ndarray, pattern: str, row: Parameter) -> np.ndarray:
    sizes = {axis: row.axis_sizes[axis] for axis in _axes(pattern)}
    return einops.rearrange(tensor, pattern, **sizes)


def flax_tree(
    tensors: Tensors,
    config: ALiBiConfig,
    leaf: Callable[[Parameter, np.ndarray], Any] = to_flax_layout,
) -> dict[str, Any]:
    """Canonical tensors as a nested Flax params tree of NumPy arrays, or of what `leaf` makes.

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
        node[row.flax_path[-1]] = leaf(row, tensors[row.name])
    return tree


def canonical_tensors(params: Mapping[str, Any], config: ALiBiConfig) -> dict[str, np.ndarray]:
    """A Flax params tree, nested or flattened, as canonical tensors: the inverse of `flax_tree`.

    Raises:
        CheckpointError: leaves missing, unexpected or of the wrong shape.
    """
    leaves = check_tree(params, config)
    return {
        row.name: to_torch_layout(row, leaves[row.flax_path]) for row in parameter_table(config)
    }


def unread_tensors(params: Mapping[str, Any], config: ALiBiConfig) -> Tensors:
    """`canonical_tensors`, each of which is read from the params when it is asked for."""
    leaves = check_tree(params, config)
    return Tensors(
        {row.name: torch_view(row, leaves[row.flax_path]) for row in parameter_table(config)}
    )


def check_tree(params: Mapping[str, Any], config: ALiBiConfig) -> dict[tuple[str, ...], Any]:
    """The leaves of a params tree by path; shapes and dtypes may stand for the arrays.

    Raises:
        CheckpointError: as for `canonical_tensors`.
    """
    leaves = leaves_by_path(params)
    check_shapes(
        {"/".join(row.flax_path): row.flax_shape for row in parameter_table(config)},
        {"/".join(path): tuple(leaf.shape) for path, leaf in leaves.items()},
    )
    return leaves


def leaves_by_path(params: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree, nested or flattened, each under the keys that lead to it.

    Raises:
        CheckpointError: something that is no array, or a leaf that is there in two forms.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in _leaves(params, ()):
        if path[-1:] == ("value",):  # of a box, written as a mapping
            path = path[:-1]
        for apart, part in _unstacked(path, leaf):
            if apart in leaves:
                raise CheckpointError(f"{'/'.join(apart)} is there twice, in two forms; remove one")
            leaves[apart] = part
    return leaves


def _unstacked(path: tuple[str, ...], leaf: Any) -> Iterable[tuple[tuple[str, ...], Any]]:
    """A leaf, or those that a scan over layers has stacked in it: `alibi_spec.stacked_table`."""
    if "layers" not in path or not leaf.shape:
        yield path, leaf
        return
    place = path.index("layers")
    for layer in range(leaf.shape[0]):
        apart = (*path[:place], f"layers_{layer}", *path[place + 1 :])
        yield apart, leaf[layer] if hasattr(leaf, "__getitem__") else _Shape(leaf)


class _Shape:
    """What is known of a layer's part of an array that is not read yet."""

    def __init__(self, stacked: Any) -> None:
        self.shape, self.dtype = tuple(stacked.shape[1:]), stacked.dtype


def _leaves(node: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            # Flattened trees have the whole path in one key: "a/b/c", or a tuple of names.
            steps = key if isinstance(key, tuple) else str(key).split("/")
            yield from _leaves(child, (*path, *map(str, steps)))
    elif hasattr(node, "value"):  # linen's boxes, of fresh params
        yield path, node.value
    elif hasattr(node, "shape") and hasattr(node, "dtype"):
        yield path, node
    else:
        raise CheckpointError(
            f"{'/'.join(path)} is a {type(node).__name__}, expected an array; give only the params"
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
        f"  missing     {name}  {_shape(expected[name])}{nearest(name, unexpected)}"
        for name in missing
    )
    lines += _listed(
        f"  unexpected  {name}  {_shape(found[name])}{nearest(name, missing)}"
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


def nearest(name: str, candidates: Sequence[str]) -> str:
    """What a name may have been meant to be, to follow it in an error; or nothing."""
    found = difflib.get_close_matches(name, candidates, n=1)
    return f"   nearest: {found[0]}" if found else ""


def _shape_reason(found: Sequence[int], expected: Sequence[int]) -> str:
    if len(found) > 1 and tuple(found) == tuple(reversed(expected)):
        return ": it is transposed"
    if len(found) != len(expected):
        return f": it has {len(found)} axes instead of {len(expected)}"
    differing = [axis for axis in range(len(found)) if found[axis] != expected[axis]]
    return f": axis {', '.join(map(str, differing))} disagrees with the configuration"
