"""Tensors by name, read only when asked for, from any file or framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_spec.memory import in_huge_pages

# What parameters may be.
DTYPES: Mapping[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
CHUNK_BYTES = 2**19  # of a tensor that streams: what a core's cache holds while it is written


@dataclass(frozen=True)
class LazyTensor:
    """One tensor whose shape and dtype are known before it is read.

    Attributes:
        shape, dtype: what `read` will return.
        read: the whole tensor, perhaps a read-only view of a file; may be called several times.
        stream: the elements piece by piece, for tensors that are computed from another one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    stream: Callable[[], Iterator[np.ndarray]] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.size * self.dtype.itemsize

    def chunks(self) -> Iterator[np.ndarray]:
        """The elements in C order, a piece at a time, each chunk flat and contiguous."""
        return contiguous_chunks(self.read()) if self.stream is None else self.stream()


class Tensors(Mapping[str, np.ndarray]):
    """A read-only mapping that reads a tensor each time it is looked up.

    Attributes:
        headers: the tensors by name, unread.
    """

    def __init__(self, headers: Mapping[str, LazyTensor]) -> None:
        self.headers = dict(headers)

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Tensors:
        """Tensors that are in memory already: NumPy, torch or JAX.

        Raises:
            CheckpointError: NumPy cannot hold one of them.
        """

        def header(name: str, array: Any) -> LazyTensor:
            try:
                found = as_numpy(array)
            except CheckpointError as error:
                raise CheckpointError(f"{name} {error}") from None
            return LazyTensor(found.shape, found.dtype, lambda: found)

        return cls({name: header(name, array) for name, array in arrays.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.headers[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(header.nbytes for header in self.headers.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: header.shape for name, header in self.headers.items()}


def contiguous_chunks(array: np.ndarray, nbytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
    """The elements in C order, flat: views where the array is contiguous, small copies if not."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, nbytes // array.itemsize)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]
    elif array.nbytes <= nbytes:
        yield np.ascontiguousarray(array).reshape(-1)
    else:
        rows = max(1, nbytes * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            part = array[start] if rows == 1 else array[start : start + rows]
            yield from contiguous_chunks(part, nbytes)


def paired_chunks(
    first: Iterator[np.ndarray], second: Iterator[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two streams of equally many elements, cut at the same places."""
    left, right = next(first, None), next(second, None)
    while left is not None and right is not None:
        size = min(left.size, right.size)
        yield left[:size], right[:size]
        left = left[size:] if size < left.size else next(first, None)
        right = right[size:] if size < right.size else next(second, None)


def as_bits(array: np.ndarray) -> np.ndarray:
    """The elements as unsigned integers, for which NaN equals itself and -0 differs from 0."""
    return array.view(f"u{array.dtype.itemsize}")


def as_numpy(tensor: Any) -> np.ndarray:
    """A NumPy array of the same bits from a NumPy, torch or JAX array; bfloat16 stays bfloat16.

    Raises:
        CheckpointError: torch has no array for it: float8, quantised, sparse or without data.
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch  # the tensor is torch's, so this only looks the module up

    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (RuntimeError, TypeError):
        raise CheckpointError(
            f"is {tensor.dtype}, {tensor.layout} on {tensor.device}; expected a dense tensor of "
            f"{', '.join(DTYPES)}"
        ) from None


def as_torch(array: np.ndarray) -> Any:
    """A torch tensor of the same bits, in memory of its own."""
    import torch

    copy = in_huge_pages(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    if copy.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)
