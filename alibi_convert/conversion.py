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
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from alibi_convert.carrying import Carried, carried, optimizer_of, require_same_optimizer
from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import require_same
from alibi_convert.formats import FORMATS, by_suffix
from alibi_convert.formats.config_file import OURS
from alibi_convert.formats.shards import MAX_SHARD_BYTES, parse_size
from alibi_convert.progress import progress_bar
from alibi_convert.report import Report
from alibi_convert.tensors import DTYPES
from alibi_convert.values import Watched, cast
from alibi_convert.writing.atomic import building
from alibi_convert.writing.hashing import file_xxh3, hashing
from alibi_convert.writing.journal import Journal
from alibi_convert.writing.provenance import (
    bring_along,
    reader_of_companions,
    write_provenance,
)

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
    tx: Any = None,
    **reading: Unpack[Reading],
) -> Report:
    """Convert one checkpoint; nothing is left behind when it fails.

    Args:
        source: anything that `open_checkpoint` reads.
        destination: a path that does not exist yet (or see `overwrite`).
        to: a key of `FORMATS`; None goes by the destination's suffix: .safetensors, .pt, .msgpack,
            .orbax, .gguf; a folder of ours if it is no suffix of weights.
        dtype: cast every tensor to float16, bfloat16, float32 or float64.
        verify: "bits" reads the destination back and compares every tensor bit by bit; "logits"
            then runs both sides too, between families and where memory allows, and compares what
            they compute; "none" does neither.
        overwrite: replace an existing checkpoint, with the tokenizer in its folder.
        max_shard_size: largest file of a folder, in bytes or as "5GB" (the default), "500MB".
        strict_values: refuse NaN and infinity, instead of reporting them.
        resume: keep the shards that the same conversion had finished when it was killed.
        progress: show each phase and how far it is on the standard error stream.
        tx: the `optax.GradientTransformation` that goes on with the optimizer's state of the source
            in .msgpack or orbax; None is the plain `optax.adamw`, `optax.sgd` or `optax.lion`.
        reading: as for `open_checkpoint`: config, allow_pt, ignore_keys, step, revision,
            adapter.

    Raises:
        CheckpointError: the source is broken, the destination exists, a cast overflows, the disk
            is full, the state of `tx` cannot be written, or the destination does not read back.
        MismatchError: both sides do not compute the same.
        ValueError: unknown `to`, `dtype`, `verify` or `max_shard_size`; `tx` is no transformation.
        KeyboardInterrupt: when interrupted; a folder's finished shards are kept for `resume`.
    """
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r} is not known; expected one of {', '.join(VERIFY)}")
    started = time.monotonic()
    target = settle(destination, to, dtype, max_shard_size)
    checkpoint = open_checkpoint(source, **reading)
    optimizer = carried(checkpoint, target.format, tx)
    nbytes = target.cast(checkpoint).tensors.nbytes + optimizer.nbytes
    task = _task(checkpoint, target)
    with building(target.path, overwrite, nbytes, task, resume) as (path, journal):
        sha256 = journal.notes.setdefault("source_sha256", dict.fromkeys(checkpoint.files))
        with hashing(checkpoint.files, sha256) as hashed:
            written = _write(checkpoint, optimizer, target, path, journal, progress)
            if strict_values:
                written.values.require_finite()
            verification = _check(checkpoint, optimizer, target, written, verify, progress)
            hashed.result()
        seconds = time.monotonic() - started
        report = _report(checkpoint, optimizer, target, written, verification, seconds)
        if path.is_dir():
            write_provenance(path, report, checkpoint)
    return report


@dataclass(frozen=True)
class Target:
    """Where and how a conversion writes, settled before its source is opened.

    Attributes:
        path: the destination.
        format: a key of `FORMATS`.
        dtype: of every tensor; None where each keeps its own.
        max_shard_bytes: largest file of a folder.
    """

    path: Path
    format: str
    dtype: np.dtype | None
    max_shard_bytes: int

    def cast(self, source: Checkpoint) -> Checkpoint:
        """The source in the dtypes of the destination, unread."""
        return replace(source, tensors=cast(source.tensors, self.dtypes(source)))

    def dtypes(self, source: Checkpoint) -> dict[str, np.dtype] | None:
        """Of every tensor in the destination; None where each keeps its own."""
        headers, form = source.tensors.headers, FORMATS[self.format]
        dtypes = {name: form.dtype(name, header, self.dtype) for name, header in headers.items()}
        changes_some = any(dtypes[name] != header.dtype for name, header in headers.items())
        return dtypes if changes_some or self.dtype is not None else None


