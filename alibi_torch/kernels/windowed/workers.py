"""Threads that divide the tiles of one call. Each computes with one thread of torch's own.

By default torch divides every single operator among its threads and waits for the slowest, hundreds
of times in one call. On a busy machine each wait can take ten milliseconds. These threads take one
tile after another and wait once.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from alibi_torch.kernels.call import without_autocast

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Threads that take tasks from one queue.

    They are daemons, so that they still serve a thread that outlives the main one.
    """

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None] = SimpleQueue()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """The future result of `function(*arguments)`."""
        future: Future[Result] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def grow(self, size: int) -> bool:
        """Have at least `size` threads, all started; return whether some are new."""
        missing = max(0, size - len(self.threads))
        ready = threading.Barrier(missing + 1)
        for _ in range(missing):
            self.threads.append(threading.Thread(target=self._work, args=(ready,), daemon=True))
            self.threads[-1].start()
        ready.wait()
        return missing > 0

    def end(self) -> None:
        """Let the threads finish what they were asked for."""
        for _ in self.threads:
            self._tasks.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self, ready: threading.Barrier) -> None:
        # These settings are those of one thread.
        torch.get_num_threads()  # the first call makes it take the process's number
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()
        while (task := self._tasks.get()) is not None:
            _perform(*task)
            del task  # frees its arrays before the wait for the next one


def _perform(
    future: Future[Result], function: Callable[..., Result], arguments: tuple[Any, ...]
) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # raised again where the result is asked for
        future.set_exception(error)


@dataclass(frozen=True)
class Team:
    """The threads of one call: a leader and workers, or only the calling thread.

    They record no gradients, and autocast is off.
    """

    device: torch.device
    size: int
    leaders: Pool | None
    workers: Pool | None

    @classmethod
    def of(cls, device: torch.device) -> Team:
        """As many workers as torch has threads on this device; none if it has one."""
        size = torch.get_num_threads()
        if device.type != "cpu" or size == 1 or not _has_own_counts():
            return cls(device, 1, None, None)
        return cls(device, size, *_pools(size))

    def lead(self, function: Callable[[], Result]) -> Result:
        """The result of `function` in the thread of a leader."""
        if self.leaders is not None:
            return self.leaders.submit(function).result()
        with torch.no_grad(), without_autocast(self.device):
            return function()

    def each(
        self, compute: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Every item with its result, in order, by the workers.

        Only a few more are computed than have been taken, so that few results wait in memory.
        """
        if self.workers is None:
            yield from ((item, compute(item)) for item in items)
            return
        begun: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            begun.append((item, self.workers.submit(compute, item)))
            if len(begun) > self.size:
                item, future = begun.popleft()
                yield item, future.result()
        for item, future in begun:
            yield item, future.result()


@cache
def _has_own_counts() -> bool:
    """Whether each thread has its own thread count: with OpenMP, not with one common pool."""
    return "backend: OpenMP" in torch.__config__.parallel_info()


# Leaders wait for workers, and workers for nothing: concurrent calls cannot deadlock.
_leaders, _workers = Pool(), Pool()
_lock = threading.Lock()


def _pools(size: int) -> tuple[Pool, Pool]:
    """Pools of at least `size` leaders and `size` workers."""
    with _lock:
        _register_hooks()
        if _leaders.grow(size) | _workers.grow(size):
            # Later threads take the number that was set last: the workers set 1.
            torch.set_num_threads(size)
        return _leaders, _workers


@cache  # once for a process and its children
def _register_hooks() -> None:
    atexit.register(_end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """A forked process has none of these threads."""
    global _leaders, _workers, _lock
    _leaders, _workers, _lock = Pool(), Pool(), threading.Lock()


def _end() -> None:
    """Python would kill daemons inside torch. By now no other thread is left that needs them."""
    _leaders.end()
    _workers.end()
    _forget()
