"""The passes over blocks in plain JAX, for any device: online softmax in loops of XLA.

A block of queries visits the blocks of keys in its range one by one (Milakov and Gimelshein 2018;
Dao et al. 2022). A `Visit` computes one block; a `Sweep` loops over blocks: `in_loops` here, and
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
from alibi_flax.kernels.certificate import query_block_ranges
from alibi_flax.kernels.dropout import is_kept
from alibi_flax.kernels.partition import varying, varying_axes
from alibi_flax.kernels.windowed.operator import Attended, BlockedCall, OfKeys, OfQueries, PerQuery

# XLA spreads a product over the cores of a CPU only from about this size on: smaller blocks do less
# work and take longer, and so do several of them at once.
BLOCK_SIZE = 512

Index = Integer[Array, ""]
State = tuple[Array, ...]
Step = Callable[[Index, Any], State]
Finish = Callable[[Any], State]


@dataclass(frozen=True)
class Blocks:
    """The input of a pass, read block by block.

    Attributes:
        blocked: in a Pallas kernel its arrays are references to memory.
        per_query: None in the forward pass.
        load: one block of [batch, (heads,) seq, (width)], with one index for batch and heads.
    """

    blocked: BlockedCall
    per_query: PerQuery | None
    load: Callable[[Any, Index, Index], Shaped[Array, "block *width"]]

    def keys(
        self, head: Index, key_block: Index
    ) -> tuple[Float[Array, "block head_dim"], Float[Array, "block value_dim"]]:
        """One block of keys and values."""
        shared = jax.lax.div(head, jnp.int32(self.blocked.group))
        key, value = self.blocked.key, self.blocked.value
        return self.load(key, shared, key_block), self.load(value, shared, key_block)

    def queries(self, head: Index, query_block: Index) -> tuple[Array, Array, Array, Array]:
        """One block of queries, gradients of their result, log-sums and shifts."""
        known: Any = self.per_query
        arrays = (self.blocked.query, known.gradient, known.log_total, known.shift)
        query, gradient, log_total, shift = (self.load(x, head, query_block) for x in arrays)
        return query, gradient, log_total, shift


# For one block of a head: its first state, the step over one other block, the result of a state.
Visit = Callable[[Blocks, Index, Index], tuple[State, Step, Finish]]
# The results of a `Visit` for each block of every head, with steps over the blocks first … last.
Sweep = Callable[[BlockedCall, PerQuery | None, tuple[Array, Array], Visit], State]


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def block_size(call: Call) -> int:  # noqa: ARG001
    """Positions in a block."""
    return BLOCK_SIZE


def in_loops(
    blocked: BlockedCall, per_query: PerQuery | None, ranges: tuple[Array, Array], visit: Visit
) -> State:
    """A `Sweep` as two nested loops over blocks."""
    batch, heads, blocks = ranges[0].shape
    arrays = Blocks(blocked, per_query, partial(load, size=blocked.block_size))
    axes = varying_axes(blocked.query)

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


def attended(blocked: BlockedCall, sweep: Sweep = in_loops) -> Attended:
    """The result, in the dtype of the values; log Σ_j exp(s_ij), inf if it sees no key."""
    dtype = blocked.slopes.dtype

    def visit(blocks: Blocks, head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query = blocks.load(blocks.blocked.query, head, query_block)

        def step(key_block: Index, state: Any) -> State:
            largest, total, attended = state
            key, value = blocks.keys(head, key_block)
            place = (head, query_block, key_block)
            logits, _ = _logits(blocks, *place, query, key, key_axis=1)
            new = jnp.maximum(largest, logits.max(axis=-1))
            base = jnp.where(jnp.isneginf(new), 0, new)  # else -inf - -inf would be NaN
            weights, decay = jnp.exp(logits - base[:, None]), jnp.exp(largest - base)
            total = decay * total + weights.sum(axis=-1)
            weights = _dropped(blocks, *place, weights, key_axis=1)
            weighted = blocked.dot("qk,kd->qd", weights.astype(value.dtype), value)
            return new, total, decay[:, None] * attended + weighted

        def finish(state: Any) -> State:
            largest, total, attended = state
            is_empty = total == 0
            log_total = jnp.where(is_empty, math.inf, largest + jnp.log(total))
            attended = jnp.where(is_empty[:, None], 0, attended / total[:, None])
            return attended.astype(blocked.value.dtype), log_total

        size, width = blocked.block_size, blocked.value.shape[-1]
        state = (
            jnp.full(size, -math.inf, dtype),
            jnp.zeros(size, dtype),
            jnp.zeros((size, width), dtype),
        )
        return state, step, finish

    result, log_total = sweep(blocked, None, (blocked.first, blocked.last), visit)
    return result, log_total


def query_gradients(
    blocked: BlockedCall, per_query: PerQuery, sweep: Sweep = in_loops
) -> OfQueries:
    """Gradients of the queries, and each query's share of the gradient of m."""

    def visit(blocks: Blocks, head: Index, query_block: Index) -> tuple[State, Step, Finish]:
        query, gradient, log_total, shift = blocks.queries(head, query_block)

        def step(key_block: Index, state: Any) -> State:
            of_query, of_slope = state
            key, value = blocks.keys(head, key_block)
            place = (head, query_block, key_block)
            logits, distance = _logits(blocks, *place, query, key, key_axis=1)
            weights = jnp.exp(logits - log_total[:, None])
            of_weights = blocked.dot("qd,kd->qk", gradient, value)
            of_weights = _dropped(blocks, *place, of_weights, key_axis=1)
            of_logits = weights * (of_weights - shift[:, None])
            of_query += blocked.dot("qk,kd->qd", of_logits.astype(key.dtype), key)
            return of_query, of_slope - (of_logits * distance).sum(axis=-1)

        def finish(state: Any) -> State:
            of_query, of_slope = state
            return blocked.scale * of_query, of_slope

        dtype = blocked.slopes.dtype
        return (jnp.zeros(query.shape, dtype), jnp.zeros(query.shape[:1], dtype)), step, finish

    of_query, of_slope = sweep(blocked, per_query, (blocked.first, blocked.last), visit)
    return of_query, of_slope


