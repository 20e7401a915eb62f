"""The passes over blocks in plain JAX, for any device: loops of XLA, online softmax.

A block of queries passes the blocks of keys in its range one by one (Milakov and Gimelshein 2018;
Dao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer, Shaped

from alibi_flax.kernels.call import Call, refuses_bias
from alibi_flax.kernels.windowed import Rows, Windows
from alibi_flax.kernels.windows import query_block_ranges

# XLA spreads a product over the cores of a CPU only from about this size on: smaller blocks do less
# work and take longer, and so do several of them side by side.
BLOCK_SIZE = 512

Index = Integer[Array, ""]
State = tuple[Array, ...]
Step = Callable[[Index, Any], State]
Finish = Callable[[Any], State]


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def attended(
    windows: Windows,
) -> tuple[Float[Array, "batch heads queries value_dim"], Float[Array, "batch heads queries"]]:
    """The result in the dtype of the values, and log Σ_j exp(s_ij), inf in empty rows."""
    dtype = windows.slopes.dtype

    def visit(head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query = _rows(windows, windows.query, head, query_block)

        def step(key_block: Index, state: Any) -> State:
            largest, total, attended = state
            key, value = _keys(windows, head, key_block)
            logits, _ = _logits(windows, head, query_block, key_block, query, key, key_axis=1)
            new = jnp.maximum(largest, logits.max(axis=-1))
            base = jnp.where(jnp.isneginf(new), 0, new)
            weights, decay = jnp.exp(logits - base[:, None]), jnp.exp(largest - base)
            total = decay * total + weights.sum(axis=-1)
            weighted = windows.dot("qk,kd->qd", weights.astype(value.dtype), value)
            return new, total, decay[:, None] * attended + weighted

        def finish(state: Any) -> State:
            largest, total, attended = state
            is_empty = total == 0
            log_total = jnp.where(is_empty, math.inf, largest + jnp.log(total))
            attended = jnp.where(is_empty[:, None], 0, attended / total[:, None])
            return attended.astype(windows.value.dtype), log_total

        size, width = windows.block_size, windows.value.shape[-1]
        state = (
            jnp.full(size, -math.inf, dtype),
            jnp.zeros(size, dtype),
            jnp.zeros((size, width), dtype),
        )
        return state, step, finish

    result, log_total = _over_ranges(windows.first, windows.last, visit)
    return result, log_total


def query_gradients(
    windows: Windows, rows: Rows
) -> tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries"]]:
    """Gradients of the queries, and each query's share of the gradient of m."""

    def visit(head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query, gradient, log_total, shift = _queries(windows, rows, head, query_block)

        def step(key_block: Index, state: Any) -> State:
            of_query, of_slope = state
            key, value = _keys(windows, head, key_block)
            place = (head, query_block, key_block)
            logits, distance = _logits(windows, *place, query, key, key_axis=1)
            weights = jnp.exp(logits - log_total[:, None])
            of_weights = windows.dot("qd,kd->qk", gradient, value)
            of_logits = weights * (of_weights - shift[:, None])
            of_query += windows.dot("qk,kd->qd", of_logits.astype(key.dtype), key)
            return of_query, of_slope - (of_logits * distance).sum(axis=-1)

        def finish(state: Any) -> State:
            of_query, of_slope = state
            return windows.scale * of_query, of_slope

        zeros = jnp.zeros(query.shape, windows.slopes.dtype)
        return (zeros, zeros[:, 0]), step, finish

    of_query, of_slope = _over_ranges(windows.first, windows.last, visit)
    return of_query, of_slope


def key_gradients(
    windows: Windows, rows: Rows
) -> tuple[Float[Array, "batch heads keys head_dim"], Float[Array, "batch heads keys value_dim"]]:
    """Gradients of the keys and values, for each head of queries."""

    def visit(head: Index, key_block: Index) -> tuple[State, Step, Finish]:
        key, value = _keys(windows, head, key_block)

        def step(query_block: Index, state: Any) -> State:
            of_key, of_value = state
            own = _queries(windows, rows, head, query_block)
            place = (head, query_block, key_block)
            query, gradient, log_total, shift = own
            # Keys lie in rows here: XLA is slow at products that sum over rows on the left.
            logits, _ = _logits(windows, *place, key, query, key_axis=0)
            weights = jnp.exp(logits - log_total[None])
            of_weights = windows.dot("kd,qd->kq", value, gradient)
            of_logits = weights * (of_weights - shift[None])
            of_key += windows.dot("kq,qd->kd", of_logits.astype(query.dtype), query)
            of_value += windows.dot("kq,qd->kd", weights.astype(gradient.dtype), gradient)
            return of_key, of_value

        def finish(state: Any) -> State:
            of_key, of_value = state
            return windows.scale * of_key, of_value

        zeros = [jnp.zeros(x.shape, windows.slopes.dtype) for x in (key, value)]
        return tuple(zeros), step, finish

    ranges = query_block_ranges(windows.first, windows.last, windows.key_blocks)
    of_key, of_value = _over_ranges(*ranges, visit)
    return of_key, of_value


def _logits(
    windows: Windows,
    head: Index,
    query_block: Index,
    key_block: Index,
    left: Float[Array, "block head_dim"],
    right: Float[Array, "block head_dim"],
    key_axis: int,
) -> tuple[Float[Array, "block block"], Float[Array, "block block"]]:
    """Biased logits of two blocks, with the keys along `key_axis`, and their distances."""
    size, heads = windows.block_size, len(windows.slopes)
    shape = (size, size)
    index = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (key_axis, 1 - key_axis)]
    relative = index[0] - index[1] + (key_block - query_block) * size - windows.offset
    distance = jnp.abs(relative).astype(windows.slopes.dtype)
    products = windows.dot("id,jd->ij", left, right)
    logits = windows.scale * products - windows.slopes[head % heads] * distance
    if windows.causal:
        logits = jnp.where(relative <= 0, logits, -math.inf)
    if windows.query_ids is not None and windows.key_ids is not None:
        sequence = head // heads
        query_ids = _rows(windows, windows.query_ids, sequence, query_block)
        key_ids = _rows(windows, windows.key_ids, sequence, key_block)
        columns, rows = (query_ids, key_ids) if key_axis == 1 else (key_ids, query_ids)
        logits = jnp.where(columns[:, None] == rows[None], logits, -math.inf)
    return logits, distance


def _queries(
    windows: Windows, rows: Rows, head: Index, query_block: Index
) -> tuple[Array, Array, Array, Array]:
    """One block of queries, gradients of their result, log-sums and shifts."""
    arrays = (windows.query, rows.gradient, rows.log_total, rows.shift)
    query, gradient, log_total, shift = (_rows(windows, x, head, query_block) for x in arrays)
    return query, gradient, log_total, shift


def _keys(
    windows: Windows, head: Index, key_block: Index
) -> tuple[Float[Array, "block head_dim"], Float[Array, "block value_dim"]]:
    shared = head // windows.group
    key = _rows(windows, windows.key, shared, key_block)
    return key, _rows(windows, windows.value, shared, key_block)


def _rows(
    windows: Windows, x: Shaped[Array, "..."], sequence: Index, block: Index
) -> Shaped[Array, "block *width"]:
    """One block of [batch, (heads,) seq, (width)], with heads counted through."""
    size, width = windows.block_size, x.shape[3:]
    seq = x.shape[1] if x.ndim == 2 else x.shape[2]
    blocks = x.reshape(-1, size, *width)
    return jax.lax.dynamic_index_in_dim(blocks, sequence * (seq // size) + block, keepdims=False)


def _over_ranges(
    first: Integer[Array, "batch heads blocks"],
    last: Integer[Array, "batch heads blocks"],
    visit: Callable[[Index, Index], tuple[State, Step, Finish]],
) -> State:
    """What becomes of each block of every head on its way through the blocks first … last.

    `visit` gives the state of a head's block, the step past one more block, and the final touch.
    """
    batch, heads, blocks = first.shape

    def passed(item: tuple[Index, Index, Index]) -> State:
        number, start, end = item
        state, step, finish = visit(number // blocks, number % blocks)
        return finish(jax.lax.fori_loop(start, end, step, state))

    numbers = jnp.arange(first.size, dtype=jnp.int32)
    results = jax.lax.map(passed, (numbers, first.reshape(-1), last.reshape(-1)))
    return tuple(x.reshape(batch, heads, -1, *x.shape[2:]) for x in results)
