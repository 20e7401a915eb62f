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
from jaxtyping import Bool, Float, Integer

from alibi_flax.kernels.call import Call, wide_dtype
from alibi_flax.kernels.dropout import is_kept

# Queries times keys below which "auto" takes dense attention. On two CPU cores, with 8 heads of
# width 64, gradients at 512 x 512 take as long, and one query with 16,384 keys 3/4 as long.
PAYS_BELOW = 512 * 512


def biased_logits(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool,
    scale: float,
    query_start: int,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None,
    distance: str,
) -> Float[Array, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    relative = _relative_position(query, key, query_start)
    visible = _visible_keys(relative, causal, query_start, attention_mask, segment_ids)
    logits = _logits(query, key, slopes, scale, relative, attention_mask, distance)
    return jnp.where(visible, logits, -math.inf)


def refuses(call: Call) -> str | None:  # noqa: ARG001
    """Dense attention computes every call."""
    return None


def attention(call: Call) -> Float[Array, "batch query_len heads value_dim"]:
    """Softmax of the biased logits over keys, times the values (SPEC.md §4)."""
    query, key, attention_mask, value = call.query, call.key, call.attention_mask, call.value
    relative = _relative_position(query, key, call.query_start)
    visible = _visible_keys(
        relative, call.causal, call.query_start, attention_mask, call.segment_ids
    )
    # A query that sees no key gives zeros. It attends to all keys alike at first and is cleared at
    # the end, because the softmax of nothing but -inf is NaN, in gradients too.
    no_key = ~visible.any(axis=-1, keepdims=True)
    logits = _logits(query, key, call.slopes, call.scale, relative, attention_mask, call.distance)
    hidden = jnp.where(no_key, 0.0, -math.inf).astype(logits.dtype)
    probabilities = jax.nn.softmax(jnp.where(visible, logits, hidden), axis=-1)
    if call.dropout is not None:
        rate, hashes, of_keys = call.dropout
        kept = is_kept(rate, hashes.swapaxes(1, 2)[..., None], of_keys[None, None, None])
        probabilities = jnp.where(kept, probabilities / (1 - rate), 0.0)
    value = _shared_heads(value, query.shape[2])
    attended = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(value.dtype), value)
    return jnp.where(no_key.swapaxes(1, 2), 0.0, attended)


def _logits(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    slopes: Float[Array, " heads"],
    scale: float,
    relative: Integer[Array, "query_len key_len"],
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    distance: str,
) -> Float[Array, "batch heads query_len key_len"]:
    dtype = wide_dtype(query)
    key = _shared_heads(key, query.shape[2])
    products = jnp.einsum(
        "bqhd,bkhd->bhqk",
        query.astype(dtype),
        key.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,  # JAX's default would be bfloat16 or TF32 passes
    )
    if distance == "bfloat16":
        bias = _rounded_bias(slopes, key.shape[1], attention_mask)
        return scale * (products + bias.astype(dtype))
    return scale * products + _bias(slopes.astype(dtype), relative, distance)[None]


def _shared_heads(
    x: Float[Array, "batch key_len kv_heads width"], num_heads: int
) -> Float[Array, "batch key_len heads width"]:
    return x if x.shape[2] == num_heads else jnp.repeat(x, num_heads // x.shape[2], axis=2)


def _bias(
    slopes: Float[Array, " heads"],
    relative: Integer[Array, "query_len key_len"],
    distance: str,
) -> Float[Array, "heads query_len key_len"]:
    if distance == "absolute":
        relative = -jnp.abs(relative)
    return slopes[:, None, None] * relative.astype(slopes.dtype)[None]


def _rounded_bias(
    slopes: Float[Array, " heads"],
    key_len: int,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
) -> Float[Array, "#batch heads 1 key_len"]:
    if attention_mask is None:
        position = jnp.arange(key_len)[None]
    else:
        visible = attention_mask.astype(jnp.bool_).astype(jnp.int32)
        position = (visible.cumsum(axis=-1) - 1) * visible

    def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
        # To bfloat16 and never back: XLA may leave out a pair of casts.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes, position = rounded(slopes.astype(jnp.float32)), rounded(position.astype(jnp.float32))
    return rounded(slopes[None, :, None] * position[:, None, :])[:, :, None, :]


def _relative_position(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    query_start: int,
) -> Integer[Array, "query_len key_len"]:
    """j - i for every query i and key j."""
    position = jnp.arange(query_start, query_start + query.shape[1])
    return jnp.arange(key.shape[1])[None, :] - position[:, None]


def _visible_keys(
    relative: Integer[Array, "query_len key_len"],
    causal: bool,
    query_start: int,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None,
) -> Bool[Array, "#batch 1 query_len key_len"]:
    seen = relative <= 0 if causal else jnp.ones(relative.shape, dtype=jnp.bool_)
    visible = seen[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.astype(jnp.bool_)[:, None, None, :]
    if segment_ids is not None:
        query_segment = segment_ids[:, query_start : query_start + relative.shape[0]]
        visible = visible & (query_segment[:, None, :, None] == segment_ids[:, None, None, :])
    return visible
