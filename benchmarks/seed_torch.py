"""One training step of jaketae/alibi's default model, with its own attention and with ours.

Its attention is written down here again from its formulas (SPEC.md §7): one projection for keys,
queries and values, the whole matrix of scores, bias, mask, softmax. All else is the same module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alibi_spec import ALiBiConfig
from alibi_torch import ALiBiTransformer

SEQ = 2048


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
