"""Training steps of default models: jaketae/alibi's and ours, and ours without dropout.

`python -m benchmarks.training_torch` says how fast they are and what memory they need: two minutes.

jaketae/alibi's model ("seed") is run with its own attention and with ours; our default model, which
drops probabilities, and the same model without that. The seed's attention is implemented here from
its formulas (SPEC.md §7): one projection for keys, queries and values, the whole matrix of scores,
bias, mask, softmax. The rest is the same module.
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
from typing import Any

import torch
from torch import Tensor, nn

from alibi_spec import ALiBiConfig, model_slopes
from alibi_torch import ALiBiTransformer
from benchmarks.compare import goals, write
from benchmarks.memory import peak_of_process, print_peak

RESULTS = Path(__file__).parent / "results" / "training_torch.json"
SEQ, LONG, LONGEST = 2048, 4096, 16_384
ROUNDS = 7
# Steps by name: the model, and the length at which it is timed.
STEPS = {
    "seed": (ALiBiConfig.jaketae(), SEQ),
    "ours": (ALiBiConfig.jaketae(), SEQ),
    "no dropout on probabilities": (ALiBiConfig(attention_dropout=0.0), LONG),
    "dropout on probabilities": (ALiBiConfig(), LONG),
}


class SeedAttention(nn.Module):
    """Causal attention as the seed computes it."""

    def __init__(self, config: ALiBiConfig, seq: int) -> None:
        super().__init__()
        self.heads, self.scale = config.num_heads, math.sqrt(config.d_model)
        self.kqv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.register_buffer("slopes", torch.from_numpy(model_slopes(config)[0]))
        position = torch.arange(seq)
        self.register_buffer("distance", (position[None, :] - position[:, None]).float())
        self.register_buffer("mask", torch.ones(seq, seq).tril())

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """[batch, seq, d_model], before and after."""
        key, query, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.kqv(x).chunk(3, dim=-1)
        )
        score = query @ key.mT / self.scale + self.slopes[:, None, None] * self.distance
        score = score.masked_fill(self.mask == 0, -torch.inf)
        return (score.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def training_step(name: str, seq: int) -> Callable[[], float]:
    """One of `STEPS` that returns its seconds: forward, backward, and Adam's update."""
    (config, _), generator = STEPS[name], torch.Generator().manual_seed(0)
    model = ALiBiTransformer(config)
    if name == "seed":
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


def peak(name: str, seq: int) -> int:
    """The bytes that a step of this length adds at its peak."""
    return peak_of_process("benchmarks.training_torch", name, str(seq))


def profile(step: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of one step by operator, the longest ones, calls within not counted twice."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total / 1e3 for event in events[:12]}


def main() -> int:
    """Measure, print and write the results."""
    if sys.argv[1:2] == ["--peak-of"]:
        step = training_step(sys.argv[2], int(sys.argv[3]))
        print_peak(lambda: step)  # the model is no part of it
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    steps = {name: training_step(name, seq) for name, (_, seq) in STEPS.items()}
    raw: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            seconds = step()
            if number > 0:  # the first round loads and fills
                raw[name].append(seconds)
    found = {
        name: {
            "seq": STEPS[name][1],
            "seconds": statistics.median(raw[name]),
            "raw": raw[name],
            "peak_extra_bytes": peak(name, STEPS[name][1]),
            "milliseconds_by_operator": profile(step),
        }
        for name, step in steps.items()
    }
    dropped, whole = "dropout on probabilities", "no dropout on probabilities"
    found[dropped]["peak_extra_bytes_longest"] = peak(dropped, LONGEST)

    def ratio(what: str, name: str, other: str) -> float:
        return found[name][what] / found[other][what]

    growth = found[dropped]["peak_extra_bytes_longest"] / found[dropped]["peak_extra_bytes"]
    wanted: list[tuple[str, float | None, str, float]] = [
        ("training step, speed, N=2048", ratio("seconds", "seed", "ours"), ">=", 5),
        ("training step, memory, N=2048", ratio("peak_extra_bytes", "seed", "ours"), ">=", 5),
        ("dropout on probabilities, time, N=4096", ratio("seconds", dropped, whole), "<=", 1.6),
        ("dropout on probabilities, memory, 4k -> 16k", growth, "<=", 4.2),
    ]
    versions = {name: importlib.metadata.version(name) for name in ("alibi-duo", "torch")}
    results = {
        "versions": {"python": platform.python_version()} | versions,
        "threads": torch.get_num_threads(),
        "models": {name: config.to_dict() for name, (config, _) in STEPS.items()},
        "goals": goals(wanted),
        "training_step": found,
    }
    write(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
