"""The certificate of SPEC.md §9 in JAX: which blocks of keys provably cannot change a result.

`alibi_spec.certificate` is the same in NumPy. Here the bound is computed in float32 (float64 for
float64 inputs), and once for a block of queries, not for each query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from alibi_flax.kernels.call import HIGHEST, Call, of_queries, wide_dtype
from alibi_flax.kernels.partition import varying, varying_axes
from alibi_spec.certificate import tolerance_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("first", "last", "share"),
    meta_fields=("block_size",),
)
@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of keys that each block of queries needs.

    Attributes:
        first, last: half-open ranges of key blocks.
        share: computed blocks over all blocks, those of the future excluded if causal; 0 without
            queries.
        block_size: positions in a block.
    """

    first: Integer[Array, "batch heads query_blocks"]
    last: Integer[Array, "batch heads query_blocks"]
    share: Float[Array, "batch heads"]
    block_size: int


@partial(jax.jit, static_argnames="block_size")
def attention_plan(call: Call, block_size: int) -> AttentionPlan:
    """Ranges of key blocks outside which every query's attention mass is at most `tolerance`."""
    query, key, causal, mask = call.query, call.key, call.causal, call.attention_mask
    batch, heads, query_len, _ = query.shape
    if 0 in (batch, query_len, heads):
        none = jnp.zeros((batch, heads, -(-query_len // block_size)), jnp.int32)
        return AttentionPlan(none, none, none.sum(axis=-1) / 1, block_size)
    allowed_mass = tolerance_of(call.tolerance, str(query.dtype))
    visible = None if mask is None else mask.astype(jnp.bool_)
    queries = _Queries.of(call, visible, block_size)
    norms = _block_norms(key, visible, block_size, heads)
    axes = varying_axes(query, key, call.slopes, visible, call.segment_ids)
    blocks, own_block = norms.shape[-1], (queries.position // block_size)[None]
    shape = queries.reach.shape[:3]
    lowest = jnp.where(queries.sees_nothing, blocks, own_block).min(axis=-1)[:, None]
    highest = jnp.where(queries.sees_nothing, -1, own_block).max(axis=-1)[:, None]
    edge = jnp.full((*norms.shape[:2], 1), -math.inf, norms.dtype)
    largest_before = jnp.concatenate([edge, jax.lax.cummax(norms, axis=2)], axis=2)

    def skips_before(block: Integer[Array, "batch heads query_blocks"]) -> Array:
        largest = jnp.take_along_axis(largest_before, block, axis=2)
        distance = queries.position[None, None] - block[..., None] * block_size + 1
        mass = allowed_mass if causal else allowed_mass / 2
        return queries.may_skip(largest, distance, mass)

    first = _last_true(skips_before, jnp.broadcast_to(lowest, shape), blocks, axes)
    last = jnp.broadcast_to(highest + 1, shape)
    if not causal:
        largest_from = jnp.concatenate([jax.lax.cummax(norms, axis=2, reverse=True), edge], axis=2)

        def skips_after(count: Integer[Array, "batch heads query_blocks"]) -> Array:
            block = blocks - count
            largest = jnp.take_along_axis(largest_from, block, axis=2)
            distance = block[..., None] * block_size - queries.position[None, None]
            return queries.may_skip(largest, distance, allowed_mass / 2)

        after = jnp.broadcast_to(blocks - 1 - highest, shape)
        last = blocks - _last_true(skips_after, after, blocks, axes)
    last = jnp.maximum(first, last)
    allowed = own_block.max(axis=-1).sum() + shape[2] if causal else blocks * shape[2]
    return AttentionPlan(first, last, (last - first).sum(axis=-1) / allowed, block_size)


def keys_needed(
    query: Float[Array, "batch heads query_len head_dim"],
    own_key: Float[Array, "batch kv_heads query_len head_dim"],
    largest: Float[Array, "batch kv_heads"],
    slopes: Float[Array, " heads"],
    scale: float,
) -> Float[Array, "batch heads query_len"]:
    """How many keys, its own included, each query of a cache needs; inf if that is not provable.

    `largest` is that of all keys that were ever read (SPEC.md §16).
    """
    dtype = wide_dtype(query)
    limit = math.log(tolerance_of("dtype", str(query.dtype)))
    (batch, heads, query_len, head_dim), kv_heads = query.shape, own_key.shape[1]
    groups = (kv_heads, heads // kv_heads)
    query = query.astype(dtype).reshape(batch, *groups, query_len, head_dim)
    own_key = own_key.astype(dtype)[:, :, None]
    largest = largest[:, :, None, None]
    reach = scale * bounding_norm(query)
    slack = (
        (head_dim + 8) * float(jnp.finfo(dtype).eps) * reach * (largest + bounding_norm(own_key))
    )
    above = reach * largest + slack - scale * (query * own_key).sum(axis=-1)
    falls = (slopes > 0)[None, :, None]
    slope = jnp.where(falls, slopes.astype(dtype)[None, :, None], 1)
    series = -jnp.log(-jnp.expm1(-slope))
    # Rounded up once more: this sum and quotient are rounded too.
    needed = (above.reshape(batch, heads, query_len) + series - limit) / slope
    needed = jnp.ceil(needed * (1 + 8 * float(jnp.finfo(dtype).eps)))
    return jnp.where(falls & jnp.isfinite(needed), jnp.maximum(needed, 1), math.inf)


def query_block_ranges(
    first: Integer[Array, "batch heads query_blocks"],
    last: Integer[Array, "batch heads query_blocks"],
    key_blocks: int,
) -> tuple[Integer[Array, "batch heads key_blocks"], Integer[Array, "batch heads key_blocks"]]:
    """First and last (half-open) block of queries whose ranges can hold each block of keys.

    Ranges need not rise with the queries, so some blocks of queries in between do not need the
    block of keys: what they add is at most the tolerance.
    """
    blocks = first.shape[2]
    block = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), first.shape)
    sequence, head = (jnp.arange(size, dtype=jnp.int32) for size in first.shape[:2])
    where = (sequence[:, None, None], head[:, None])
    shape = (*first.shape[:2], key_blocks)
    is_empty = first >= last
    # A block of keys needs no queries after the last that begins at or before it, nor before the
    # first that ends after it.
    begins = jnp.where(is_empty, key_blocks, first)  # out of bounds: dropped
    ends = jnp.where(is_empty, key_blocks, last - 1)
    latest = jnp.zeros(shape, jnp.int32).at[(*where, begins)].max(block + 1, mode="drop")
    earliest = jnp.full(shape, blocks, jnp.int32).at[(*where, ends)].min(block, mode="drop")
    latest = jax.lax.cummax(latest, axis=2)
    earliest = jax.lax.cummin(earliest, axis=2, reverse=True)
    return jnp.minimum(earliest, latest), latest


@dataclass(frozen=True)
class _Queries:
    """The facts about every query that the certificate uses, in blocks.

    Attributes:
        reach: scale ‖q‖, so that no logit exceeds reach · ‖k‖.
        anchor_logit: scale q·k of the anchor, the nearest visible key.
        anchor_norm: ‖k‖ of the anchor.
        anchor_distance: between query and anchor.
        slope: of the head.
        is_anchored: the query sees its anchor.
        sees_nothing: no key is visible to the query, or it is padding of the last block.
        position: of the query among the keys.
        rounding: relative error of reach · ‖k‖ as it is computed.
    """

    reach: Float[Array, "batch heads query_blocks block"]
    anchor_logit: Float[Array, "batch heads query_blocks block"]
    anchor_norm: Float[Array, "batch heads query_blocks block"]
    anchor_distance: Integer[Array, "#batch query_blocks block"]
    slope: Float[Array, "1 heads 1 1"]
    is_anchored: Bool[Array, "#batch query_blocks block"]
    sees_nothing: Bool[Array, "#batch query_blocks block"]
    position: Integer[Array, "query_blocks block"]
    rounding: float

    @classmethod
    def of(
        cls, call: Call, visible: Bool[Array, "batch key_len"] | None, block_size: int
    ) -> _Queries:
        """From the arrays of a call."""
        query, key, segment_ids, scale = call.query, call.key, call.segment_ids, call.scale
        (batch, heads, query_len, head_dim), kv_heads = query.shape, key.shape[1]
        dtype = wide_dtype(query)
        position = call.query_start + jnp.arange(query_len, dtype=jnp.int32)
        if visible is None:
            anchor = position[None]
            anchor_key = of_queries(key, call.query_start, query_len, axis=2)
        else:
            anchor = of_queries(_anchors(visible, call.causal), call.query_start, query_len)
            index = anchor.clip(0)[:, None, :, None]
            anchor_key = jnp.take_along_axis(key, index, axis=2)
        is_anchored = anchor >= 0
        if segment_ids is not None:
            anchor_segment = jnp.take_along_axis(segment_ids, anchor.clip(0), axis=1)
            own_segment = of_queries(segment_ids, call.query_start, query_len)
            is_anchored = is_anchored & (anchor_segment == own_segment)
        groups = (batch, kv_heads, heads // kv_heads, query_len)
        query = query.astype(dtype).reshape(*groups, head_dim)
        anchor_key = anchor_key.astype(dtype)
        product = jnp.einsum("bgrnd,bgnd->bgrn", query, anchor_key, precision=HIGHEST)
        anchor_norm = jnp.broadcast_to(bounding_norm(anchor_key)[:, :, None], groups)

        def in_blocks(x: Array, padding: float | bool = 0) -> Array:
            rest = [(0, 0)] * (x.ndim - 1)
            x = jnp.pad(x, [*rest, (0, -query_len % block_size)], constant_values=padding)
            return x.reshape(*x.shape[:-1], -1, block_size)

        def of_heads(x: Float[Array, "batch kv_heads group query_len"]) -> Array:
            return in_blocks(x.reshape(batch, heads, query_len))

        return cls(
            reach=of_heads(scale * bounding_norm(query)),
            anchor_logit=of_heads(scale * product),
            anchor_norm=of_heads(anchor_norm),
            anchor_distance=in_blocks(jnp.abs(position[None] - anchor)),
            slope=call.slopes.astype(dtype)[None, :, None, None],
            is_anchored=in_blocks(is_anchored),
            sees_nothing=in_blocks(anchor < 0, padding=True),
            position=in_blocks(position),
            rounding=(head_dim + 8) * float(jnp.finfo(dtype).eps),
        )

    def may_skip(
        self,
        largest: Float[Array, "batch heads query_blocks"],
        distance: Integer[Array, "batch heads query_blocks block"],
        allowed_mass: float,
    ) -> Bool[Array, "batch heads query_blocks"]:
        """Whether a block of queries may skip all keys this far or farther."""
        # The geometric series of e^-m sums to 1 / (1 - e^-m).
        series = -jnp.log(-jnp.expm1(-self.slope))
        norm = largest[..., None]
        slack = self.rounding * self.reach * (norm + self.anchor_norm)
        # Subtracted as integers, and rounded once: each distance alone can be large.
        farther = (distance - self.anchor_distance[:, None]).astype(self.reach.dtype)
        mass = self.reach * norm + slack - self.anchor_logit - self.slope * farther + series
        limit = math.log(allowed_mass) if allowed_mass > 0 else -math.inf
        is_small = (mass <= limit) & (self.slope > 0) & self.is_anchored[:, None]
        may_skip = is_small | jnp.isneginf(norm) | self.sees_nothing[:, None]
        return may_skip.all(axis=-1)


def bounding_norm(x: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape"]:
    """At least the Euclidean norm: squares that underflow count as the least normal number."""
    least = x.shape[-1] * float(jnp.finfo(x.dtype).tiny)
    return jnp.sqrt((x * x).sum(axis=-1) + least)


def _block_norms(
    key: Float[Array, "batch kv_heads key_len head_dim"],
    visible: Bool[Array, "batch key_len"] | None,
    block_size: int,
    heads: int,
) -> Float[Array, "batch heads key_blocks"]:
    """The largest norm of a visible key in each block, -inf where there is none."""
    batch, kv_heads, key_len, _ = key.shape
    norms = bounding_norm(key.astype(wide_dtype(key)))
    if visible is not None:
        norms = jnp.where(visible[:, None], norms, -math.inf)
    pad = ((0, 0), (0, 0), (0, -key_len % block_size))
    norms = jnp.pad(norms, pad, constant_values=-math.inf)
    norms = norms.reshape(batch, kv_heads, -1, block_size).max(axis=3)
    return jnp.repeat(norms, heads // kv_heads, axis=1)


def _anchors(
    visible: Bool[Array, "batch key_len"], causal: bool
) -> Integer[Array, "batch key_len"]:
    """The visible key nearest to each position, not after it if causal; -1 where there is none."""
    position = jnp.arange(visible.shape[1], dtype=jnp.int32)[None]
    before = jax.lax.cummax(jnp.where(visible, position, -1), axis=1)
    if causal:
        return before
    none = 2 * visible.shape[1]  # farther than any
    after = jax.lax.cummin(jnp.where(visible, position, none), axis=1, reverse=True)
    is_before = (before >= 0) & (position - before <= after - position)
    return jnp.where(is_before, before, jnp.where(after < none, after, -1))


def _last_true(
    holds: Callable[[Array], Array],
    highest: Integer[Array, "batch heads query_blocks"],
    blocks: int,
    axes: frozenset[str],
) -> Integer[Array, "batch heads query_blocks"]:
    """The largest number in 0 … `highest` that `holds`, elementwise; it holds at 0 and is monotone.

    Binary search: as many evaluations as `blocks` has bits.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high + 1) // 2
        does_hold = holds(middle)
        return jnp.where(does_hold, middle, low), jnp.where(does_hold, high, middle - 1)

    bounds = (varying(jnp.zeros_like(highest), axes), varying(highest, axes))
    return jax.lax.fori_loop(0, blocks.bit_length(), halve, bounds)[0]
