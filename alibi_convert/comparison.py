"""Whether two checkpoints hold the same model, bit by bit, a few megabytes at a time."""

from __future__ import annotations

import numpy as np

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.errors import MismatchError
from alibi_convert.progress import Advance, ignore
from alibi_convert.tensors import LazyTensor, as_bits, paired_chunks


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
    for name, header in wanted.tensors.headers.items():
        difference = _first_element(name, header, found.tensors.headers[name], advance)
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
