"""One training step of jaketae/alibi's default model, with its own attention and with ours.

`python -m benchmarks.seed_torch` says how fast both are and what memory they need (two minutes).

Its attention is written down here again from its formulas (SPEC.md §7): one projection for keys,
queries and values, the whole matrix of scores, bias, mask, softmax. All else is the same module.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from alibi_spec import ALiBiConfig
from alibi_torch import ALiBiTransformer
from benchmarks.compare import goals, write
from benchmarks.memory import peak_of_process, print_peak

RESULTS = Path(__file__).parent / "results" / "seed_torch.json"
SEQ = 2048
ROUNDS = 7


class SeedAttention(nn.Module):
    """Causal attention as the seed computes it."""

    def __init__(self, config: ALiBiConfig, seq: int) -> None:
        super().__init__()
        self.heads, self.scale = config.num_heads, math.sqrt(config.d_model)
        self.kqv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        position = torch.arange(seq)
        self.register_buffer("distance", (position[None, :] - position[:, None]).float())
        self.register_buffer("mask", torch.ones(seq, seq).tril())

    def forward(self, x: Tensor, slopes: Tensor, _mask: None = None) -> Tensor:
        """[batch, seq, d_model], before and after."""
        key, query, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.kqv(x).chunk(3, dim=-1)
        )
        score = query @ key.mT / self.scale + slopes[:, None, None] * self.distance
        score = score.masked_fill(self.mask == 0, -torch.inf)
        return (score.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def training_step(attention: str, seq: int = SEQ) -> Callable[[], float]:
    """A step, "seed" or "ours", that returns its seconds: forward, backward, and Adam's update."""
    config, generator = ALiBiConfig.jaketae(), torch.Generator().manual_seed(0)
    model = ALiBiTransformer(config)
    if attention == "seed":
        for layer in model.layers:
            layer.attn = SeedAttention(config, seq)
    optimizer = torch.optim.Adam(model.parameters())
    x, target = torch.randn(2, 1, seq, config.d_model, generator=generator)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def profile(step: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of one step by operator, the longest ones, calls within not counted twice."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total / 1e3 for event in events[:12]}


def main() -> int:
    """Measure, print and write the results."""
    if sys.argv[1:2] == ["--peak-of"]:
        step = training_step(sys.argv[2])
        print_peak(lambda: step)  # the model is no part of it
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    steps = {attention: training_step(attention) for attention in ("seed", "ours")}
    raw: dict[str, list[float]] = {attention: [] for attention in steps}
    for number in range(ROUNDS + 1):
        for attention, step in steps.items():
            seconds = step()
            if number > 0:  # the first round loads and fills
                raw[attention].append(seconds)
    found = {
        attention: {
            "seconds": statistics.median(raw[attention]),
            "raw": raw[attention],
            "peak_extra_bytes": peak_of_process("benchmarks.seed_torch", attention),
            "milliseconds_by_operator": profile(step),
        }
        for attention, step in steps.items()
    }

    def saving(what: str) -> float:
        return found["seed"][what] / found["ours"][what]

    wanted: list[tuple[str, float | None, str, float]] = [
        ("training step, speed, N=2048", saving("seconds"), ">=", 5),
        ("training step, memory, N=2048", saving("peak_extra_bytes"), ">=", 5),
    ]
    versions = {name: importlib.metadata.version(name) for name in ("alibi-duo", "torch")}
    results = {
        "versions": {"python": platform.python_version()} | versions,
        "threads": torch.get_num_threads(),
        "model": {"seq": SEQ} | ALiBiConfig.jaketae().to_dict(),
        "goals": goals(wanted),
        "training_step": found,
    }
    write(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
