"""Dense attention: slow, obvious, and the yardstick for every other kernel.

It holds the whole [query, key] matrix, follows SPEC.md §2-§4 line by line, and knows nothing of
models. The bias stays in float32 (float64 for float64 inputs) whatever the inputs are: bfloat16
cannot count past 256.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer, Key


def biased_logits(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len heads head_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool,
    scale: float | None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None,
    distance: str,
) -> Float[Array, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    visible = _visible_keys(query, key, causal, attention_mask, segment_ids)
    return jnp.where(visible, _logits(query, key, slopes, scale, distance), -math.inf)


def attention(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len heads head_dim"],
    value: Float[Array, "batch key_len heads value_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool,
    scale: float | None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None,
    distance: str,
    dropout: float,
    dropout_rng: Key[Array, ""] | None,
) -> Float[Array, "batch query_len heads value_dim"]:
    """Softmax of the biased logits over keys, times the values (SPEC.md §4)."""
    visible = _visible_keys(query, key, causal, attention_mask, segment_ids)
    # A query that sees no key gives zeros. It attends to everything at first and is cleared at the
    # end, because softmax of -inf alone is NaN, in gradients too.
    no_key = ~visible.any(axis=-1, keepdims=True)
    logits = _logits(query, key, slopes, scale, distance)
    probabilities = jax.nn.softmax(jnp.where(visible | no_key, logits, -math.inf), axis=-1)
    if dropout > 0 and dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout, probabilities.shape)
        probabilities = probabilities * keep.astype(probabilities.dtype) / (1 - dropout)
    attended = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(value.dtype), value)
    return jnp.where(no_key.swapaxes(1, 2), 0.0, attended)


def _logits(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len heads head_dim"],
    slopes: Float[Array, " heads"],
    scale: float | None,
    distance: str,
) -> Float[Array, "batch heads query_len key_len"]:
    query_len, key_len, head_dim = query.shape[1], key.shape[1], query.shape[3]
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    products = jnp.einsum(
        "bqhd,bkhd->bhqk",
        query.astype(dtype),
        key.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,  # JAX's default would be bfloat16 or TF32 passes
    )
    scores = scale * products
    return scores + _bias(slopes.astype(dtype), query_len, key_len, distance)[None]


def _bias(
    slopes: Float[Array, " heads"], query_len: int, key_len: int, distance: str
) -> Float[Array, "heads query_len key_len"]:
    relative = _relative_position(query_len, key_len)
    if distance == "absolute":
        relative = -jnp.abs(relative)
    return slopes[:, None, None] * relative.astype(slopes.dtype)[None]


def _relative_position(query_len: int, key_len: int) -> Integer[Array, "query_len key_len"]:
    query_position = jnp.arange(key_len - query_len, key_len)
    return jnp.arange(key_len)[None, :] - query_position[:, None]


def _visible_keys(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len heads head_dim"],
    causal: bool,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None,
) -> Bool[Array, "#batch 1 query_len key_len"]:
    query_len, key_len = query.shape[1], key.shape[1]
    visible = jnp.ones((1, 1, query_len, key_len), dtype=jnp.bool_)
    if causal:
        visible = visible & (_relative_position(query_len, key_len) <= 0)[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.astype(jnp.bool_)[:, None, None, :]
    if segment_ids is not None:
        query_segment = segment_ids[:, key_len - query_len :]
        visible = visible & (query_segment[:, None, :, None] == segment_ids[:, None, None, :])
    return visible
