"""A destination that appears whole or not at all: built next to it, flushed, renamed.

For `model` all work happens in `.model.partial/`: `new/model` is being written, `journal.json`
says how far it got, and `replaced/model` is, between two renames, what was there before. A run
that fails removes the folder; one that is killed leaves it for the next run to resume or remove;
one that is interrupted leaves what it finished.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.machine import free_bytes
from alibi_convert.writing.journal import Journal
from alibi_convert.writing.layout import is_checkpoint_file, sidecar

_NEW, _REPLACED, _JOURNAL = "new", "replaced", "journal.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def replacing(
    destination: Path, overwrite: bool = False, nbytes: int = 0, kept: Collection[str] = ()
) -> Iterator[Path]:
    """A path to write to that becomes `destination` if the block succeeds, and vanishes if not.

    Files written next to it move along. The old checkpoint comes back if anything fails.

    Args:
        destination: a path that does not exist yet, or see `overwrite`.
        overwrite: replace a checkpoint that is there.
        nbytes: what will be written at least; checked against the free space first.
        kept: names of other files in the folder that is there, which the block brings along.

    Raises:
        CheckpointError: the destination exists and `overwrite` is False; it is a folder with
            files that are not a checkpoint's; the disk is full or may not be written; or another
            run is writing the same destination.
    """
    with building(destination, overwrite, nbytes, kept=kept) as (path, _):
        yield path


@contextmanager
def building(
    destination: Path,
    overwrite: bool = False,
    nbytes: int = 0,
    task: Mapping[str, Any] | None = None,
    resume: bool = False,
    kept: Collection[str] = (),
) -> Iterator[tuple[Path, Journal]]:
    """`replacing` for work that can be resumed: the path to write to, and the journal.

    Args:
        destination, overwrite, nbytes, kept: as for `replacing`.
        task: what is being done, for the journal; a run resumes only the same task.
        resume: keep the files that a killed run finished, instead of starting anew.

    Raises:
        CheckpointError: as for `replacing`; or the killed run was doing something else.
        KeyboardInterrupt: with the advice to resume, where the journal knows of finished files.
    """
    destination = Path(os.path.expanduser(destination)).resolve()
    partial = destination.with_name(f".{destination.name}.partial")
    new_parents = [parent for parent in destination.parents if not parent.exists()]
    with _explained(destination, nbytes):
        _undo_killed_swap(partial, destination)
        check_destination(destination, overwrite, kept)
        _require_space(destination, partial, nbytes)
        try:
            with _locked(partial):
                journal = _start(partial, destination.name, task or {}, resume)
                is_kept = False
                try:
                    path = partial / _NEW / destination.name
                    yield path, journal
                    _flush(partial / _NEW, *(partial / _NEW).rglob("*"))
                    _move_into_place(path, destination, overwrite, kept)
                except KeyboardInterrupt:
                    is_kept = task is not None and bool(journal.files)
                    if not is_kept:
                        raise
                    _remove_unfinished(partial, destination.name, journal)
                    raise KeyboardInterrupt("`--resume` goes on") from None
                finally:
                    if not is_kept:
                        shutil.rmtree(partial)
        except BaseException:
            for parent in new_parents:
                with suppress(OSError):  # never made, or in use by another process
                    parent.rmdir()
            raise


def check_destination(destination: Path, overwrite: bool, kept: Collection[str] = ()) -> None:
    """Raise CheckpointError unless a checkpoint may be written here: see `replacing`."""
    if destination.is_dir():
        contents = sorted(destination.iterdir())
        others = (path for path in contents if path.name not in kept)
        foreign = [path.name for path in others if not is_checkpoint_file(path)]
        if foreign:
            raise CheckpointError(
                f"{destination} holds other files ({', '.join(foreign[:4])}); choose another folder"
            )
        if not contents:
            return
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination} exists; choose another name or pass overwrite=True (--overwrite)"
        )


@contextmanager
def _explained(destination: Path, nbytes: int) -> Iterator[None]:
    """Errors of the disk as CheckpointErrors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise CheckpointError(_no_space(destination, nbytes, error.strerror)) from error
        if error.errno in _NO_PERMISSION:
            raise CheckpointError(
                f"{destination} cannot be written: {error.strerror} ({error.filename}); choose a "
                "folder that you may write to"
            ) from error
        raise


