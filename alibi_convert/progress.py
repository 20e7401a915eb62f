"""How far a long run has got, in bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]  # is told the bytes that are done


def ignore(_: int) -> None:
    """Nobody is watching."""


@contextmanager
def progress_bar(shown: bool, title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Bytes, rate and time left on the standard error stream, if it is to be shown."""
    if not shown:
        yield ignore
        return
    from tqdm import tqdm

    with tqdm(
        *(None, title, total),
        initial=done,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        lock = threading.Lock()

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance
