"""SHA-256 beside the work: hashlib lets other threads run, so hashes cost a core, not time."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from alibi_convert.errors import CheckpointError

_WAITING = 32  # chunks that may queue up behind the hash
_READ_BYTES = 2**20


class StreamHash:
    """The hash of a stream, one thread behind its writer."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> StreamHash:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, data: bytes | memoryview) -> None:
        """Bytes that nobody changes any more; waits while too many are queued."""
        if len(self._waiting) == _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._hash.update, data))

    def hexdigest(self) -> str:
        """The hash of everything so far."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.hexdigest()


def file_sha256(path: Path, cancelled: threading.Event | None = None) -> str:
    """The hash of a file; of its beginning if it is cancelled.

    Raises:
        CheckpointError: the file cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(_READ_BYTES)
            while (size := file.readinto(buffer)) and not (cancelled and cancelled.is_set()):
                found.update(memoryview(buffer)[:size])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return found.hexdigest()


@contextmanager
def hashing(files: Mapping[str, Path], known: dict[str, str | None]) -> Iterator[Future[None]]:
    """Put the hashes of files into `known`, by name, while the block runs.

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
        found = file_sha256(path, cancelled)
        if cancelled.is_set():
            return
        if known.get(name) not in (None, found):
            raise CheckpointError(
                f"{path} has changed since the killed run read it; start anew, without resume "
                "(--resume)"
            )
        known[name] = found