def _require_space(destination: Path, partial: Path, nbytes: int) -> None:
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = free_bytes(destination)
    if free is not None and nbytes - there > free:
        raise CheckpointError(_no_space(destination, nbytes - there, "the disk is too full"))


def _no_space(destination: Path, nbytes: int, cause: str | None) -> str:
    needed = f"{nbytes:,} bytes are needed" if nbytes > 0 else "more space is needed"
    free = free_bytes(destination)
    known = "" if free is None else f", {free:,} are free"
    return (
        f"{destination} cannot be written: {cause}; {needed}{known}; make room or choose another "
        "disk"
    )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the folder, and be the only process that works in it."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{partial.parent} cannot be written: {error.strerror} ({error.filename}); choose a "
            "folder that you may write to"
        ) from error
    known = (_NEW, _REPLACED, _JOURNAL, f"{_JOURNAL}.new")
    others = sorted(path.name for path in partial.iterdir() if path.name not in known)
    if others:
        raise CheckpointError(
            f"{partial} holds other files ({', '.join(others[:4])}); move them elsewhere"
        )
    folder = os.open(partial, os.O_RDONLY)
    try:
        _lock(partial, folder)
        yield
    finally:
        os.close(folder)


def _lock(partial: Path, folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process that held the lock a moment ago may have removed the folder that was opened.
        if not (partial.exists() and os.path.samestat(os.fstat(folder), partial.stat())):
            raise BlockingIOError
    except BlockingIOError:
        destination = partial.with_name(partial.name[1:].removesuffix(".partial"))
        raise CheckpointError(
            f"another run is writing {destination}; wait for it or choose another name"
        ) from None


def _start(partial: Path, name: str, task: Mapping[str, Any], resume: bool) -> Journal:
    """An empty workplace, or one with only the files that a killed run finished."""
    if resume and (partial / _JOURNAL).exists():
        journal = Journal.resumed(partial / _JOURNAL, task)
    else:
        journal = Journal(partial / _JOURNAL, task)
    (partial / _NEW).mkdir(exist_ok=True)
    _remove_unfinished(partial, name, journal)
    journal.save()
    return journal


def _remove_unfinished(partial: Path, name: str, journal: Journal) -> None:
    """Leave the journal and the files that it knows to be finished."""
    kept = {partial / _NEW / name / file for file in journal.files}
    kept |= {partial / _NEW, partial / _JOURNAL}
    for path in sorted(partial.rglob("*"), reverse=True):  # what a folder holds, then the folder
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it holds what is kept
                path.rmdir()
        else:
            path.unlink()


def _flush(*paths: Path) -> None:
    """Onto the disk, before a rename says that it is there."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(path: Path, destination: Path, overwrite: bool, kept: Collection[str]) -> None:
    companions = [each for each in path.parent.iterdir() if each != path]
    targets = {each: destination.with_name(each.name) for each in (*companions, path)}
    # The old file's configuration is not that of the new one.
    old = sidecar(destination)
    stale = [old] if path.is_file() and old.exists() and old not in targets.values() else []
    for target in (*targets.values(), *stale):
        check_destination(target, overwrite, kept)
    replaced = path.parent.with_name(_REPLACED)
    replaced.mkdir()
    try:
        for each in stale:
            os.replace(each, replaced / each.name)
        for each, target in targets.items():
            if target.exists():
                os.replace(target, replaced / target.name)
            os.replace(each, target)
        _flush(destination.parent)
    except BaseException:
        for each, target in targets.items():
            if not each.exists():  # it had moved already
                os.replace(target, each)
        for each in replaced.iterdir():
            os.replace(each, destination.with_name(each.name))
        raise


def _undo_killed_swap(partial: Path, destination: Path) -> None:
    """Bring back the files of a run that was killed between two renames."""
    if not (partial / _REPLACED).is_dir():
        return
    with _locked(partial):
        if (partial / _NEW / destination.name).exists():  # it moves last
            for path in (partial / _REPLACED).iterdir():
                os.replace(path, destination.with_name(path.name))
