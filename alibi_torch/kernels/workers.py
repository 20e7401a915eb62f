"""Threads that share out the tiles of one call. Each computes with one thread of torch's own.

Left to itself, torch shares out every single operator among its threads and waits for the slowest,
hundreds of times in one call. Where other programs run too, each of these meetings can take ten
milliseconds. These threads take one tile after another and meet once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Results = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[tuple[Item, Result]]]

# Another backend has one pool for all threads, which a thread cannot leave.
_HAS_OWN_COUNTS = "backend: OpenMP" in torch.__config__.parallel_info()


def with_workers(device: torch.device, function: Callable[[Results], Result]) -> Result:
    """What `function` returns, given a way to compute many things at once.

    That way takes a function and items, and gives every item with its result, in order. Only a few
    more are computed than have been taken. No gradients are recorded, and autocast is off.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not _HAS_OWN_COUNTS:
        with torch.no_grad(), _without_autocast(device):
            return function(_one_by_one)
    team = _team_of(threads)

    def results(
        compute: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        return _ahead(team.workers, threads, compute, items)

    return team.leaders.submit(function, results).result()


def _one_by_one(
    compute: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    return ((item, compute(item)) for item in items)


def _ahead(
    workers: Executor, count: int, compute: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    begun: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        begun.append((item, workers.submit(compute, item)))
        if len(begun) > count:
            item, future = begun.popleft()
            yield item, future.result()
    for item, future in begun:
        yield item, future.result()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would narrow the products of float32 inputs. Meta tensors know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class _Team:
    """Leaders wait for workers, who wait for nobody: many calls at once cannot block each other."""

    size: int
    leaders: Executor
    workers: Executor


_teams: list[_Team] = []
_lock = threading.Lock()


def _team_of(threads: int) -> _Team:
    """A team of at least so many workers; the last one that was made, if it is large enough."""
    with _lock:
        if not _teams or _teams[-1].size < threads:
            _teams[:] = [_Team(threads, _pool(threads), _pool(threads))]
            # A thread that begins later takes the number that was set last.
            torch.set_num_threads(threads)
        return _teams[-1]


def _pool(size: int) -> Executor:
    """Threads, all of which have begun."""
    ready = threading.Barrier(size + 1)

    def begin() -> None:  # what is set here is set for this thread
        torch.get_num_threads()  # the first question makes it take everybody's number
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()

    pool = ThreadPoolExecutor(size, thread_name_prefix="alibi_torch")
    for _ in range(size):
        pool.submit(begin)
    ready.wait()
    return pool


def _forget() -> None:
    """A forked process has none of these threads."""
    global _lock
    _lock = threading.Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
