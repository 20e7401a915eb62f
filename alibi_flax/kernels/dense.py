"""Dense attention: slow, obvious, and the yardstick for every other kernel.

It holds the whole [query, key] matrix, follows SPEC.md §2-§4 line by line, and does not depend
on models. The bias is float32 for inputs of any dtype (float64 for float64 inputs): bfloat16 cannot
count past 256.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from alibi_flax.kernels.call import HIGHEST, Call, of_queries, wide_dtype
from alibi_flax.kernels.dropout import is_kept

# Queries times keys below which "auto" takes dense attention. On two CPU cores, with 8 heads of
# width 64, gradients at 512 x 512 take as long, and one query with 16,384 keys 3/4 as long.
PAYS_BELOW = 512 * 512


def biased_logits(call: Call) -> Float[Array, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    return jnp.where(_visible_keys(call), _logits(call), -math.inf)


def refuses(call: Call) -> str | None:  # noqa: ARG001
    """Dense attention computes every call."""
    return None


def attention(call: Call) -> Float[Array, "batch query_len heads value_dim"]:
    """Softmax of the biased logits over keys, times the values (SPEC.md §4)."""
    visible = _visible_keys(call)
    # A query that sees no key gives zeros. It first attends to all keys equally, and its result is
    # set to zero at the end: a softmax of only -inf is NaN, in gradients too.
    no_key = ~visible.any(axis=-1, keepdims=True)
    logits = _logits(call)
    hidden = jnp.where(no_key, 0.0, -math.inf).astype(logits.dtype)
    probabilities = jax.nn.softmax(jnp.where(visible, logits, hidden), axis=-1)
    if call.dropout is not None:
        rate, hashes, of_keys = call.dropout
        kept = is_kept(rate, hashes[..., None], of_keys[None, None, None])
        probabilities = jnp.where(kept, probabilities / (1 - rate), 0.0)
    value = _shared_heads(call.value, call.query.shape[1])
    probabilities = probabilities.astype(value.dtype)
    attended = jnp.einsum("bhqk,bhkd->bqhd", probabilities, value, precision=HIGHEST)
    return jnp.where(no_key.swapaxes(1, 2), 0.0, attended)


def _logits(call: Call) -> Float[Array, "batch heads query_len key_len"]:
    dtype = wide_dtype(call.query)
    key = _shared_heads(call.key, call.query.shape[1])
    products = jnp.einsum(
        "bhqd,bhkd->bhqk",
        call.query.astype(dtype),
        key.astype(dtype),
        precision=HIGHEST,
    )
    if call.distance == "bfloat16":
        bias = rounded_bias(call.slopes, key.shape[2], call.attention_mask)
        return call.scale * (products + bias.astype(dtype))
    relative = _relative_position(call)
    if call.distance == "absolute":
        relative = -jnp.abs(relative)
    bias = call.slopes.astype(dtype)[:, None, None] * relative.astype(dtype)[None]
    return call.scale * products + bias[None]


def _shared_heads(
    x: Float[Array, "batch kv_heads key_len width"], num_heads: int
) -> Float[Array, "batch heads key_len width"]:
    return x if x.shape[1] == num_heads else jnp.repeat(x, num_heads // x.shape[1], axis=1)


def rounded_bias(
    slopes: Float[Array, " heads"],
    key_len: int,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
) -> Float[Array, "#batch heads 1 key_len"]:
    """Falcon-RW's bias, which depends only on the key (SPEC.md §2.3)."""
    if attention_mask is None:
        position = jnp.arange(key_len)[None]
    else:
        visible = attention_mask.astype(jnp.bool_).astype(jnp.int32)
        position = (visible.cumsum(axis=-1) - 1) * visible

    def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Not a cast to bfloat16 and back: XLA may remove such a pair.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes, position = rounded(slopes.astype(jnp.float32)), rounded(position.astype(jnp.float32))
    return rounded(slopes[None, :, None] * position[:, None, :])[:, :, None, :]


def _relative_position(call: Call) -> Integer[Array, "query_len key_len"]:
    """j - i for every query i and key j."""
    query_position = call.query_start + jnp.arange(call.query.shape[2], dtype=jnp.int32)
    return jnp.arange(call.key.shape[2], dtype=jnp.int32)[None, :] - query_position[:, None]


def _visible_keys(call: Call) -> Bool[Array, "#batch 1 query_len key_len"]:
    relative, segments = _relative_position(call), call.segment_ids
    seen = relative <= 0 if call.causal else jnp.ones(relative.shape, dtype=jnp.bool_)
    visible = seen[None, None]
    if call.attention_mask is not None:
        visible = visible & call.attention_mask.astype(jnp.bool_)[:, None, None, :]
    if segments is not None:
        query_segment = of_queries(segments, call.query_start, relative.shape[0])
        visible = visible & (query_segment[:, None, :, None] == segments[:, None, None, :])
    return visible
