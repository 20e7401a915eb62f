"""Convert a checkpoint from any format to any other, and show what one holds."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert.checkpoint import PICKLE_SUFFIXES, Checkpoint, open_checkpoint
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.formats import FORMATS
from alibi_convert.store import replacing
from alibi_convert.tensors import DTYPES, LazyTensor, Tensors
from alibi_spec import ALiBiConfig


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source, destination: paths.
        source_format, destination_format: keys of `FORMATS`.
        family: "alibi-duo" or the foreign family recognised.
        tensors: how many were written.
        nbytes: bytes of tensor data written.
        dropped: tensors of the source that the configuration implies, with the reason.
        rounding: largest relative rounding error of any element, None when nothing was cast.
        verified: the destination was read back and is bitwise what was meant.
    """

    source: str
    destination: str
    source_format: str
    destination_format: str
    family: str
    tensors: int
    nbytes: int
    dropped: dict[str, str] = field(default_factory=dict)
    rounding: float | None = None
    verified: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    *,
    config: ALiBiConfig | None = None,
    allow_pt: bool = False,
    overwrite: bool = False,
) -> Report:
    """Convert one checkpoint; nothing is left behind when it fails.

    Args:
        source: anything that `open_checkpoint` reads.
        destination: a path that does not exist yet (or see `overwrite`).
        to: a key of `FORMATS`; None goes by the destination's suffix, a folder without one.
        dtype: cast every tensor to float16, bfloat16, float32 or float64.
        verify: read the destination back and compare every tensor bit by bit.
        config, allow_pt: as for `open_checkpoint`.
        overwrite: replace an existing checkpoint.

    Raises:
        CheckpointError: the source is broken, the destination exists, a cast overflows, or the
            destination does not read back.
        ValueError: unknown `to` or `dtype`.
    """
    destination = Path(destination)
    to = _format_of(destination) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not known; expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    if FORMATS[to].suffix != destination.suffix and FORMATS[to].suffix:
        raise ValueError(
            f"{destination} does not end in {FORMATS[to].suffix}, the suffix of format {to}"
        )
    checkpoint = open_checkpoint(source, config=config, allow_pt=allow_pt)
    rounding = None
    if dtype is not None:
        checkpoint, rounding = _cast(checkpoint, DTYPES[dtype])
    with replacing(destination, overwrite) as temporary:
        FORMATS[to].write(temporary, checkpoint.config, checkpoint.tensors)
        if verify:
            written = open_checkpoint(temporary, allow_pt=True)
            require_same(checkpoint, replace(written, path=destination))
    return Report(
        source=str(source),
        destination=str(destination),
        source_format=checkpoint.format,
        destination_format=to,
        family=checkpoint.family,
        tensors=len(checkpoint.tensors),
        nbytes=sum(header.nbytes for header in checkpoint.tensors.headers.values()),
        dropped=dict(checkpoint.derived),
        rounding=rounding,
        verified=verify,
    )


def inspect(
    path: str | os.PathLike[str], *, config: ALiBiConfig | None = None, allow_pt: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds, as plain JSON values.

    Raises:
        CheckpointError: as for `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, config=config, allow_pt=allow_pt)
    headers = checkpoint.tensors.headers
    return {
        "path": str(path),
        "format": checkpoint.format,
        "family": checkpoint.family,
        "model": "ALiBiTransformer" if checkpoint.config.vocab_size is None else "ALiBiLM",
        "parameters": sum(int(np.prod(header.shape)) for header in headers.values()),
        "nbytes": sum(header.nbytes for header in headers.values()),
        "config": checkpoint.config.to_dict(),
        "tensors": {
            name: {"shape": list(header.shape), "dtype": str(header.dtype)}
            for name, header in headers.items()
        },
        "derived": dict(checkpoint.derived),
    }


def require_same(wanted: Checkpoint, found: Checkpoint) -> None:
    """Two checkpoints describe the same model, bit by bit.

    Raises:
        CheckpointError: naming the first difference.
    """
    difference = first_difference(wanted, found)
    if difference is not None:
        raise MismatchError(f"{found.path} differs from {wanted.path}: {difference}")


def first_difference(wanted: Checkpoint, found: Checkpoint) -> str | None:
    """The first difference in configuration or tensors, or None when there is none."""
    for name, value in wanted.config.to_dict().items():
        other = found.config.to_dict()[name]
        if value != other:
            return f"configuration {name} is {other!r}, expected {value!r}"
    for name, tensor in wanted.tensors.items():
        other = found.tensors[name]
        if other.dtype != tensor.dtype:
            return f"{name} has dtype {other.dtype}, expected {tensor.dtype}"
        same = _bits(tensor) == _bits(other)
        if not same.all():
            where = tuple(int(i) for i in np.argwhere(~same)[0])
            return f"{name}{list(where)} is {other[where]}, expected {tensor[where]}"
    return None


def _bits(tensor: np.ndarray) -> np.ndarray:
    # NaN equals NaN and -0 differs from 0 when bits are compared.
    return np.ascontiguousarray(tensor).view(f"u{tensor.dtype.itemsize}").reshape(tensor.shape)


def _format_of(destination: Path) -> str:
    by_suffix = {kind.suffix: name for name, kind in FORMATS.items() if kind.suffix}
    if destination.suffix in PICKLE_SUFFIXES and destination.suffix not in by_suffix:
        raise ValueError(f"{destination}: torch state dicts are written as .pt or .safetensors")
    return by_suffix.get(destination.suffix, "alibi")


def _cast(checkpoint: Checkpoint, dtype: np.dtype) -> tuple[Checkpoint, float]:
    """Cast lazily, after one pass that finds overflows and the largest relative rounding error."""
    rounding = 0.0
    headers = {}
    for name, header in checkpoint.tensors.headers.items():
        exact = checkpoint.tensors[name].astype(np.float64)
        with np.errstate(over="ignore"):
            rounded = exact.astype(dtype).astype(np.float64)
        overflowed = np.isfinite(exact) & ~np.isfinite(rounded)
        if overflowed.any():
            raise CheckpointError(
                f"{name} holds {exact[overflowed][0]}, beyond the range of {dtype}; choose a wider "
                "dtype"
            )
        finite = np.isfinite(exact) & (exact != 0)
        errors = np.abs(rounded[finite] - exact[finite]) / np.abs(exact[finite])
        rounding = max(rounding, float(errors.max(initial=0.0)))

        def read(name: str = name) -> np.ndarray:
            return checkpoint.tensors[name].astype(dtype)

        headers[name] = LazyTensor(header.shape, dtype, read)
    return replace(checkpoint, tensors=Tensors(headers)), rounding
