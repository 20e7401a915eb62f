"""The measurement of the demo: held-out bits per byte in both backends, at several lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

import alibi_flax
import alibi_torch
from alibi_cli.demo.positions import config_for, flax_logits, torch_logits
from alibi_spec import ALiBiConfig


def in_torch(
    model: alibi_torch.ALiBiLM, positions: str, text: np.ndarray, lengths: Sequence[int]
) -> list[float]:
    """Loss on the same text, cut into sequences of each length, in PyTorch."""
    results = []
    for length in lengths:
        inputs, targets = (torch.from_numpy(part) for part in _cut(text, length))
        with torch.inference_mode():
            logits = torch_logits(model, inputs, positions)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        results.append(loss.item() / math.log(2))
    return results


def in_flax(
    config: ALiBiConfig, positions: str, text: np.ndarray, lengths: Sequence[int]
) -> Callable[[Any], list[float]]:
    """A function of params that measures the same in Flax, compiled once for all seeds."""
    model = alibi_flax.ALiBiLM(config_for(positions, config))

    @jax.jit
    def mean_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = flax_logits(model, params, inputs, positions)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def measured(params: Any) -> list[float]:
        cuts = [_cut(text, length) for length in lengths]
        return [float(mean_loss(params, *map(jnp.asarray, cut))) / math.log(2) for cut in cuts]

    return measured


def _cut(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next-byte targets, [sequences, length], that cover the text once."""
    return text[:-1].reshape(-1, length), text[1:].reshape(-1, length)
