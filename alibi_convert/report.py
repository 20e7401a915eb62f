"""What a checkpoint holds and what a conversion did, for people, programs and `conversion.json`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Unpack

from alibi_convert.checkpoint import Reading, open_checkpoint
from alibi_convert.values import Cast


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source, destination: paths.
        source_format, destination_format: keys of `FORMATS`.
        family: "alibi-duo" or the foreign family recognised.
        tensors: how many were written.
        nbytes: bytes of tensor data written.
        dropped: tensors of the source that are not needed, with the reason.
        optimizer: of the state that was carried along, kind, step, and how many parameters have
            which moments; empty where there was none.
        adapter: its path and the model that it names, how many tensors it was added to or stands in
            for, the scalings, and the output layer that it untied; empty where there was none.
        folded: tensors that were computed from those of the source, with the reason.
        ignored: keys of the foreign configuration that were ignored, with their values.
        wrappers: keys and prefixes of training that were removed from the names.
        rounding: largest relative rounding error of any element, None when nothing was cast.
        casts: the dtypes that were cast, each with its largest rounding error.
        nonfinite: number of NaN and infinite elements, of each tensor that has any.
        copied: files that were copied unchanged: tokenizer and generation settings.
        left_behind: other files in the folder of the source, or in a .gguf, not copied.
        kept: files that a killed conversion had finished; they were not written again.
        source_sha256, destination_xxh3: hashes by file name.
        verified: the destination was read back and is right, bit by bit.
        verification: every check: "bitwise", and "logits" or why they were not compared.
        seconds: how long it took.
    """

    source: str
    destination: str
    source_format: str
    destination_format: str
    family: str
    tensors: int
    nbytes: int
    dropped: dict[str, str] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, Any] = field(default_factory=dict)
    wrappers: list[str] = field(default_factory=list)
    rounding: float | None = None
    casts: list[Cast] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    source_sha256: dict[str, str] = field(default_factory=dict)
    destination_xxh3: dict[str, str] = field(default_factory=dict)
    verified: bool = False
    verification: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def inspect(
    path: str | os.PathLike[str],
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """What a checkpoint holds, as plain JSON values.

    Raises:
        CheckpointError: as for `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, **reading)
    headers = checkpoint.tensors.headers
    return {
        "path": checkpoint.source,
        "format": checkpoint.format,
        "family": checkpoint.family,
        "model": "ALiBiTransformer" if checkpoint.config.vocab_size is None else "ALiBiLM",
        "parameters": sum(header.size for header in headers.values()),
        "nbytes": checkpoint.tensors.nbytes,
        "config": checkpoint.config.to_dict(),
        "tensors": {
            name: {"shape": list(header.shape), "dtype": str(header.dtype)}
            for name, header in headers.items()
        },
        "adapter": checkpoint.adapter,
        "derived": dict(checkpoint.derived),
        "ignored": dict(checkpoint.ignored),
        "wrappers": list(checkpoint.wrappers),
    }
