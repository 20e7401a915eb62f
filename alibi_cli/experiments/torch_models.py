"""Models with any positions in PyTorch, and how well they predict a text."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from alibi_cli.experiments.positions import (
    LEARNED,
    ROTARY,
    SINUSOIDAL,
    config_for,
    sinusoids,
    turn,
)
from alibi_spec import ALiBiConfig
from alibi_spec.scoring import score_windows
from alibi_torch import ALiBiLM, token_log_probabilities

READ_TOGETHER = 2**15  # tokens, so that memory is bounded


def new_model(config: ALiBiConfig, positions: str) -> ALiBiLM:
    """A model of random weights, with its positions.

    Args:
        config: of the ALiBi model. Learned positions are as many as its `max_len`.
    """
    model = ALiBiLM(config_for(positions, config))
    if positions == SINUSOIDAL:
        model.transformer.register_forward_pre_hook(_with_sinusoids)
    if positions == LEARNED:
        vectors = nn.Embedding(config.max_len, config.d_model)
        nn.init.normal_(vectors.weight, std=config.init_std)
        model.positions = vectors
        model.transformer.register_forward_pre_hook(partial(_with_learned, vectors))
    if positions == ROTARY:
        for name, module in model.named_modules():
            if name.endswith((".attn.query", ".attn.key")):
                module.register_forward_hook(partial(_turned, config))
    return model


@torch.inference_mode()
def bits_per_byte(model: ALiBiLM, excerpts: np.ndarray, length: int, stride: int) -> float:
    """Mean loss of the bytes of excerpts, [excerpts, bytes + 1], after the first of each.

    Args:
        length: of the sequences that are read.
        stride: from one sequence to the next: `length`, or less where they overlap
            (`score_windows`).
    """
    device = next(model.parameters()).device
    total = 0.0
    for window in score_windows(excerpts.shape[1], length, stride):
        sequences = torch.from_numpy(excerpts[:, window.start : window.end + 1]).to(device)
        for part in sequences.split(max(1, READ_TOGETHER // sequences.shape[1])):
            found = token_log_probabilities(model, part)[:, window.first - window.start - 1 :]
            total -= float(found.double().sum())
    return total / math.log(2) / (len(excerpts) * (excerpts.shape[1] - 1))


def _with_sinusoids(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x, *others = inputs
    added = torch.from_numpy(sinusoids(x.shape[1], module.config.d_model)).to(x.device)
    return (x + added, *others)


def _with_learned(
    vectors: nn.Embedding, _module: Any, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    x, *others = inputs
    return (x + vectors.weight[: x.shape[1]], *others)


def _turned(config: ALiBiConfig, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Queries or keys, [batch, seq, embed], turned by their positions."""
    batch, seq, _ = output.shape
    heads = output.view(batch, seq, config.num_heads, config.head_dim)
    cos, sin = (torch.from_numpy(part).to(output) for part in turn(seq, config.head_dim))
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).flatten(2)
