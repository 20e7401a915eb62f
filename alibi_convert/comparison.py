"""Whether two checkpoints hold the same model, bit by bit, a few megabytes at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.errors import MismatchError
from alibi_convert.progress import Advance, ignore
from alibi_convert.tensors import LazyTensor, Tensors, as_bits, paired_chunks
from alibi_convert.values import cast_tensor

SAME = "both checkpoints hold the same model"


@dataclass(frozen=True)
class Relation:
    """What two checkpoints are to each other.

    Attributes:
        statement: in words; where there is a difference, what does not hold.
        difference: the first one, None when the statement holds.
        rounded: the one whose elements are those of the other, rounded; None when they are equal.
        dtype: of the tensors that were rounded, the coarsest.
    """

    statement: str
    difference: str | None
    rounded: Checkpoint | None = None
    dtype: str = ""


def relation(first: Checkpoint, second: Checkpoint) -> Relation:
    """Whether two checkpoints are the same model, bit by bit, or one is the cast of the other."""
    difference = first_difference(first, second)
    if difference is None or first.config != second.config:
        return Relation(SAME, difference)
    headers, others = first.tensors.headers, second.tensors.headers
    if first.tensors.shapes != second.tensors.shapes or all(
        header.dtype == others[name].dtype for name, header in headers.items()
    ):
        return Relation(SAME, difference)
    onward = first_difference(_cast_like(first, second), second)
    back = first_difference(_cast_like(second, first), first)
    if onward is None:
        dtypes = _changed(second, first)
        statement = f"the second checkpoint is the first, cast to {', '.join(dtypes)}"
        return Relation(statement, None, None if back is None else second, dtypes[0])
    if back is None:
        dtypes = _changed(first, second)
        statement = f"the first checkpoint is the second, cast to {', '.join(dtypes)}"
        return Relation(statement, None, first, dtypes[0])
    shrinks = second.tensors.nbytes <= first.tensors.nbytes
    dtypes = _changed(second, first) if shrinks else _changed(first, second)
    difference = onward if shrinks else back
    return Relation(SAME, f"even after a cast to {', '.join(dtypes)}, {difference}")


def _cast_like(source: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The tensors of one checkpoint in the dtypes of another."""
    dtypes = {name: header.dtype for name, header in target.tensors.headers.items()}
    headers = source.tensors.headers
    tensors = {name: cast_tensor(header, dtypes[name]) for name, header in headers.items()}
    return replace(source, tensors=Tensors(tensors))


def _changed(cast: Checkpoint, source: Checkpoint) -> list[str]:
    """The dtypes that tensors were cast to, the coarsest first."""
    before = source.tensors.headers
    changed = {
        header.dtype
        for name, header in cast.tensors.headers.items()
        if header.dtype != before[name].dtype
    }
    by_resolution = sorted(changed, key=lambda dtype: float(ml_dtypes.finfo(dtype).eps))
    return [str(dtype) for dtype in reversed(by_resolution)]


def require_same(wanted: Checkpoint, found: Checkpoint, advance: Advance = ignore) -> None:
    """Two checkpoints describe the same model, bit by bit.

    Raises:
        CheckpointError: naming the first difference.
    """
    difference = first_difference(wanted, found, advance)
    if difference is not None:
        raise MismatchError(f"{found.path} differs from {wanted.path}: {difference}")


def first_difference(
    wanted: Checkpoint, found: Checkpoint, advance: Advance = ignore
) -> str | None:
    """The first difference in configuration or tensors, or None; `advance` is told the bytes."""
    for name, value in wanted.config.to_dict().items():
        other = found.config.to_dict()[name]
        if value != other:
            return f"configuration {name} is {other!r}, expected {value!r}"
    return first_difference_of_tensors(wanted.tensors, found.tensors, advance)


def first_difference_of_tensors(
    wanted: Tensors, found: Tensors, advance: Advance = ignore
) -> str | None:
    """The first difference in tensors of the same names, or None; `advance` is told the bytes."""
    for name, header in wanted.headers.items():
        difference = _first_element(name, header, found.headers[name], advance)
        if difference is not None:
            return difference
    return None


def _first_element(
    name: str, wanted: LazyTensor, found: LazyTensor, advance: Advance
) -> str | None:
    if found.dtype != wanted.dtype:
        return f"{name} has dtype {found.dtype}, expected {wanted.dtype}"
    start = 0
    for mine, other in paired_chunks(wanted.chunks(), found.chunks()):
        differing = as_bits(mine) != as_bits(other)
        if differing.any():
            first = int(differing.argmax())
            where = [int(i) for i in np.unravel_index(start + first, wanted.shape)]
            return f"{name}{where} is {other[first]}, expected {mine[first]}"
        start += mine.size
        advance(mine.nbytes)
    return None
