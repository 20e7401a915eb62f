"""Files from untrusted sources: regular ones, of bounded size, and strict JSON in them.

A pipe never ends, a device may be anything, JSON may say two things under one key, and git-LFS puts
a pointer where it has not fetched a file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from alibi_convert.errors import CheckpointError

MAX_JSON_BYTES = 2**24  # an index of a hundred thousand tensors
_LFS_POINTER = b"version https://git-lfs.github.com/"
_LFS_POINTER_BYTES = 1024  # no pointer is longer


def require_regular(path: Path) -> os.stat_result:
    """The `stat` of a regular file, or of one that a link leads to.

    Raises:
        CheckpointError: there is none, it is something else, or git-LFS has not fetched it.
    """
    with _explained(path):
        if not os.path.exists(path):  # unlike Path.stat, False for names that no file can have
            raise FileNotFoundError
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is {_kind(found.st_mode)}, expected a regular file")
    if found.st_size <= _LFS_POINTER_BYTES and _begins(path, _LFS_POINTER):
        raise CheckpointError(
            f"{path} is a pointer of git-LFS, not the file itself; run `git lfs pull` in "
            f"{path.parent}"
        )
    return found


def _begins(path: Path, start: bytes) -> bool:
    with _explained(path), path.open("rb") as file:
        return file.read(len(start)) == start


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened for reading; errors in the block name it.

    Raises:
        CheckpointError: as for `require_regular`, or it cannot be read.
    """
    require_regular(path)
    with _explained(path), path.open("rb") as file:
        yield file


def read_whole(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The contents of a small regular file.

    Raises:
        CheckpointError: as for `open_regular`, or it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        contents = file.read(max_bytes + 1)
    if len(contents) > max_bytes:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes; expected at most {max_bytes:,}"
        )
    return contents


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
    """A JSON object; `origin` names it in errors.

    Raises:
        CheckpointError: not a JSON object, or one that says two things under one key.
    """
    try:
        values = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd nesting
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{origin} holds a JSON {type(values).__name__}, expected an object")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file; one that cannot be read, or is huge, is a CheckpointError too."""
    return parse_json(read_whole(path), str(path))


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs; ValueError where two have one key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r}; one of the two must go")
    return values


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for holds, name in kinds.items() if holds(mode)), "no file")
