"""The certificate: which keys provably cannot change a result (SPEC.md §9).

It uses only the arrays of one call: norms of queries and keys, and each query's logit with its
nearest visible key. It assumes nothing about their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.biases import default_scale, query_positions
from alibi_spec.masks import masked_softmax
from alibi_spec.reference import biased_logits, shared_heads

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Integer

    from alibi_spec.masks import AttentionMask

    _Flags = Bool[np.ndarray, "batch heads query_len"]

TOLERANCES = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-12, "bfloat16": 2.0**-9}
BLOCK_SIZE = 128


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of keys that each block of queries needs.

    Attributes:
        first, last: half-open ranges of key blocks, integers [batch, heads, query_blocks].
        share: computed blocks over all blocks, those of the future excluded if causal:
            [batch, heads]; 0 without queries.
        block_size: positions in a block.
    """

    first: Int[np.ndarray, "batch heads query_blocks"]
    last: Int[np.ndarray, "batch heads query_blocks"]
    share: Float[np.ndarray, "batch heads"]
    block_size: int


def tolerance_of(tolerance: str | float, dtype: str) -> float:
    """The share of attention mass that may be skipped: half an ulp of the dtype for "dtype"."""
    return TOLERANCES[dtype] if isinstance(tolerance, str) else float(tolerance)


