"""How far a long operation has got: in bytes, or by the name of the step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]  # is told the bytes that are done
Begin = Callable[[str], object]  # is told the step that begins


def ignore(_: int | str) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(
    shown: bool, title: str, total: int, done: int = 0, unit: str = "B"
) -> Iterator[Advance]:
    """Bytes (or `unit`), rate and time left on the standard error stream, if it is to be shown."""
    if not shown:
        yield ignore
        return
    from tqdm import tqdm

    with tqdm(
        *(None, title, total),
        initial=done,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        lock = threading.Lock()

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance


@contextmanager
def progress_steps(shown: bool, title: str) -> Iterator[Begin]:
    """The step that is being taken on the standard error stream, if it is to be shown."""
    if not shown:
        yield ignore
        return
    from tqdm import tqdm

    with tqdm(desc=title, bar_format="{desc} [{elapsed}]", file=sys.stderr) as line:
        yield lambda step: line.set_description_str(f"{title}: {step}")
        line.set_description_str(title)
