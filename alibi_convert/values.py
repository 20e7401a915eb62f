"""The values in a conversion, chunk by chunk: casts and their rounding, NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.progress import Advance, ignore
from alibi_convert.tensors import DTYPES, LazyTensor, Tensors, as_bits


@dataclass
class Seen:
    """Counts of what one tensor holds.

    Attributes:
        nonfinite: how many elements are NaN or infinite.
        rounding: largest relative rounding error of any element.
    """

    nonfinite: int = 0
    rounding: float = 0.0


@dataclass(frozen=True)
class Cast:
    """All tensors that went from one dtype to another.

    Attributes:
        source, target: the dtypes.
        tensors: how many.
        rounding: largest relative rounding error of any element.
        where: the tensor that it is in; None when nothing was rounded.
    """

    source: str
    target: str
    tensors: int
    rounding: float
    where: str | None


class Watched:
    """Tensors that are cast and examined whenever they are read.

    Attributes:
        tensors: to be written.
        seen: by name, what each tensor held that was read to its end; plain JSON values.
    """

    def __init__(
        self,
        tensors: Tensors,
        dtypes: Mapping[str, np.dtype] | None,
        seen: dict[str, Any],
        advance: Advance = ignore,
    ) -> None:
        self.seen = seen
        self._source, self._dtypes, self._advance = tensors, dtypes, advance
        headers = {name: self._watched(name, header) for name, header in tensors.headers.items()}
        self.tensors = Tensors(headers)

    def _watched(self, name: str, header: LazyTensor) -> LazyTensor:
        dtype = header.dtype if self._dtypes is None else self._dtypes[name]

        def stream() -> Iterator[np.ndarray]:
            seen = Seen()
            for chunk in header.chunks():
                yield _look(name, chunk, dtype, seen)
                self._advance(chunk.size * dtype.itemsize)
            self.seen[name] = asdict(seen)

        def read() -> np.ndarray:
            if dtype != header.dtype:
                return gather(stream(), header.shape, dtype)
            for _ in stream():  # examined; nothing to keep
                pass
            return header.read()

        return LazyTensor(header.shape, dtype, read, stream)

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many elements are NaN or infinite, of each tensor that has any."""
        return {name: each["nonfinite"] for name, each in self.seen.items() if each["nonfinite"]}

    @property
    def rounding(self) -> float | None:
        """Largest relative rounding error of any element, None when nothing was to be cast."""
        if self._dtypes is None:
            return None
        return max((each["rounding"] for each in self.seen.values()), default=0.0)

    @property
    def casts(self) -> list[Cast]:
        """Every pair of dtypes that were cast."""
        groups: dict[tuple[np.dtype, np.dtype], list[str]] = {}
        for name, header in self.tensors.headers.items():
            dtypes = self._source.headers[name].dtype, header.dtype
            groups.setdefault(dtypes, []).append(name)
        return [
            self._cast(source, target, names)
            for (source, target), names in groups.items()
            if source != target
        ]

    def _cast(self, source: np.dtype, target: np.dtype, names: list[str]) -> Cast:
        errors = {name: self.seen[name]["rounding"] for name in names if name in self.seen}
        worst = max(errors, key=lambda name: errors[name], default="")
        rounding = errors.get(worst, 0.0)
        where = worst if rounding else None
        return Cast(str(source), str(target), len(names), rounding, where)

    def require_finite(self) -> None:
        """Raise CheckpointError naming every tensor with NaN or infinity."""
        if self.nonfinite:
            listed = ", ".join(f"{name} ({count:,})" for name, count in self.nonfinite.items())
            raise CheckpointError(
                f"NaN or infinity in {len(self.nonfinite)} tensors: {listed}; repair the "
                "checkpoint, or convert without strict_values (--strict-values)"
            )


def cast(tensors: Tensors, dtypes: Mapping[str, np.dtype] | None) -> Tensors:
    """The tensors in other dtypes, by name, cast when they are read; None leaves them."""
    if dtypes is None:
        return tensors
    headers = tensors.headers.items()
    return Tensors({name: cast_tensor(each, dtypes[name]) for name, each in headers})


def cast_tensor(source: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """One tensor in another dtype, cast when it is read."""

    def stream() -> Iterator[np.ndarray]:
        return (round_once(chunk, dtype) for chunk in source.chunks())

    def read() -> np.ndarray:
        return gather(stream(), source.shape, dtype)

    return LazyTensor(source.shape, dtype, read, stream)


def gather(chunks: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The whole tensor from its pieces."""
    array = np.empty(math.prod(shape), dtype)
    start = 0
    for chunk in chunks:
        array[start : start + chunk.size] = chunk
        start += chunk.size
    return array.reshape(shape)


def round_once(chunk: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The chunk in another dtype, each element rounded once, to the nearest, ties to even."""
    if (chunk.dtype, dtype) == (DTYPES["float64"], DTYPES["bfloat16"]):
        chunk = _rounded_to_odd(chunk)  # ml_dtypes rounds to float32, and then again
    with np.errstate(over="ignore"):
        return chunk.astype(dtype, copy=False)


def _rounded_to_odd(chunk: np.ndarray) -> np.ndarray:
    """Float32, towards zero, with the last bit set where anything was lost: safe to round again."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = chunk.astype(np.float32)
        is_beyond, is_inexact = np.abs(nearest) > np.abs(chunk), nearest != chunk
    return ((nearest.view(np.uint32) - is_beyond) | is_inexact).view(np.float32)


def _look(name: str, chunk: np.ndarray, dtype: np.dtype, seen: Seen) -> np.ndarray:
    """The chunk in `dtype`; its rounding, NaN and infinity are added to `seen`."""
    nonfinite = count_nonfinite(chunk)
    seen.nonfinite += nonfinite
    if dtype.itemsize > chunk.itemsize or dtype == chunk.dtype:  # wider floats hold narrower ones
        return round_once(chunk, dtype)
    rounded = round_once(chunk, dtype)
    if count_nonfinite(rounded) > nonfinite:
        where = np.flatnonzero(np.isfinite(chunk) & ~np.isfinite(rounded))[0]
        raise CheckpointError(
            f"{name} holds {chunk[where]}, beyond the range of {dtype}; choose a wider dtype"
        )
    seen.rounding = max(seen.rounding, _largest_rounding(chunk, rounded))
    return rounded


def _largest_rounding(exact: np.ndarray, rounded: np.ndarray) -> float:
    # The difference of a number and its rounding needs no more bits than the number has.
    wide = np.promote_types(exact.dtype, np.float32)
    exact, error = exact.astype(wide), rounded.astype(wide)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for zeros and for what is not finite
        np.subtract(error, exact, out=error)
        np.divide(error, exact, out=error)
    return float(np.fmax.reduce(np.abs(error, out=error), initial=0.0))


def count_nonfinite(chunk: np.ndarray) -> int:
    """How many elements are NaN or infinite, told by their bits."""
    if not chunk.size:
        return 0
    bits = as_bits(chunk)
    infinity = as_bits(np.full(1, np.inf, chunk.dtype))[0]
    sign = np.bitwise_not(bits.dtype.type(np.iinfo(bits.dtype).max >> 1))
    # The largest positive and the largest negative element: no array is made where all is well.
    positive, negative = bits.view(f"i{bits.itemsize}").max(), bits.max() & ~sign
    if positive < infinity and negative < infinity:
        return 0
    return int(np.count_nonzero((bits & ~sign) >= infinity))
