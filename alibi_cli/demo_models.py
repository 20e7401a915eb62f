"""What the demo does with models: train in PyTorch, measure in both backends.

The model with sinusoidal positions is an `ALiBiLM` whose slopes are zero, with embeddings scaled by
sqrt(d_model) and sinusoids added (Vaswani et al. 2017, §3.4-3.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from tqdm import tqdm

import alibi_flax
import alibi_torch
from alibi_spec import ALiBiConfig

LEARNING_RATE = 3e-3
WARMUP = 0.1  # of all steps


def sinusoids(seq: int, d_model: int) -> np.ndarray:
    """Sinusoidal positions, float32 [seq, d_model]: sines, then cosines."""
    frequencies = 10_000.0 ** (-np.arange(0, d_model, 2) / d_model)
    angles = np.arange(seq)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :d_model].astype(np.float32)


def train(
    config: ALiBiConfig,
    text: np.ndarray,
    *,
    sinusoidal: bool,
    steps: int,
    batch: int,
    seed: int,
) -> alibi_torch.ALiBiLM:
    """A model trained on random windows of `max_len` bytes: AdamW, warm-up, cosine decay."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = alibi_torch.ALiBiLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    warmup = max(1, int(steps * WARMUP))

    def rate(step: int) -> float:
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    progress = tqdm(range(steps), unit="step", mininterval=1.0)
    for _ in progress:
        starts = rng.integers(0, len(text) - config.max_len, batch)
        windows = torch.from_numpy(np.stack([text[s : s + config.max_len + 1] for s in starts]))
        logits = _torch_logits(model, windows[:, :-1], sinusoidal)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(bits_per_byte=f"{loss.item() / math.log(2):.2f}", refresh=False)
    return model.eval()


def bits_per_byte_torch(
    model: alibi_torch.ALiBiLM, text: np.ndarray, lengths: Sequence[int], *, sinusoidal: bool
) -> dict[int, float]:
    """Loss on the same text, cut into sequences of each length, in PyTorch."""
    results = {}
    for length in lengths:
        inputs, targets = (torch.from_numpy(part) for part in _windows(text, length))
        with torch.inference_mode():
            logits = _torch_logits(model, inputs, sinusoidal)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        results[length] = loss.item() / math.log(2)
    return results


def bits_per_byte_flax(
    model: alibi_flax.ALiBiLM,
    params: Any,
    text: np.ndarray,
    lengths: Sequence[int],
    *,
    sinusoidal: bool,
) -> dict[int, float]:
    """Loss on the same text, cut into sequences of each length, in Flax."""

    @jax.jit
    def mean_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = _flax_logits(model, params, inputs, sinusoidal)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    results = {}
    for length in lengths:
        inputs, targets = (jnp.asarray(part) for part in _windows(text, length))
        results[length] = float(mean_loss(params, inputs, targets)) / math.log(2)
    return results


def _windows(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next-byte targets, [sequences, length], that cover the text once."""
    return text[:-1].reshape(-1, length), text[1:].reshape(-1, length)


def _torch_logits(
    model: alibi_torch.ALiBiLM, tokens: torch.Tensor, sinusoidal: bool
) -> torch.Tensor:
    if not sinusoidal:
        return model(tokens)
    width = model.config.d_model
    positions = torch.from_numpy(sinusoids(tokens.shape[1], width))[None]
    embeddings = model.token_embedding(tokens) * math.sqrt(width) + positions
    return model.head(model.transformer(embeddings))


def _flax_logits(model: Any, params: Any, tokens: jax.Array, sinusoidal: bool) -> jax.Array:
    if not sinusoidal:
        return model.apply({"params": params}, tokens)
    width = model.config.d_model
    positions = jnp.asarray(sinusoids(tokens.shape[1], width))[None]

    def forward(model: alibi_flax.ALiBiLM) -> jax.Array:
        embeddings = model.token_embedding(tokens) * math.sqrt(width) + positions
        return model.head(model.transformer(embeddings))

    return model.apply({"params": params}, method=forward)
