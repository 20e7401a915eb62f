"""One query for each sequence, against all keys of a cache: the step of generation.

Its cost is reading the keys and values of the whole capacity once: a compiled program does not know
how much of the cache is filled.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from alibi_flax.kernels.call import HIGHEST, wide_dtype
from alibi_flax.kernels.dense import rounded_bias


def attention(
    query: Float[Array, "batch 1 heads head_dim"],
    key: Float[Array, "batch kv_heads capacity head_dim"],
    value: Float[Array, "batch kv_heads capacity value_dim"],
    slopes: Float[Array, " heads"],
    *,
    age: Integer[Array, " capacity"],
    visible: Bool[Array, "batch capacity"],
    scale: float,
    distance: str,
) -> Float[Array, "batch 1 heads value_dim"]:
    """Attention of the newest query, over keys that are `age` positions older, in any order.

    With rounded distances the keys that are visible lie in order.
    """
    batch, _, heads, head_dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    dtype: Any = wide_dtype(query)
    groups = (batch, kv_heads, heads // kv_heads)
    options: Any = {"precision": HIGHEST, "preferred_element_type": dtype}
    products = jnp.einsum("bkgd,bkcd->bkgc", query.reshape(*groups, head_dim), key, **options)
    if distance == "bfloat16":
        bias = rounded_bias(slopes, capacity, visible).astype(dtype)
        logits = scale * (products + bias.reshape(*groups, capacity))
    else:
        relative = -age.astype(dtype)
        bias = slopes.astype(dtype).reshape(1, *groups[1:], 1) * relative[None, None, None]
        logits = scale * products + bias
    seen = visible[:, None, None]
    logits = jnp.where(seen, logits, -math.inf)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgc,bkcd->bkgd", probabilities, value, precision=HIGHEST)
    attended = jnp.where(seen.any(axis=-1, keepdims=True), attended, 0)  # a query without keys
    return attended.reshape(batch, 1, heads, value.shape[3])
