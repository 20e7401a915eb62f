"""Threads that share out the tiles of one call. Each computes with one thread of torch's own.

Left to itself, torch shares out every single operator among its threads and waits for the slowest,
hundreds of times in one call. Where other programs run too, each of these meetings can take ten
milliseconds. These threads take one tile after another and meet once.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar

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
    leaders, workers = _team_of(threads)

    def results(
        compute: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        return _ahead(workers, threads, compute, items)

    return leaders.submit(function, results).result()


def _one_by_one(
    compute: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    return ((item, compute(item)) for item in items)


def _ahead(
    workers: _Pool, count: int, compute: Callable[[Item], Result], items: Iterable[Item]
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


class _Pool:
    """Threads that take tasks from one queue.

    They are daemons, so that they still serve a thread that outlives the main one.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None] = SimpleQueue()

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        """What `function` of `item` will be."""
        future: Future[Result] = Future()
        self._tasks.put((future, function, item))
        return future

    def grow(self, size: int) -> bool:
        """Have at least so many threads, all of which have begun; whether that took new ones."""
        missing = max(0, size - len(self._threads))
        ready = threading.Barrier(missing + 1)
        for _ in range(missing):
            self._threads.append(threading.Thread(target=self._work, args=(ready,), daemon=True))
            self._threads[-1].start()
        ready.wait()
        return missing > 0

    def end(self) -> None:
        """Let the threads finish what they were asked for."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, ready: threading.Barrier) -> None:
        # What is set here is set for this thread.
        torch.get_num_threads()  # the first question makes it take everybody's number
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()
        while (task := self._tasks.get()) is not None:
            _perform(*task)
            del task  # or its arrays stay until the next one


def _perform(future: Future[Result], function: Callable[[Item], Result], item: Item) -> None:
    try:
        future.set_result(function(item))
    except BaseException as error:  # raised again where the result is asked for
        future.set_exception(error)


# Leaders wait for workers, who wait for nobody: many calls at once cannot block each other.
_leaders, _workers = _Pool(), _Pool()
_lock = threading.Lock()


def _team_of(threads: int) -> tuple[_Pool, _Pool]:
    """At least so many leaders and so many workers."""
    with _lock:
        if _leaders.grow(threads) | _workers.grow(threads):
            # A thread that begins later takes the number that was set last.
            torch.set_num_threads(threads)
        return _leaders, _workers


def _forget() -> None:
    """A forked process has none of these threads."""
    global _leaders, _workers, _lock
    _leaders, _workers, _lock = _Pool(), _Pool(), threading.Lock()


def _end() -> None:
    """Python would cut off daemons in the middle of torch; by now no other thread is left."""
    _leaders.end()
    _workers.end()
    _forget()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
