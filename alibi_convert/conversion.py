"""Convert a checkpoint from any format to any other: write, check, report.

Tensors pass through one by one, a few megabytes at a time where none must be put together: they are
cast, looked at, hashed and written in one pass, then read back and compared in another. Only .pt,
.msgpack and orbax hold the whole model in memory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import require_same
from alibi_convert.formats import FORMATS, by_suffix
from alibi_convert.formats.config_file import OURS
from alibi_convert.formats.shards import MAX_SHARD_BYTES, parse_size
from alibi_convert.progress import progress_bar
from alibi_convert.report import Report, described
from alibi_convert.tensors import DTYPES
from alibi_convert.values import Watched, cast
from alibi_convert.writing.atomic import building
from alibi_convert.writing.hashing import file_xxh3, hashing
from alibi_convert.writing.journal import Journal
from alibi_convert.writing.layout import companions, copy_companion, left_behind
from alibi_convert.writing.provenance import restore_neutral_keys, source_files, write_provenance

VERIFY = ("logits", "bits", "none")  # how much of a conversion is proven


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str | None = None,
    dtype: str | None = None,
    verify: str = "logits",
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    strict_values: bool = False,
    resume: bool = False,
    progress: bool = False,
    **reading: Unpack[Reading],
) -> Report:
    """Convert one checkpoint; nothing is left behind when it fails.

    Args:
        source: anything that `open_checkpoint` reads.
        destination: a path that does not exist yet (or see `overwrite`).
        to: a key of `FORMATS`; None goes by the destination's suffix: .safetensors, .pt, .msgpack,
            .orbax; a folder of ours if it is no suffix of weights.
        dtype: cast every tensor to float16, bfloat16, float32 or float64.
        verify: "bits" reads the destination back and compares every tensor bit by bit; "logits"
            then runs both sides too, between families and where memory allows, and compares what
            they compute; "none" does neither.
        overwrite: replace an existing checkpoint, with the tokenizer in its folder.
        max_shard_size: largest file of a folder, in bytes or as "5GB" (the default), "500MB".
        strict_values: refuse NaN and infinity, instead of reporting them.
        resume: keep the shards that the same conversion had finished when it was killed.
        progress: show each phase and how far it is on the standard error stream.
        reading: as for `open_checkpoint`: config, allow_pt, ignore_keys, step, revision.

    Raises:
        CheckpointError: the source is broken, the destination exists, a cast overflows, the disk
            is full, or the destination does not read back.
        MismatchError: both sides do not compute the same.
        ValueError: unknown `to`, `dtype`, `verify` or `max_shard_size`.
        KeyboardInterrupt: when interrupted; a folder's finished shards are kept for `resume`.
    """
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r} is not known; expected one of {', '.join(VERIFY)}")
    started = time.monotonic()
    work = settle(source, destination, to, dtype, max_shard_size, reading, progress)
    with building(work.destination, overwrite, work.nbytes, work.task, resume) as (path, journal):
        sha256 = journal.notes.setdefault("source_sha256", dict.fromkeys(work.files))
        with hashing(work.files, sha256) as hashed:
            written = _write(work, path, journal)
            if strict_values:
                written.values.require_finite()
            verification = _check(work, written, verify)
            hashed.result()
        report = _report(work, written, verification, time.monotonic() - started)
        if path.is_dir():
            write_provenance(path, report, work.checkpoint)
    return report


@dataclass(frozen=True)
class Work:
    """One conversion, settled before anything is written.

    Attributes:
        source: as it was given, or which one it was of several.
        checkpoint: what it holds, and in what dtypes.
        meant: the same in the dtypes of the destination.
        destination, to, max_shard_bytes: where and how it is to be written.
        dtype: of every tensor in the destination; None where each keeps its own.
        allow_pt, progress: as for `convert`.
    """

    source: str
    checkpoint: Checkpoint
    meant: Checkpoint
    destination: Path
    to: str
    max_shard_bytes: int
    dtype: np.dtype | None
    allow_pt: bool
    progress: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the destination."""
        return sum(header.nbytes for header in self.meant.tensors.headers.values())

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files that make up the source, by name."""
        return source_files(self.checkpoint.path, self.allow_pt)

    @property
    def task(self) -> dict[str, Any]:
        """What a run must have in common with one that it resumes, as plain JSON values."""
        found = {name: path.stat() for name, path in self.files.items()}
        task = {
            "source": {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()},
            "config": self.checkpoint.config.to_dict(),
            "to": self.to,
            "dtype": None if self.dtype is None else str(self.dtype),
            "max_shard_bytes": self.max_shard_bytes,
        }
        return json.loads(json.dumps(task))


def settle(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str | None,
    dtype: str | None,
    max_shard_size: int | str | None,
    reading: Reading,
    progress: bool = False,
) -> Work:
    """Open the source, and see how it would be written; errors are those of `convert`."""
    place = Path(os.path.expanduser(destination))
    to = check_target(place, to, dtype)
    max_shard_bytes = MAX_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size)
    checkpoint = open_checkpoint(source, **reading)
    target = None if dtype is None else DTYPES[dtype]
    return Work(
        source=described(source, checkpoint, reading),
        checkpoint=checkpoint,
        meant=replace(checkpoint, tensors=cast(checkpoint.tensors, target)),
        destination=place,
        to=to,
        max_shard_bytes=max_shard_bytes,
        dtype=target,
        allow_pt=reading.get("allow_pt", False),
        progress=progress,
    )


@dataclass(frozen=True)
class _Written:
    """What was written, before it is moved into place.

    Attributes:
        path: where it is.
        values: what was seen in the tensors on their way.
        copied: files that came along unchanged.
        journal: which files a killed run had finished, and the hashes of the source.
        xxh3: those hashes by file name that are known from writing.
    """

    path: Path
    values: Watched
    copied: list[str]
    journal: Journal
    xxh3: Mapping[str, str]


def _write(work: Work, path: Path, journal: Journal) -> _Written:
    """Everything but conversion.json, tensor by tensor."""
    source = work.checkpoint
    with progress_bar(
        work.progress, "reading and writing", work.nbytes, journal.size(path)
    ) as advance:
        seen = journal.notes.setdefault("seen", {})
        values = Watched(source.tensors, work.dtype, seen, advance)
        xxh3 = FORMATS[work.to].write(
            *(path, source.config, values.tensors),
            max_shard_bytes=work.max_shard_bytes,
            journal=journal,
        )
    restore_neutral_keys(path, source.path, work.to)
    names = companions(source.path) if source.path.is_dir() and path.is_dir() else []
    for name in names:
        copy_companion(source.path, path, name)
    return _Written(path, values, names, journal, xxh3)


def _check(work: Work, written: _Written, verify: str) -> dict[str, Any]:
    """Read back what was written, compare it bit by bit, then run both sides and compare outputs.

    Returns:
        the `verification` of a report.
    """
    if verify == "none":
        return {"bitwise": False, "logits": {"not_run": "verification was switched off"}}
    found = open_checkpoint(written.path, allow_pt=True)
    _require_written(work, found)
    if verify == "bits":
        logits = {"not_run": "only bits were to be verified"}
    elif written.values.nonfinite:
        logits = {"not_run": "NaN or infinity in the weights"}
    else:
        from alibi_verify.logits import compare_logits  # the one import upwards: it runs models

        is_cast = bool(written.values.casts)
        logits = compare_logits(work.checkpoint, found, is_cast, work.progress)
    return {"bitwise": True, "logits": logits}


def _require_written(work: Work, written: Checkpoint) -> None:
    """What was written, on its way to the destination, reads back as what was meant."""
    if written.family != OURS:
        # It says the same in its own words, and perhaps has none for dropout or max_len; that it
        # says what the model computes was checked when it was written.
        written = replace(written, config=work.meant.config)
    with progress_bar(work.progress, "checking bits", work.nbytes) as advance:
        require_same(work.meant, replace(written, path=work.destination), advance)


def _report(work: Work, written: _Written, verification: dict[str, Any], seconds: float) -> Report:
    """What was done and what the checks found."""
    source, values = work.checkpoint, written.values
    taken = (*work.files, *written.copied)
    return Report(
        source=work.source,
        destination=str(work.destination),
        source_format=source.format,
        destination_format=work.to,
        family=source.family,
        tensors=len(source.tensors),
        nbytes=work.nbytes,
        dropped=dict(source.derived),
        folded=dict(source.folded),
        ignored=dict(source.ignored),
        wrappers=list(source.wrappers),
        rounding=values.rounding,
        casts=values.casts,
        nonfinite=values.nonfinite,
        copied=written.copied,
        left_behind=left_behind(source.path, taken) if source.path.is_dir() else [],
        kept=sorted(written.journal.kept),
        source_sha256=written.journal.notes["source_sha256"],
        destination_xxh3=_all_hashes(written.path, written.xxh3),
        verified=verification["bitwise"],
        verification=verification,
        seconds=seconds,
    )


def check_target(destination: Path, to: str | None, dtype: str | None) -> str:
    """The format to write; ValueError when it, the dtype or the suffix cannot be."""
    to = by_suffix(destination) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not known; expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    if FORMATS[to].suffix != destination.suffix and FORMATS[to].suffix:
        raise ValueError(
            f"{destination} does not end in {FORMATS[to].suffix}, the suffix of format {to}"
        )
    return to


def _all_hashes(written: Path, known: Mapping[str, str]) -> dict[str, str]:
    """The hashes of every file of the destination, of which some are known."""
    root = written if written.is_dir() else written.parent
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return {name: known.get(name) or file_xxh3(root / name) for name in names}
