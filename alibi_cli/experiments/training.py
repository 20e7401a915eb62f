"""How experiments train their models: all of them alike, in PyTorch, one process per core.

Models this small are slower on several threads, above all on a busy machine.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from alibi_cli.experiments.torch_models import new_model
from alibi_spec import ALiBiConfig
from alibi_torch import ALiBiLM

WARMUP = 0.1  # of all steps

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Attributes:
        positions: of `positions.py`.
        seed: of its initial weights and of the excerpts of the text.
        learning_rate: the highest, after warm-up.
        config: of the ALiBi model; the others differ in their positions. Its `max_len` is the
            length of a sequence.
        steps: of the optimizer.
        batch: sequences per step.
    """

    positions: str
    seed: int
    learning_rate: float
    config: ALiBiConfig
    steps: int
    batch: int


def trained(training: Training, documents: Sequence[np.ndarray], device: str = "cpu") -> ALiBiLM:
    """A model trained on random excerpts of documents: AdamW, warm-up, cosine decay.

    A seed draws the same excerpts, in the same order, for every kind of positions. No excerpt
    reaches over the end of a document.

    Args:
        documents: bytes, uint8; those that are shorter than an excerpt are left out.

    Raises:
        ValueError: all are shorter.
    """
    torch.manual_seed(training.seed)
    model = new_model(training.config, training.positions).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _decayed(step, training.steps)
    )
    batches = _batches(training, documents)
    for _ in range(training.steps):
        tokens = torch.from_numpy(next(batches)).to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def trained_weights(job: tuple[Training, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """The state_dict of a trained model as arrays, which pass between processes."""
    return {name: tensor.numpy() for name, tensor in trained(*job).state_dict().items()}


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """The results of a function of a module, in order; how many processes changes none of them."""
    processes = min(processes, len(jobs))
    if processes == 1:
        with _one_thread():
            yield from map(function, jobs)
    else:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(processes, _start_worker) as pool:  # leaving it ends the processes
            yield from pool.imap(function, jobs, chunksize=1)


def _batches(training: Training, documents: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Excerpts of the documents, every place as likely as any other, [batch, max_len + 1]."""
    length = training.config.max_len
    long = [each for each in documents if len(each) > length]
    if not long:
        raise ValueError(f"no document has the {length + 1} bytes of an excerpt")
    places = np.array([len(each) - length for each in long])
    ends = np.cumsum(places)
    rng = np.random.default_rng(training.seed)
    while True:
        drawn = rng.integers(0, ends[-1], training.batch)
        numbers = np.searchsorted(ends, drawn, side="right")
        starts = drawn - (ends - places)[numbers]
        excerpts = [
            long[number][start : start + length + 1]
            for number, start in zip(numbers, starts, strict=True)
        ]
        yield np.stack(excerpts).astype(np.int64)


def _decayed(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warmup = max(1, int(steps * WARMUP))
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def _start_worker() -> None:
    """Use one thread; ignore Ctrl-C, on which the parent process ends this one."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
