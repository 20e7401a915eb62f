"""One small language model in both backends, and inputs for it."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

import alibi_flax
import alibi_torch
from alibi_spec import ALiBiConfig
from alibi_torch.dispatch import attention_within

CONFIG = ALiBiConfig(num_layers=2, d_model=30, num_heads=5, vocab_size=23, dropout=0.2)
BARE = ALiBiConfig(num_layers=1, d_model=30, num_heads=5)
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 40))
MASK = np.concatenate([np.zeros((2, 7), int), np.ones((2, 33), int)], axis=1)


def torch_model() -> alibi_torch.ALiBiLM:
    torch.manual_seed(0)
    return alibi_torch.ALiBiLM(CONFIG).eval()


def attention_slopes(model: alibi_torch.ALiBiLM) -> torch.Tensor:
    """What every layer of a torch model hands to attention for short sequences: [layers, heads]."""
    seen = []

    def spied(*arrays: Any, **options: Any) -> Any:
        slopes = options["slopes"]
        seen.append(slopes.detach())
        return attention_within(*arrays, **options)

    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with mock.patch("alibi_torch.model.attention_within", spied):
        model(tokens)
    return torch.stack(seen)


@cache
def flax_model(**options: Any) -> tuple[alibi_flax.ALiBiLM, Any]:
    """The model, and parameters that are not to be changed."""
    model = alibi_flax.ALiBiLM(CONFIG, **options)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
