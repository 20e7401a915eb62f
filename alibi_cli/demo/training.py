"""How the demo trains its models: all of them alike, in PyTorch, one process per core.

Models this small are slower on several threads, above all on a busy machine.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import alibi_torch
from alibi_cli.demo.positions import ALIBI, ROTARY, SINUSOIDAL, torch_logits, torch_model
from alibi_spec import ALiBiConfig

# The best of `benchmarks.demo_rates`, by the loss at the training length.
LEARNING_RATES = {ALIBI: 1.2e-2, ROTARY: 3e-3, SINUSOIDAL: 6e-3}
WARMUP = 0.1  # of all steps


@dataclass(frozen=True)
class Training:
    """The options that all models share.

    Attributes:
        config: of the ALiBi model; the others differ in their positions.
        text: bytes to learn from.
        steps: of the optimizer.
        batch: sequences of `max_len` bytes per step.
    """

    config: ALiBiConfig
    text: np.ndarray
    steps: int
    batch: int


@dataclass(frozen=True)
class Task:
    """One model to train.

    Attributes:
        positions: "ALiBi", "rotary" or "sinusoidal".
        seed: of its initial weights and of the excerpts of the text.
        learning_rate: the highest, after warm-up.
    """

    positions: str
    seed: int
    learning_rate: float


def train(training: Training, tasks: Sequence[Task], processes: int) -> list[alibi_torch.ALiBiLM]:
    """The models of all tasks; the number of processes changes no bit of them."""
    jobs = [(training, task) for task in tasks]
    processes = min(processes, len(jobs))
    if processes == 1:
        with _one_thread():
            weights = list(_shown(map(_weights, jobs), len(jobs)))
    else:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(processes, _start_worker) as pool:  # leaving it ends the processes
            weights = list(_shown(pool.imap(_weights, jobs, chunksize=1), len(jobs)))
    models = []
    for task, arrays in zip(tasks, weights, strict=True):
        model = torch_model(training.config, task.positions)
        model.load_state_dict({name: torch.from_numpy(each) for name, each in arrays.items()})
        models.append(model.eval())
    return models


def _weights(job: tuple[Training, Task]) -> dict[str, np.ndarray]:
    """A model trained on random excerpts of the text: AdamW, warm-up, cosine decay.

    A seed draws the same excerpts, in the same order, for every kind of positions.
    """
    training, task = job
    length = training.config.max_len
    torch.manual_seed(task.seed)
    rng = np.random.default_rng(task.seed)
    model = torch_model(training.config, task.positions).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _decayed(step, training.steps)
    )
    for _ in range(training.steps):
        starts = rng.integers(0, len(training.text) - length, training.batch)
        excerpts = np.stack([training.text[start : start + length + 1] for start in starts])
        tokens = torch.from_numpy(excerpts)
        logits = torch_logits(model, tokens[:, :-1], task.positions)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _decayed(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warmup = max(1, int(steps * WARMUP))
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def _shown(weights: Iterator[dict[str, np.ndarray]], count: int) -> Iterator[dict[str, np.ndarray]]:
    return iter(tqdm(weights, total=count, unit="model"))


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
