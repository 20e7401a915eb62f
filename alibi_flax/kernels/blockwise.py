"""The passes over blocks in plain JAX, for any device: online softmax in loops of XLA.

A block of queries passes the blocks of keys in its range one by one (Milakov and Gimelshein 2018;
Dao et al. 2022). What it does at each is said here; a `Run` says how blocks come by, and there is
another one in `pallas_gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer, Shaped

from alibi_flax.kernels.call import Call, refuses_bias
from alibi_flax.kernels.dropout import is_kept
from alibi_flax.kernels.partition import varying, varying_axes
from alibi_flax.kernels.windowed import Rows, Windows
from alibi_flax.kernels.windows import query_block_ranges

# XLA spreads a product over the cores of a CPU only from about this size on: smaller blocks do less
# work and take longer, and so do several of them side by side.
BLOCK_SIZE = 512

Index = Integer[Array, ""]
State = tuple[Array, ...]
Step = Callable[[Index, Any], State]
Finish = Callable[[Any], State]


@dataclass(frozen=True)
class Blocks:
    """What a pass reads, block by block.

    Attributes:
        windows: its arrays may be references to memory, too.
        rows: in backward passes.
        load: one block of [batch, (heads,) seq, (width)], with heads counted through.
    """

    windows: Windows
    rows: Rows | None
    load: Callable[[Any, Index, Index], Shaped[Array, "block *width"]]

    def keys(
        self, head: Index, key_block: Index
    ) -> tuple[Float[Array, "block head_dim"], Float[Array, "block value_dim"]]:
        """One block of keys and values."""
        shared = jax.lax.div(head, jnp.int32(self.windows.group))
        key, value = self.windows.key, self.windows.value
        return self.load(key, shared, key_block), self.load(value, shared, key_block)

    def queries(self, head: Index, query_block: Index) -> tuple[Array, Array, Array, Array]:
        """One block of queries, gradients of their result, log-sums and shifts."""
        rows: Any = self.rows
        arrays = (self.windows.query, rows.gradient, rows.log_total, rows.shift)
        query, gradient, log_total, shift = (self.load(x, head, query_block) for x in arrays)
        return query, gradient, log_total, shift


# The state of a head's block, the step past one block, and the final touch.
Visit = Callable[[Blocks, Index, Index], tuple[State, Step, Finish]]
# What becomes of each block of every head on its way through the blocks first … last.
Run = Callable[[Windows, Rows | None, tuple[Array, Array], Visit], State]


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def in_loops(
    windows: Windows, rows: Rows | None, ranges: tuple[Array, Array], visit: Visit
) -> State:
    """One block after another, each past one block after another: a `Run`."""
    batch, heads, blocks = ranges[0].shape
    arrays = Blocks(windows, rows, partial(load, size=windows.block_size))
    axes = varying_axes(windows.query)

    def passed(item: tuple[Index, Index, Index]) -> State:
        number, start, end = item
        state, step, finish = visit(arrays, number // blocks, number % blocks)
        state = tuple(varying(x, axes) for x in state)
        return finish(jax.lax.fori_loop(start, end, step, state))

    numbers = jnp.arange(batch * heads * blocks, dtype=jnp.int32)
    results = jax.lax.map(passed, (numbers, *(x.reshape(-1) for x in ranges)))
    return tuple(x.reshape(batch, heads, -1, *x.shape[2:]) for x in results)


def load(x: Shaped[Array, "..."], sequence: Index, block: Index, size: int) -> Array:
    """One block of an array, as `Blocks.load`."""
    seq, width = x.shape[1] if x.ndim == 2 else x.shape[2], x.shape[3:]
    blocks = x.reshape(-1, size, *width)
    return jax.lax.dynamic_index_in_dim(blocks, sequence * (seq // size) + block, keepdims=False)


def attended(
    windows: Windows, run: Run = in_loops
) -> tuple[Float[Array, "batch heads queries value_dim"], Float[Array, "batch heads queries"]]:
    """The result in the dtype of the values, and log Σ_j exp(s_ij), inf in empty rows."""
    dtype = windows.slopes.dtype

    def visit(blocks: Blocks, head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query = blocks.load(blocks.windows.query, head, query_block)

        def step(key_block: Index, state: Any) -> State:
            largest, total, attended = state
            key, value = blocks.keys(head, key_block)
            place = (head, query_block, key_block)
            logits, _ = _logits(blocks, *place, query, key, key_axis=1)
            new = jnp.maximum(largest, logits.max(axis=-1))
            base = jnp.where(jnp.isneginf(new), 0, new)
            weights, decay = jnp.exp(logits - base[:, None]), jnp.exp(largest - base)
            total = decay * total + weights.sum(axis=-1)
            weights = _dropped(blocks, *place, weights, key_axis=1)
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

    result, log_total = run(windows, None, (windows.first, windows.last), visit)
    return result, log_total


def query_gradients(
    windows: Windows, rows: Rows, run: Run = in_loops
) -> tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries"]]:
    """Gradients of the queries, and each query's share of the gradient of m."""

    def visit(blocks: Blocks, head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query, gradient, log_total, shift = blocks.queries(head, query_block)

        def step(key_block: Index, state: Any) -> State:
            of_query, of_slope = state
            key, value = blocks.keys(head, key_block)
            place = (head, query_block, key_block)
            logits, distance = _logits(blocks, *place, query, key, key_axis=1)
            weights = jnp.exp(logits - log_total[:, None])
            of_weights = windows.dot("qd,kd->qk", gradient, value)
            of_weights = _dropped(blocks, *place, of_weights, key_axis=1)
            of_logits = weights * (of_weights - shift[:, None])
            of_query += windows.dot("qk,kd->qd", of_logits.astype(key.dtype), key)
            return of_query, of_slope - (of_logits * distance).sum(axis=-1)

        def finish(state: Any) -> State:
            of_query, of_slope = state
            return windows.scale * of_query, of_slope

        dtype = windows.slopes.dtype
        return (jnp.zeros(query.shape, dtype), jnp.zeros(query.shape[:1], dtype)), step, finish

    of_query, of_slope = run(windows, rows, (windows.first, windows.last), visit)
    return of_query, of_slope


def key_gradients(
    windows: Windows, rows: Rows, run: Run = in_loops
) -> tuple[Float[Array, "batch heads keys head_dim"], Float[Array, "batch heads keys value_dim"]]:
    """Gradients of the keys and values, for each head of queries."""

    def visit(blocks: Blocks, head: Index, key_block: Index) -> tuple[State, Step, Finish]:
        key, value = blocks.keys(head, key_block)

        def step(query_block: Index, state: Any) -> State:
            of_key, of_value = state
            query, gradient, log_total, shift = blocks.queries(head, query_block)
            place = (head, query_block, key_block)
            # Keys lie in rows here: XLA is slow at products that sum over rows on the left.
            logits, _ = _logits(blocks, *place, key, query, key_axis=0)
            weights = jnp.exp(logits - log_total[None])
            of_weights = windows.dot("kd,qd->kq", value, gradient)
            of_weights = _dropped(blocks, *place, of_weights, key_axis=0)
            of_logits = weights * (of_weights - shift[None])
            of_key += windows.dot("kq,qd->kd", of_logits.astype(query.dtype), query)
            weights = _dropped(blocks, *place, weights, key_axis=0)
            of_value += windows.dot("kq,qd->kd", weights.astype(gradient.dtype), gradient)
            return of_key, of_value

        def finish(state: Any) -> State:
            of_key, of_value = state
            return windows.scale * of_key, of_value

        zeros = [jnp.zeros(x.shape, windows.slopes.dtype) for x in (key, value)]
        return tuple(zeros), step, finish

    ranges = query_block_ranges(windows.first, windows.last, windows.key_blocks)
    of_key, of_value = run(windows, rows, ranges, visit)
    return of_key, of_value


def _logits(
    blocks: Blocks,
    head: Index,
    query_block: Index,
    key_block: Index,
    left: Float[Array, "block head_dim"],
    right: Float[Array, "block head_dim"],
    key_axis: int,
) -> tuple[Float[Array, "block block"], Float[Array, "block block"]]:
    """Biased logits of two blocks, with the keys along `key_axis`, and their distances."""
    windows = blocks.windows
    size, heads = windows.block_size, windows.slopes.shape[0]
    shape = (size, size)
    index = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (key_axis, 1 - key_axis)]
    relative = index[0] - index[1] + (key_block - query_block) * size - windows.offset
    distance = jnp.abs(relative).astype(windows.slopes.dtype)
    products = windows.dot("id,jd->ij", left, right)
    slope = windows.slopes[jax.lax.rem(head, jnp.int32(heads))]
    logits = windows.scale * products - slope * distance
    if windows.causal:
        logits = jnp.where(relative <= 0, logits, -math.inf)
    if windows.query_ids is not None and windows.key_ids is not None:
        sequence = jax.lax.div(head, jnp.int32(heads))
        query_ids = blocks.load(windows.query_ids, sequence, query_block)
        key_ids = blocks.load(windows.key_ids, sequence, key_block)
        columns, rows = (query_ids, key_ids) if key_axis == 1 else (key_ids, query_ids)
        logits = jnp.where(columns[:, None] == rows[None], logits, -math.inf)
    return logits, distance


def _dropped(
    blocks: Blocks,
    head: Index,
    query_block: Index,
    key_block: Index,
    x: Float[Array, "block block"],
    key_axis: int,
) -> Float[Array, "block block"]:
    """Zeros in place of what dropout takes, the rest divided by the share that it keeps."""
    windows = blocks.windows
    if windows.query_hashes is None or windows.key_hashes is None:
        return x
    of_queries = blocks.load(windows.query_hashes, head, query_block)
    of_keys = blocks.load(windows.key_hashes, jnp.int32(0), key_block)
    columns, rows = (of_queries, of_keys) if key_axis == 1 else (of_keys, of_queries)
    kept = is_kept(windows.dropout, columns[:, None], rows[None])
    return jnp.where(kept, x / (1 - windows.dropout), 0)
