"""Tensors by name, read only when asked for, whatever file or framework they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# What parameters may be.
DTYPES: Mapping[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor whose shape and dtype are known before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """A read-only mapping that reads a tensor each time it is looked up.

    Attributes:
        headers: the tensors by name, unread.
    """

    def __init__(self, headers: Mapping[str, LazyTensor]) -> None:
        self.headers = dict(headers)

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Tensors:
        """Tensors that are in memory already: NumPy, torch or JAX."""

        def header(array: np.ndarray) -> LazyTensor:
            return LazyTensor(array.shape, array.dtype, lambda: array)

        return cls({name: header(as_numpy(array)) for name, array in arrays.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.headers[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: header.shape for name, header in self.headers.items()}


def as_numpy(tensor: Any) -> np.ndarray:
    """A NumPy array of the same bits from a NumPy, torch or JAX array; bfloat16 stays bfloat16."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch  # the tensor is torch's, so this only looks the module up

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_torch(array: np.ndarray) -> Any:
    """A torch tensor of the same bits, in memory of its own."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