def attention_plan(
    query: Float[np.ndarray, "batch heads query_len head_dim"],
    key: Float[np.ndarray, "batch kv_heads key_len head_dim"],
    slopes: Float[np.ndarray, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
    segment_ids: Integer[np.ndarray, "batch key_len"] | None = None,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> AttentionPlan:
    """Ranges of key blocks outside which every query's attention mass is at most `tolerance`.

    Distances are "absolute". Arguments are those of `attention`.
    """
    allowed_mass = tolerance_of(tolerance, str(query.dtype))
    query_len, key_len, heads = query.shape[2], key.shape[2], query.shape[1]
    shape = (query.shape[0], key_len)
    visible = np.ones(shape, bool) if attention_mask is None else attention_mask != 0
    segments = np.zeros(shape, np.int64) if segment_ids is None else segment_ids
    key = shared_heads(key, heads)
    position = query_positions(query_len, key_len)
    anchor = _anchors(visible, causal)[:, position]
    queries = _Queries.of(query, key, slopes, scale, position, anchor, segments)

    blocks, own_block = -(-key_len // block_size), position // block_size
    with np.errstate(over="ignore"):
        norms = np.where(visible[:, None], np.linalg.norm(key.astype(np.float64), axis=-1), -np.inf)
    largest_before = np.maximum.accumulate(norms, axis=2)[:, :, block_size - 1 :: block_size]
    largest_before = np.pad(largest_before, ((0, 0), (0, 0), (1, 0)), constant_values=-np.inf)

    def skips_before(block: Int[np.ndarray, "batch heads query_len"]) -> _Flags:
        largest = np.take_along_axis(largest_before, block, axis=2)
        mass = allowed_mass if causal else allowed_mass / 2
        return queries.may_skip(largest, position - block * block_size + 1, mass)

    first = _last_true(skips_before, np.broadcast_to(own_block, query.shape[:3]))
    last = np.broadcast_to(own_block + 1, first.shape)
    if not causal:
        largest_from = np.maximum.accumulate(norms[:, :, ::-1], axis=2)[:, :, ::-1]

        def skips_after(count: Int[np.ndarray, "batch heads query_len"]) -> _Flags:
            start = (blocks - count) * block_size
            inside = start.clip(max=key_len - 1)
            largest = np.take_along_axis(largest_from, inside, axis=2)
            largest = np.where(start < key_len, largest, -np.inf)
            return queries.may_skip(largest, start - position, allowed_mass / 2)

        highest = np.broadcast_to(blocks - 1 - own_block, first.shape)
        last = blocks - _last_true(skips_after, highest)
    sees_nothing = queries.sees_nothing[:, None]
    edges = np.arange(0, query_len, block_size)
    first = np.minimum.reduceat(np.where(sees_nothing, blocks, first), edges, axis=2)
    last = np.maximum.reduceat(np.where(sees_nothing, 0, last), edges, axis=2)
    last = np.maximum(first, last)
    allowed = np.maximum.reduceat(own_block, edges) + 1 if causal else np.full(len(edges), blocks)
    share = (last - first).sum(axis=-1) / max(1, allowed.sum())
    return AttentionPlan(first, last, share, block_size)


@dataclass(frozen=True)
class _Queries:
    """The facts about every query that the certificate uses.

    Attributes:
        reach: scale ‖q‖, so that no logit exceeds reach · ‖k‖.
        floor: lower bound of log Z: the biased logit with the anchor.
        anchor_norm: ‖k‖ of the anchor.
        slope: of the head.
        is_anchored: the query sees its anchor.
        sees_nothing: no key is visible to the query.
        rounding: relative error of reach · ‖k‖ as a backend computes it.
    """

    reach: Float64[np.ndarray, "batch heads query_len"]
    floor: Float64[np.ndarray, "batch heads query_len"]
    anchor_norm: Float64[np.ndarray, "batch heads query_len"]
    slope: Float64[np.ndarray, "1 heads 1"]
    is_anchored: Bool[np.ndarray, "batch query_len"]
    sees_nothing: Bool[np.ndarray, "batch query_len"]
    rounding: float

    @classmethod
    def of(
        cls,
        query: Float[np.ndarray, "batch heads query_len head_dim"],
        key: Float[np.ndarray, "batch heads key_len head_dim"],
        slopes: Float[np.ndarray, " heads"],
        scale: float | None,
        position: Int[np.ndarray, " query_len"],
        anchor: Int[np.ndarray, "batch query_len"],
        segments: Integer[np.ndarray, "batch key_len"],
    ) -> _Queries:
        """From the arrays of a call; `anchor` is the nearest visible key, or -1."""
        rounding = float(np.finfo(np.promote_types(query.dtype, np.float32)).eps)
        head_dim = query.shape[3]
        scale = default_scale(scale, head_dim)
        index = anchor.clip(0)
        query, anchor_key = (
            array.astype(np.float64)
            for array in (query, np.take_along_axis(key, index[:, None, :, None], axis=2))
        )
        slope = slopes.astype(np.float64)[None, :, None]
        with np.errstate(invalid="ignore", over="ignore"):
            logit = scale * (query * anchor_key).sum(axis=-1)
            floor = logit - slope * np.abs(position - anchor)[:, None]
            reach = scale * np.linalg.norm(query, axis=-1)
            anchor_norm = np.linalg.norm(anchor_key, axis=-1)
        same_segment = np.take_along_axis(segments, index, axis=1) == segments[:, position]
        is_anchored = same_segment & (anchor >= 0)
        return cls(
            *(reach, floor, anchor_norm, slope, is_anchored, anchor < 0),
            rounding=(head_dim + 8) * rounding,
        )

    def may_skip(
        self,
        largest: Float64[np.ndarray, "batch heads query_len"],
        distance: Int[np.ndarray, "batch heads query_len"],
        allowed_mass: float,
    ) -> _Flags:
        """Whether all keys this far or farther, of norms up to `largest`, may be skipped."""
        falls = self.slope > 0
        # The geometric series of e^-m sums to 1 / (1 - e^-m).
        series = -np.log(-np.expm1(-np.where(falls, self.slope, 1.0)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slack = self.rounding * self.reach * (largest + self.anchor_norm)
            mass = self.reach * largest + slack - self.floor - self.slope * distance + series
            is_small = (mass <= np.log(allowed_mass)) & falls & self.is_anchored[:, None]
        return is_small | np.isneginf(largest) | self.sees_nothing[:, None]


def keys_needed(
    query: Float[np.ndarray, "batch heads query_len head_dim"],
    own_key: Float[np.ndarray, "batch kv_heads query_len head_dim"],
    largest: Float[np.ndarray, "batch kv_heads"],
    slopes: Float[np.ndarray, " heads"],
    *,
    scale: float | None = None,
    tolerance: str | float = "dtype",
) -> Float64[np.ndarray, "batch heads query_len"]:
    """How many keys, its own included, each query of a cache needs; inf if that is not provable.

    All keys farther away carry at most `tolerance` of the mass (SPEC.md §16).

    Args:
        own_key: the key at the position of each query, which it sees.
        largest: the largest norm of a key that was ever read.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    scale = default_scale(scale, head_dim)
    dtype = str(query.dtype)
    rounding = (head_dim + 8) * float(np.finfo(np.promote_types(dtype, np.float32)).eps)
    query = query.astype(np.float64)
    own_key = shared_heads(own_key, heads).astype(np.float64)
    largest = np.repeat(largest, heads // largest.shape[1], axis=1)[:, :, None]
    falls = (slopes > 0)[:, None]
    slope = np.where(falls, slopes.astype(np.float64)[:, None], 1.0)
    reach = scale * np.linalg.norm(query, axis=-1)
    slack = rounding * reach * (largest + np.linalg.norm(own_key, axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        series = -np.log(-np.expm1(-slope))
        above = reach * largest + slack - scale * (query * own_key).sum(axis=-1)
        log_tolerance = np.log(tolerance_of(tolerance, dtype))
        needed = np.ceil((above + series - log_tolerance) / slope)
    return np.where(falls & np.isfinite(needed), needed.clip(1), np.inf)


def keys_needed_after(
    floor: float,
    reach: float,
    largest: float,
    slope: float,
    *,
    count: int,
    head_dim: int,
    epsilon: float,
    allowed_mass: float,
) -> float:
    """As `keys_needed`, for one query whose logits with its nearest keys are known: fewer.

    In plain numbers, because a step of generation asks it for every head, and little else.

    Args:
        floor: the logarithm of the sum of e^logit, bias included, over visible ones of the `count`
            nearest keys, as a backend computes it.
        reach: scale ‖q‖.
        epsilon: of the dtype in which logits and norms are computed.
    """
    if not slope > 0:
        return math.inf
    # Of the products and norms; of the biases and their addition, and the sum of exponentials.
    slack = 2 * epsilon * (head_dim + 8) * reach * largest
    slack += 2 * epsilon * (count * (1 + slope) + 2 * abs(floor))
    series = -math.log(-math.expm1(-slope))
    above = reach * largest + slack - floor
    needed = (above + series - math.log(allowed_mass)) / slope
    return max(1.0, needed) if math.isfinite(needed) else math.inf


def dropped_mass(
    plan: AttentionPlan,
    query: Float[np.ndarray, "batch heads query_len head_dim"],
    key: Float[np.ndarray, "batch kv_heads key_len head_dim"],
    slopes: Float[np.ndarray, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
    segment_ids: Integer[np.ndarray, "batch key_len"] | None = None,
) -> Float64[np.ndarray, "batch heads query_len"]:
    """The share of each query's attention mass outside its range, by brute force: for tests."""
    query_len, key_len = query.shape[2], key.shape[2]
    logits = biased_logits(
        *(query, key, slopes),
        causal=causal,
        scale=scale,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
    )
    block = np.arange(key_len) // plan.block_size
    own = np.arange(query_len) // plan.block_size  # each query's block
    first, last = plan.first[:, :, own, None], plan.last[:, :, own, None]
    is_outside = (block < first) | (block >= last)
    return np.where(is_outside, masked_softmax(logits), 0.0).sum(axis=-1)


def _anchors(
    visible: Bool[np.ndarray, "batch key_len"], causal: bool
) -> Int[np.ndarray, "batch key_len"]:
    """The visible key nearest to each position, not after it if causal; -1 where there is none."""
    position = np.arange(visible.shape[1])
    before = np.maximum.accumulate(np.where(visible, position, -1), axis=1)
    if causal:
        return before
    none = 2 * len(position)  # farther than any
    after = np.where(visible, position, none)[:, ::-1]
    after = np.minimum.accumulate(after, axis=1)[:, ::-1]
    is_before = (before >= 0) & (position - before <= after - position)
    return np.where(is_before, before, np.where(after < none, after, -1))


def _last_true(
    holds: Callable[[np.ndarray], _Flags], highest: Int[np.ndarray, "batch heads query_len"]
) -> Int[np.ndarray, "batch heads query_len"]:
    """The largest number in 0 … `highest` that `holds`, elementwise; it holds at 0 and is monotone.

    Binary search: as many evaluations as `highest` has bits.
    """
    low, high = np.zeros_like(highest), highest.copy()
    for _ in range(int(highest.max(initial=0)).bit_length()):
        middle = (low + high + 1) // 2
        does_hold = holds(middle)
        low, high = np.where(does_hold, middle, low), np.where(does_hold, high, middle - 1)
    return low