def key_gradients(blocked: BlockedCall, per_query: PerQuery, sweep: Sweep = in_loops) -> OfKeys:
    """Gradients of the keys and values, for each head of queries."""

    def visit(blocks: Blocks, head: Index, key_block: Index) -> tuple[State, Step, Finish]:
        key, value = blocks.keys(head, key_block)

        def step(query_block: Index, state: Any) -> State:
            of_key, of_value = state
            query, gradient, log_total, shift = blocks.queries(head, query_block)
            place = (head, query_block, key_block)
            # Keys on the left: XLA is slow if a product sums over the first axis of its left side.
            logits, _ = _logits(blocks, *place, key, query, key_axis=0)
            weights = jnp.exp(logits - log_total[None])
            of_weights = blocked.dot("kd,qd->kq", value, gradient)
            of_weights = _dropped(blocks, *place, of_weights, key_axis=0)
            of_logits = weights * (of_weights - shift[None])
            of_key += blocked.dot("kq,qd->kd", of_logits.astype(query.dtype), query)
            weights = _dropped(blocks, *place, weights, key_axis=0)
            of_value += blocked.dot("kq,qd->kd", weights.astype(gradient.dtype), gradient)
            return of_key, of_value

        def finish(state: Any) -> State:
            of_key, of_value = state
            return blocked.scale * of_key, of_value

        zeros = [jnp.zeros(x.shape, blocked.slopes.dtype) for x in (key, value)]
        return tuple(zeros), step, finish

    ranges = query_block_ranges(blocked.first, blocked.last, blocked.key_blocks)
    of_key, of_value = sweep(blocked, per_query, ranges, visit)
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
    blocked = blocks.blocked
    size, heads = blocked.block_size, blocked.slopes.shape[0]
    shape = (size, size)
    # The index of the key, and of the query, in their blocks.
    index = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (key_axis, 1 - key_axis)]
    relative = index[0] - index[1] + (key_block - query_block) * size
    relative -= blocked.query_start[0]
    distance = jnp.abs(relative).astype(blocked.slopes.dtype)
    products = blocked.dot("id,jd->ij", left, right)
    slope = blocked.slopes[jax.lax.rem(head, jnp.int32(heads))]
    logits = blocked.scale * products - slope * distance
    if blocked.causal:
        logits = jnp.where(relative <= 0, logits, -math.inf)
    if blocked.query_ids is not None and blocked.key_ids is not None:
        sequence = jax.lax.div(head, jnp.int32(heads))
        query_ids = blocks.load(blocked.query_ids, sequence, query_block)
        key_ids = blocks.load(blocked.key_ids, sequence, key_block)
        left_ids, right_ids = (query_ids, key_ids) if key_axis == 1 else (key_ids, query_ids)
        logits = jnp.where(left_ids[:, None] == right_ids[None], logits, -math.inf)
    return logits, distance


def _dropped(
    blocks: Blocks,
    head: Index,
    query_block: Index,
    key_block: Index,
    x: Float[Array, "block block"],
    key_axis: int,
) -> Float[Array, "block block"]:
    """0 where dropout drops; the rest is divided by the share that is kept."""
    blocked = blocks.blocked
    if blocked.query_hashes is None or blocked.key_hashes is None:
        return x
    of_queries = blocks.load(blocked.query_hashes, head, query_block)
    of_keys = blocks.load(blocked.key_hashes, jnp.int32(0), key_block)
    left, right = (of_queries, of_keys) if key_axis == 1 else (of_keys, of_queries)
    kept = is_kept(blocked.dropout, left[:, None], right[None])
    return jnp.where(kept, x / (1 - blocked.dropout), 0)
