"""Calls of alibi_flax and a small model, for tests of what JAX does to functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import alibi_flax
from alibi_flax.kernels.dense import PAYS_BELOW
from alibi_spec import ALiBiConfig, slopes

SHORT, LONG, VOCAB = 40, 600, 23
JAX_SLOPES = jnp.asarray(slopes(4))
assert SHORT**2 < PAYS_BELOW < LONG**2


def jax_arrays(length: int) -> list[Array]:
    rng = np.random.default_rng(0)
    shape = (3, length, 4, 8)
    return [jnp.asarray(rng.standard_normal(shape)) for _ in range(3)]


def jax_mask(length: int) -> Array:
    """A whole sequence, one that is padded on the left, and one on the right."""
    position = np.arange(length)
    rows = [position >= 0, position >= length // 3, position < length - length // 3]
    return jnp.asarray(np.stack(rows), jnp.int32)


def jax_attend(query: Array, key: Array, value: Array, mask: Array, **options: Any) -> Array:
    return alibi_flax.attention(query, key, value, JAX_SLOPES, attention_mask=mask, **options)


def jax_model(**options: Any) -> tuple[alibi_flax.ALiBiLM, Any]:
    config = ALiBiConfig(
        num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, vocab_size=VOCAB, **options
    )
    model = alibi_flax.ALiBiLM(config)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def jax_tokens(length: int) -> Array:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, length))
    return jnp.asarray(tokens, jnp.int32)
