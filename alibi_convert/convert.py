"""Convert a checkpoint from any format to any other, and show what one holds.

Tensors pass through one by one, a few megabytes at a time where none must be put together: they are
cast, looked at, hashed and written in one pass, then read back and compared in another. Only .pt,
.msgpack and orbax hold the whole model in memory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import require_same
from alibi_convert.destination import building
from alibi_convert.formats import FORMATS, ORBAX_SUFFIX, SUFFIXES_WITH_DIGITS
from alibi_convert.hashing import file_xxh3, hashing
from alibi_convert.layout import companions, copy_companion, left_behind
from alibi_convert.logits import compare_logits
from alibi_convert.progress import progress_bar
from alibi_convert.provenance import restore_neutral_keys, source_files, write_provenance
from alibi_convert.report import Report
from alibi_convert.store import FORMAT, MAX_SHARD_BYTES, parse_size
from alibi_convert.tensors import DTYPES
from alibi_convert.values import Watched, cast
from alibi_spec import ALiBiConfig

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
    destination = Path(os.path.expanduser(destination))
    to = check_target(destination, to, dtype)
    max_shard_bytes = MAX_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size)
    checkpoint = open_checkpoint(source, **reading)
    target = None if dtype is None else DTYPES[dtype]
    meant = replace(checkpoint, tensors=cast(checkpoint.tensors, target))
    nbytes = sum(header.nbytes for header in meant.tensors.headers.values())
    files = source_files(checkpoint.path, reading.get("allow_pt", False))
    task = _task(files, checkpoint.config, to, dtype, max_shard_bytes)
    with building(destination, overwrite, nbytes, task, resume) as (path, journal):
        source_sha256 = journal.notes.setdefault("source_sha256", dict.fromkeys(files))
        with hashing(files, source_sha256) as hashed:
            with progress_bar(
                progress, "reading and writing", nbytes, journal.size(path)
            ) as advance:
                seen = journal.notes.setdefault("seen", {})
                watched = Watched(checkpoint.tensors, target, seen, advance)
                xxh3 = FORMATS[to].write(
                    *(path, checkpoint.config, watched.tensors),
                    max_shard_bytes=max_shard_bytes,
                    journal=journal,
                )
            if strict_values:
                watched.require_finite()
            restore_neutral_keys(path, checkpoint.path, to)
            copied = _copy_companions(checkpoint.path, path)
            logits: dict[str, Any] = {"not_run": "verification was switched off"}
            if verify != "none":
                written = open_checkpoint(path, allow_pt=True)
                _require_written(meant, written, destination, progress)
                if verify == "bits":
                    logits = {"not_run": "only bits were to be verified"}
                elif watched.nonfinite:
                    logits = {"not_run": "NaN or infinity in the weights"}
                else:
                    logits = compare_logits(checkpoint, written, bool(watched.casts), progress)
            hashed.result()
        report = Report(
            source=described(source, checkpoint, reading),
            destination=str(destination),
            source_format=checkpoint.format,
            destination_format=to,
            family=checkpoint.family,
            tensors=len(meant.tensors),
            nbytes=nbytes,
            dropped=dict(checkpoint.derived),
            folded=dict(checkpoint.folded),
            ignored=dict(checkpoint.ignored),
            wrappers=list(checkpoint.wrappers),
            rounding=watched.rounding,
            casts=watched.casts,
            nonfinite=watched.nonfinite,
            copied=copied,
            left_behind=_left_behind(checkpoint.path, files, copied),
            kept=sorted(journal.kept),
            source_sha256=source_sha256,
            destination_xxh3=_all_hashes(path, xxh3),
            verified=verify != "none",
            verification={"bitwise": verify != "none", "logits": logits},
            seconds=time.monotonic() - started,
        )
        if path.is_dir():
            write_provenance(path, report, checkpoint)
    return report


def _require_written(
    meant: Checkpoint, written: Checkpoint, destination: Path, progress: bool
) -> None:
    """What was written, on its way to `destination`, reads back as what was meant."""
    if written.family != FORMAT:
        # It says the same in its own words, and perhaps has none for dropout or max_len; that it
        # says what the model computes was checked when it was written.
        written = replace(written, config=meant.config)
    nbytes = sum(header.nbytes for header in meant.tensors.headers.values())
    with progress_bar(progress, "checking bits", nbytes) as advance:
        require_same(meant, replace(written, path=destination), advance)


def check_target(destination: Path, to: str | None, dtype: str | None) -> str:
    """The format to write; ValueError when it, the dtype or the suffix cannot be."""
    to = _format_of(destination) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not known; expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    if FORMATS[to].suffix != destination.suffix and FORMATS[to].suffix:
        raise ValueError(
            f"{destination} does not end in {FORMATS[to].suffix}, the suffix of format {to}"
        )
    return to


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
        "path": described(path, checkpoint, reading),
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
        "ignored": dict(checkpoint.ignored),
        "wrappers": list(checkpoint.wrappers),
    }


def described(given: str | os.PathLike[str], checkpoint: Checkpoint, reading: Reading) -> str:
    """A source as it was given, or which one it was of several revisions, or steps of orbax."""
    if checkpoint.format == "orbax":
        return str(checkpoint.path)
    revision = reading.get("revision")
    return str(given) if revision is None else f"{given}@{revision}"


def _format_of(destination: Path) -> str:
    # The first of a suffix: a .pt is a state dict of ours unless jaketae's is asked for.
    by_suffix = {kind.suffix: name for name, kind in reversed(FORMATS.items()) if kind.suffix}
    by_suffix[ORBAX_SUFFIX] = "orbax"
    suffix = destination.suffix
    asks_for_format = suffix[1:].isalpha() or suffix.lower() in SUFFIXES_WITH_DIGITS
    if suffix not in by_suffix and asks_for_format:
        raise ValueError(
            f"{destination}: {suffix} is not written; expected {', '.join(sorted(by_suffix))} or a "
            'folder\'s name; to="alibi" (--to alibi) makes a folder of this one'
        )
    return by_suffix.get(suffix, "alibi")


def _task(
    files: Mapping[str, Path],
    config: ALiBiConfig,
    to: str,
    dtype: str | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """What a run must have in common with one that it resumes, as plain JSON values."""
    found = {name: path.stat() for name, path in files.items()}
    task = {
        "source": {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()},
        "config": config.to_dict(),
        "to": to,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    return json.loads(json.dumps(task))


def _copy_companions(source: Path, written: Path) -> list[str]:
    names = companions(source) if source.is_dir() and written.is_dir() else []
    for name in names:
        copy_companion(source, written, name)
    return names


def _left_behind(source: Path, files: Mapping[str, Path], copied: Iterable[str]) -> list[str]:
    return left_behind(source, (*files, *copied)) if source.is_dir() else []


def _all_hashes(written: Path, known: Mapping[str, str]) -> dict[str, str]:
    """The hashes of every file of the destination, of which some are known."""
    root = written if written.is_dir() else written.parent
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return {name: known.get(name) or file_xxh3(root / name) for name in names}
