"""One vector for each sequence (SPEC.md §14)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer

from alibi_flax.model import ALiBiLM, checked_tokens
from alibi_spec.batching import batches_by_length
from alibi_spec.cache import bucket
from alibi_spec.checks import require_vocabulary
from alibi_spec.pooling import check_pooling


def encode(
    model: ALiBiLM,
    params: dict[str, Any],
    sequences: Sequence[Sequence[int]],
    *,
    pooling: str = "mean",
    normalize: bool = True,
    batch_size: int = 32,
) -> Float[Array, "sequences embed"]:
    """The pooled hidden states of each sequence, in the order given: float32 (float64).

    One compiled program serves all lengths in a bucket. Past `slope_interpolation` each length has
    its own.

    Args:
        sequences: tokens, of any lengths; those of like length are read together.
        pooling: "mean" of all positions, the first ("cls") or the "last".
        normalize: scale each vector to length 1.
        batch_size: sequences that are read together.

    Raises:
        ValueError: a sequence without tokens, or an unknown option.
    """
    check_pooling(pooling, batch_size)
    if len(sequences) == 0:
        return jnp.zeros((0, model.config.d_model), jnp.float32)
    found, order, limit = [], [], model.config.slope_interpolation
    for places, tokens, lengths in batches_by_length(sequences, batch_size, limit):
        tokens = checked_tokens(tokens, require_vocabulary(model.config.vocab_size))
        rows, width = batch_size - len(places), _width(tokens.shape[1], limit)
        tokens = np.pad(np.asarray(tokens), ((0, rows), (0, width - tokens.shape[1])))
        visible = np.arange(width) < np.pad(lengths, (0, rows), constant_values=1)[:, None]
        vectors = _encoded(model, params, tokens, visible, pooling, normalize)
        found.append(vectors[: len(places)])
        order.append(places)
    return jnp.concatenate(found)[np.argsort(np.concatenate(order))]


def _width(length: int, slope_interpolation: int | None) -> int:
    """That of the bucket, as far as padding leaves the slopes as they are."""
    limit = bucket(length) if slope_interpolation is None else slope_interpolation
    return max(length, min(bucket(length), limit))


@partial(jax.jit, static_argnums=(0, 4, 5))
def _encoded(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    visible: Bool[Array, "batch seq"],
    pooling: str,
    normalize: bool,
) -> Float[Array, "batch embed"]:
    def hidden_states(model: ALiBiLM) -> Float[Array, "batch seq embed"]:
        return model.transformer(model.embed(tokens), visible)

    call: Any = partial(model.apply, {"params": params}, method=hidden_states)
    hidden = call()
    vectors = _pooled(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)), visible, pooling)
    if normalize:
        vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _pooled(
    hidden: Float[Array, "batch seq embed"], visible: Bool[Array, "batch seq"], pooling: str
) -> Float[Array, "batch embed"]:
    lengths = visible.sum(axis=1)
    if pooling == "mean":
        total = jnp.where(visible[..., None], hidden, 0.0).sum(axis=1)
        return total / lengths[:, None]
    row = jnp.arange(len(hidden))
    return hidden[row, 0 if pooling == "cls" else lengths - 1]
