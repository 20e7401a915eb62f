"""Hashes of files: SHA-256 names a source, XXH3 tells whether a written file is still whole.

hashlib lets other threads run, so the hashes of the sources cost a core, not time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from alibi_convert.errors import CheckpointError

_READ_BYTES = 2**18


def file_xxh3(path: Path) -> str:
    """The 128-bit XXH3 of a file: as fast as memory; it detects damage, not tampering.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _file_hash(path, xxhash.xxh3_128(), threading.Event())


def _file_hash(path: Path, found: Any, cancelled: threading.Event) -> str:
    """The hash of a file; of its beginning if it is cancelled."""
    try:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(_READ_BYTES)
            while (size := file.readinto(buffer)) and not cancelled.is_set():
                found.update(memoryview(buffer)[:size])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return found.hexdigest()


@contextmanager
def hashing(files: Mapping[str, Path], known: dict[str, str | None]) -> Iterator[Future[None]]:
    """Put the SHA-256 of files into `known`, by name, while the block runs.

    Raises:
        CheckpointError: by the future, if a hash that was known is another one now.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit(_hash_all, files, known, cancelled)
        finally:
            cancelled.set()


def _hash_all(
    files: Mapping[str, Path], known: dict[str, str | None], cancelled: threading.Event
) -> None:
    for name, path in files.items():
        found = _file_hash(path, hashlib.sha256(), cancelled)
        if cancelled.is_set():
            return
        if known.get(name) not in (None, found):
            raise CheckpointError(
                f"{path} has changed since the killed run read it; start anew, without resume "
                "(--resume)"
            )
        known[name] = found
