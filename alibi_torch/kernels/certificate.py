"""The certificate: which keys provably cannot change a result (SPEC.md §9).

`alibi_spec.certificate` is the same in NumPy. Norms and products are computed in float32 (float64
for float64 inputs), and their rounding is part of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_spec.certificate import tolerance_of
from alibi_torch.kernels.call import Call

# The bound itself is float64, so that only the rounding of norms and products matters.
_BOUND = torch.float64
_PRODUCT_ELEMENTS = 2**22  # of queries times anchors that are multiplied at once


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of keys that each block of queries needs.

    Attributes:
        first, last: half-open ranges of key blocks.
        share: computed blocks over all blocks, those of the future excluded if causal; 0 without
            queries.
        block_size: positions in a block.
    """

    first: Integer[Tensor, "batch heads query_blocks"]
    last: Integer[Tensor, "batch heads query_blocks"]
    share: Float[Tensor, "batch heads"]
    block_size: int


def attention_plan(call: Call, block_size: int) -> AttentionPlan:
    """Ranges of key blocks outside which every query's attention mass is at most `tolerance`."""
    query, key, device = call.query, call.key, call.query.device
    allowed_mass = tolerance_of(call.tolerance, str(query.dtype).removeprefix("torch."))
    query_len, key_len = query.shape[2], key.shape[2]
    if 0 in query.shape[:3]:
        none = torch.zeros((*query.shape[:2], -(-query_len // block_size)), device=device)
        return AttentionPlan(none.long(), none.long(), none.sum(dim=-1), block_size)
    causal, mask = call.causal, call.attention_mask
    position = torch.arange(call.query_start, call.query_start + query_len, device=device)
    visible = None if mask is None else mask.to(torch.bool)
    anchor = None if visible is None else _anchors(visible, causal)[:, position]
    queries = _Queries.of(call, anchor)

    blocks, own_block = -(-key_len // block_size), position // block_size
    largest = _block_norms(key, visible, block_size).repeat_interleave(queries.group, dim=1)
    # Over the blocks before a block, and over a number of last blocks; -inf over none.
    nothing = largest.new_full((*largest.shape[:2], 1), -torch.inf)
    largest_before = torch.cat([nothing, largest.cummax(dim=-1).values], dim=-1)
    largest_from = torch.cat([nothing, largest.flip(-1).cummax(dim=-1).values], dim=-1)

    def skips_before(
        block: Integer[Tensor, "batch heads query_len"],
    ) -> Bool[Tensor, "batch heads query_len"]:
        mass = allowed_mass if causal else allowed_mass / 2
        distance = position - block * block_size + 1
        return queries.may_skip(largest_before.gather(-1, block), distance, mass)

    def skips_after(
        count: Integer[Tensor, "batch heads query_len"],
    ) -> Bool[Tensor, "batch heads query_len"]:
        distance = (blocks - count) * block_size - position
        return queries.may_skip(largest_from.gather(-1, count), distance, allowed_mass / 2)

    first = _last_true(skips_before, own_block.expand(query.shape[:3]), blocks)
    last = (own_block + 1).expand(query.shape[:3])
    if not causal:
        after = (blocks - 1 - own_block).expand(query.shape[:3])
        last = blocks - _last_true(skips_after, after, blocks)
    if queries.sees_nothing is not None:
        first = torch.where(queries.sees_nothing, blocks, first)
        last = torch.where(queries.sees_nothing, 0, last)
    first = -_block_max(-first, block_size)  # the least of a block of queries
    last = torch.maximum(first, _block_max(last, block_size))
    allowed = (
        _block_max(own_block, block_size) + 1 if causal else torch.full_like(last[0, 0], blocks)
    )
    share = (last - first).sum(dim=-1) / allowed.sum()
    return AttentionPlan(first, last, share, block_size)


def keys_needed(
    query: Float[Tensor, "batch heads query_len head_dim"],
    own_key: Float[Tensor, "batch kv_heads query_len head_dim"],
    largest: Float[Tensor, "batch kv_heads"],
    slopes: Float[Tensor, " heads"],
    scale: float,
) -> Float[Tensor, "batch heads query_len"]:
    """How many keys, its own included, each query of a cache needs; inf if that is not provable.

    `largest` is that of all keys that were ever read (SPEC.md §16).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (own_key.shape[1], -1)).to(dtype)
    own_key = own_key[:, :, None].to(dtype)
    reach = scale * torch.linalg.vector_norm(grouped, dim=-1).to(_BOUND)
    logit = scale * (grouped * own_key).sum(dim=-1).to(_BOUND)
    norm = torch.linalg.vector_norm(own_key, dim=-1).to(_BOUND)
    largest = largest[:, :, None, None]
    slack = (query.shape[3] + 8) * torch.finfo(dtype).eps * reach * (largest + norm)
    above = (reach * largest + slack - logit).flatten(1, 2)
    falls = (slopes > 0)[:, None]
    slope = torch.where(falls, slopes.to(_BOUND)[:, None], 1.0)
    series = -torch.log(-torch.expm1(-slope))
    limit = math.log(tolerance_of("dtype", str(query.dtype).removeprefix("torch.")))
    needed = ((above + series - limit) / slope).ceil()
    return needed.clamp(min=1).where(falls & needed.isfinite(), math.inf)


@dataclass(frozen=True)
class _Queries:
    """The facts about every query that the certificate uses.

    Attributes:
        reach: scale ‖q‖, so that no logit exceeds reach · ‖k‖.
        ceiling: upper bound of -log Z: minus the biased logit with the anchor (-L of SPEC.md §9),
            plus the largest rounding error of that logit.
        slope: of the head.
        is_anchored: the query sees its anchor; None if all do.
        sees_nothing: no key is visible to the query; None if all see one.
        rounding: relative error of reach · ‖k‖ as it is computed.
        group: query heads per head of keys.
    """

    reach: Float[Tensor, "batch heads query_len"]
    ceiling: Float[Tensor, "batch heads query_len"]
    slope: Float[Tensor, "heads 1"]
    is_anchored: Bool[Tensor, "batch 1 query_len"] | None
    sees_nothing: Bool[Tensor, "batch 1 query_len"] | None
    rounding: float
    group: int

    @classmethod
    def of(cls, call: Call, anchor: Integer[Tensor, "batch query_len"] | None) -> _Queries:
        """From the arrays of a call; `anchor` is the nearest visible key or -1, None if every query
        sees its own."""
        query, key, segments = call.query, call.key, call.segment_ids
        query_start, query_end = call.query_start, call.query_start + query.shape[2]
        group = query.shape[1] // key.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        slope = call.slopes.to(_BOUND)[:, None]
        penalty, is_anchored, sees_nothing = 0.0, None, None
        if anchor is None:
            anchor_key = key[:, :, query_start:query_end]
        else:
            sees_nothing, index = (anchor < 0)[:, None], anchor.clamp(min=0)
            anchor_key = key.gather(
                2, index[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3])
            )
            position = torch.arange(query_start, query_end, device=query.device)
            penalty = slope * (position - anchor).abs()[:, None]
            is_anchored = ~sees_nothing
            if segments is not None:
                same = segments.gather(1, index) == segments[:, query_start:query_end]
                is_anchored = is_anchored & same[:, None]
        grouped = query.unflatten(1, (-1, group))
        logits, reaches = [], []
        # A few heads at a time, so that the products take little memory.
        heads = max(1, _PRODUCT_ELEMENTS // max(1, grouped[:, 0].numel()))
        for some, keys in zip(grouped.split(heads, 1), anchor_key.split(heads, 1), strict=True):
            some, keys = some.to(dtype), keys[:, :, None].to(dtype)
            logits.append((some * keys).sum(dim=-1).flatten(1, 2))
            reaches.append(torch.linalg.vector_norm(some, dim=-1).flatten(1, 2))
        logit, reach = (
            call.scale * torch.cat(each, dim=1).to(_BOUND) for each in (logits, reaches)
        )
        anchor_norm = torch.linalg.vector_norm(anchor_key, dim=-1, dtype=dtype).to(_BOUND)
        rounding = (query.shape[3] + 8) * torch.finfo(dtype).eps
        ceiling = rounding * reach * anchor_norm.repeat_interleave(group, dim=1)
        ceiling = ceiling - logit + penalty
        return cls(reach, ceiling, slope, is_anchored, sees_nothing, rounding, group)

    def may_skip(
        self,
        largest: Float[Tensor, "batch heads query_len"],
        distance: Integer[Tensor, "batch heads query_len"],
        allowed_mass: float,
    ) -> Bool[Tensor, "batch heads query_len"]:
        """Whether all keys this far or farther, of norms up to `largest`, may be skipped."""
        falls = self.slope > 0
        # The geometric series of e^-m sums to 1 / (1 - e^-m).
        series = -torch.log(-torch.expm1(-torch.where(falls, self.slope, 1.0)))
        mass = self.reach * largest * (1 + self.rounding) + self.ceiling + series
        limit = math.log(allowed_mass) if allowed_mass > 0 else -math.inf
        is_small = (mass - self.slope * distance <= limit) & falls
        if self.is_anchored is not None:
            is_small = is_small & self.is_anchored
        may_skip = is_small | torch.isneginf(largest)
        return may_skip if self.sees_nothing is None else may_skip | self.sees_nothing


def _block_norms(
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    visible: Bool[Tensor, "batch key_len"] | None,
    block_size: int,
) -> Float[Tensor, "batch kv_heads key_blocks"]:
    """The largest ‖k‖ of the visible keys of each block; -inf where there is none."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    norms = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).to(_BOUND)
    if visible is not None:
        norms = norms.masked_fill(~visible[:, None], -torch.inf)
    return _block_max(norms, block_size)


def _block_max(x: Tensor, block_size: int) -> Tensor:
    """The largest number of each block of the last axis, whose last block can be shorter."""
    whole = x.shape[-1] // block_size * block_size
    parts = x[..., :whole].unflatten(-1, (-1, block_size)).amax(dim=-1) if whole else x[..., :0]
    rest = x[..., whole:]
    return torch.cat([parts, rest.amax(dim=-1, keepdim=True)], dim=-1) if rest.shape[-1] else parts


def _anchors(
    visible: Bool[Tensor, "batch key_len"], causal: bool
) -> Integer[Tensor, "batch key_len"]:
    """The visible key nearest to each position, not after it if causal; -1 where there is none."""
    position = torch.arange(visible.shape[1], device=visible.device)
    before = torch.where(visible, position, -1).cummax(dim=-1).values
    if causal:
        return before
    none = 2 * visible.shape[1]  # farther than any
    after = torch.where(visible, position, none).flip(-1).cummin(dim=-1).values.flip(-1)
    is_before = (before >= 0) & (position - before <= after - position)
    return torch.where(is_before, before, torch.where(after < none, after, -1))


def _last_true(
    holds: Callable[[Tensor], Tensor],
    highest: Integer[Tensor, "batch heads query_len"],
    limit: int,
) -> Integer[Tensor, "batch heads query_len"]:
    """The largest number in 0 … `highest` that `holds`, elementwise; it holds at 0 and is monotone.

    Binary search. `limit` is above every `highest`: its bits are the number of steps.
    """
    low, high = torch.zeros_like(highest), highest
    for _ in range((limit - 1).bit_length()):
        middle = (low + high + 1) // 2
        does_hold = holds(middle)
        low, high = torch.where(does_hold, middle, low), torch.where(does_hold, high, middle - 1)
    return low