def settle(
    destination: str | os.PathLike[str],
    to: str | None,
    dtype: str | None,
    max_shard_size: int | str | None,
) -> Target:
    """The arguments of `convert` about its destination; ValueError for unknown ones."""
    path = Path(os.path.expanduser(destination))
    return Target(
        path=path,
        format=check_target(path, to, dtype),
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_bytes=MAX_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size),
    )


def _task(source: Checkpoint, target: Target) -> dict[str, Any]:
    """What a conversion must have in common with one that it resumes, as plain JSON values."""
    found = {name: path.stat() for name, path in source.files.items()}
    task = {
        "source": {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()},
        "config": source.config.to_dict(),
        "to": target.format,
        "dtype": None if target.dtype is None else str(target.dtype),
        "max_shard_bytes": target.max_shard_bytes,
    }
    return json.loads(json.dumps(task))


@dataclass(frozen=True)
class _Written:
    """The files that were written, before they are moved into place.

    Attributes:
        path: where they are.
        values: casts, NaN and infinity seen in the tensors while they were written.
        copied: files that were copied unchanged.
        left_behind: other files that the source has.
        journal: which files a killed conversion had finished, and the hashes of the source.
        xxh3: hashes by file name, as far as they are known from writing.
    """

    path: Path
    values: Watched
    copied: list[str]
    left_behind: list[str]
    journal: Journal
    xxh3: Mapping[str, str]


def _write(
    source: Checkpoint,
    optimizer: Carried,
    target: Target,
    path: Path,
    journal: Journal,
    progress: bool,
) -> _Written:
    """Everything but conversion.json, tensor by tensor."""
    nbytes = target.cast(source).tensors.nbytes
    with progress_bar(progress, "reading and writing", nbytes, journal.size(path)) as advance:
        seen = journal.notes.setdefault("seen", {})
        values = Watched(source.tensors, target.dtypes(source), seen, advance)
        form = FORMATS[target.format]
        options: dict[str, Any] = {
            "max_shard_bytes": target.max_shard_bytes,
            "journal": journal,
            **optimizer.writing,
        }
        if form.holds:
            options["companion"] = reader_of_companions(source)
        xxh3 = form.write(*(path, source.config, values.tensors), **options)
    copied, left_behind = bring_along(source, path, target.format, form.holds)
    return _Written(path, values, copied, left_behind, journal, xxh3)


def _check(
    source: Checkpoint,
    optimizer: Carried,
    target: Target,
    written: _Written,
    verify: str,
    progress: bool,
) -> dict[str, Any]:
    """Read back what was written, compare it bit by bit, then run both sides and compare outputs.

    Returns:
        the `verification` of a report.
    """
    if verify == "none":
        return {"bitwise": False, "logits": {"not_run": "verification was switched off"}}
    found = open_checkpoint(written.path, allow_pt=True)
    _require_written(target.cast(source), replace(found, path=target.path), progress)
    if optimizer.state is not None:
        require_same_optimizer(optimizer.state, optimizer_of(found))
    if verify == "bits":
        logits = {"not_run": "only bits were to be verified"}
    elif written.values.nonfinite:
        logits = {"not_run": "NaN or infinity in the weights"}
    else:
        from alibi_verify.logits import compare_logits  # the one import upwards: it runs models

        logits = compare_logits(source, found, bool(written.values.casts), progress)
    return {"bitwise": True, "logits": logits}


def _require_written(wanted: Checkpoint, written: Checkpoint, progress: bool) -> None:
    """Raise CheckpointError unless the files, not yet moved to the destination, read back right."""
    if written.family != OURS:
        # A family's configuration may have no key for dropout or max_len. Whether it describes the
        # model was checked when it was written.
        written = replace(written, config=wanted.config)
    with progress_bar(progress, "checking bits", wanted.tensors.nbytes) as advance:
        require_same(wanted, written, advance)


def _report(
    source: Checkpoint,
    optimizer: Carried,
    target: Target,
    written: _Written,
    verification: dict[str, Any],
    seconds: float,
) -> Report:
    """What was done and what the checks found."""
    values = written.values
    return Report(
        source=source.source,
        destination=str(target.path),
        source_format=source.format,
        destination_format=target.format,
        family=source.family,
        tensors=len(source.tensors),
        nbytes=values.tensors.nbytes,
        dropped=dict(optimizer.dropped),
        optimizer=optimizer.to_dict(),
        adapter=source.adapter,
        folded=dict(source.folded),
        ignored=dict(source.ignored),
        wrappers=list(source.wrappers),
        rounding=values.rounding,
        casts=values.casts,
        nonfinite=values.nonfinite,
        copied=written.copied,
        left_behind=written.left_behind,
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
