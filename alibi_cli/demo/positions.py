"""How the demo's models know where a token stands: ALiBi, rotary or sinusoidal positions.

Slopes of zero leave the attention of an `ALiBiLM` without any notion of position. Sinusoids are
added to its embeddings, scaled by sqrt(d_model) (Vaswani et al. 2017, §3.4-3.5); a rotation is
applied to its queries and keys (Su et al. 2021, eq. 34). The models themselves contain neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

import alibi_flax
import alibi_torch
from alibi_cli.demo.text import BYTES
from alibi_spec import ALiBiConfig

ALIBI, ROTARY, SINUSOIDAL = POSITIONS = ("ALiBi", "rotary", "sinusoidal")


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
    return config if positions == ALIBI else replace(config, slopes=(0.0,) * config.num_heads)


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


def torch_model(config: ALiBiConfig, positions: str) -> alibi_torch.ALiBiLM:
    """A new model; with rotary positions its queries and keys are turned as they are computed."""
    model = alibi_torch.ALiBiLM(config_for(positions, config))
    if positions == ROTARY:

        def turned(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            batch, seq, _ = output.shape
            heads = output.view(batch, seq, config.num_heads, config.head_dim)
            cos, sin = map(torch.from_numpy, turn(seq, config.head_dim))
            left, right = heads.chunk(2, dim=-1)
            halves = (left * cos - right * sin, left * sin + right * cos)
            return torch.cat(halves, dim=-1).flatten(2)

        for name, module in model.named_modules():
            if name.endswith((".attn.query", ".attn.key")):
                module.register_forward_hook(turned)
    return model


def torch_logits(model: alibi_torch.ALiBiLM, tokens: torch.Tensor, positions: str) -> torch.Tensor:
    """Logits of a model of `torch_model`."""
    if positions != SINUSOIDAL:
        return model(tokens)
    width = model.config.d_model
    added = torch.from_numpy(sinusoids(tokens.shape[1], width))[None]
    embeddings = model.token_embedding(tokens) * math.sqrt(width) + added
    return model.head(model.transformer(embeddings))


def flax_logits(model: alibi_flax.ALiBiLM, params: Any, tokens: jax.Array, positions: str) -> Any:
    """Logits of the same model in Flax."""
    if positions == ROTARY:
        with nn.intercept_methods(_turned):
            return model.apply({"params": params}, tokens)
    if positions == ALIBI:
        return model.apply({"params": params}, tokens)
    width = model.config.d_model
    added = jnp.asarray(sinusoids(tokens.shape[1], width))[None]

    def forward(model: alibi_flax.ALiBiLM) -> jax.Array:
        embeddings = model.token_embedding(tokens) * math.sqrt(width) + added
        return model.head(model.transformer(embeddings))

    return model.apply({"params": params}, method=forward)


def _turned(
    method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Queries and keys, [batch, seq, heads, head_dim], turned by their positions."""
    output = method(*args, **kwargs)
    if context.method_name != "__call__" or context.module.name not in ("query", "key"):
        return output
    cos, sin = map(jnp.asarray, turn(output.shape[1], output.shape[3]))
    left, right = jnp.split(output, 2, axis=-1)
    return jnp.concatenate((left * cos - right * sin, left * sin + right * cos), axis=-1)
