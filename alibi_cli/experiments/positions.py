"""How the models of experiments know where a token stands: ALiBi, or a peer of it.

Slopes of zero leave the attention of an `ALiBiLM` without any notion of position but the causal
mask ("none"). Sinusoids are added to its embeddings, scaled by sqrt(d_model) (Vaswani et al. 2017,
§3.4-3.5), or learned vectors, one for each position of training; a rotation is applied to its
queries and keys (Su et al. 2021, eq. 34). `torch_models` and `flax_models` put them in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from alibi_spec import ALiBiConfig

ALIBI, ROTARY, SINUSOIDAL, LEARNED, NONE = "ALiBi", "rotary", "sinusoidal", "learned", "none"
BYTES = 256  # the vocabulary of every model


def model_config(layers: int, width: int, heads: int, length: int) -> ALiBiConfig:
    """The configuration of the ALiBi model.

    The initial deviation is the same for all: with it, embeddings scaled by sqrt(d_model) match
    the sinusoids that are added to them.
    """
    return ALiBiConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        max_len=length,
        dropout=0.0,
        expansion_factor=4,
        vocab_size=BYTES,
        init_std=width**-0.5,
    )


def config_for(positions: str, config: ALiBiConfig) -> ALiBiConfig:
    """The configuration of a model whose positions are these."""
    if positions == ALIBI:
        return config
    config = replace(config, slopes=(0.0,) * config.num_heads)
    if positions == SINUSOIDAL:
        return replace(config, embedding_scale=math.sqrt(config.d_model))
    return config


def angles(seq: int, width: int) -> np.ndarray:
    """Position times frequency, float64 [seq, width / 2, rounded up]."""
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.arange(seq)[:, None] * frequencies[None, :]


def sinusoids(seq: int, d_model: int) -> np.ndarray:
    """Sinusoidal positions, float32 [seq, d_model]: sines, then cosines."""
    angle = angles(seq, d_model)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :d_model].astype(np.float32)


def turn(seq: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotation, float32 [1, seq, 1, head_dim / 2]: of all heads."""
    angle = angles(seq, head_dim)[None, :, None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
