"""The bias of tiles: -m |i - j|, and -inf where a query does not see a key (SPEC.md §2-§4)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_torch.kernels.call import Call
from alibi_torch.kernels.windowed.tiles import (
    Strip,
    distances,
    key_tiles,
    on_diagonals,
    query_tiles,
)


class Bias:
    """-m |i - j| times a unit, for the tiles of one call; -inf where a query may not see a key."""

    def __init__(self, call: Call, unit: float) -> None:
        self.dtype = torch.promote_types(call.query.dtype, torch.float32)
        self._slopes = unit * call.slopes.double()[:, None]
        self._causal, self._query_start = call.causal, call.query_start
        mask = call.attention_mask
        self._visible = None if mask is None else mask.to(torch.bool)
        self._segments = call.segment_ids
        self._obstacles = _obstacles(self._visible, self._segments)

    def distance(self, strip: Strip) -> Float[Tensor, "1 1 height width"]:
        """|i - j| in a tile of a strip; the same for all of its tiles."""
        apart = distances(strip, self._query_start, self._slopes.device).abs().to(self.dtype)
        return on_diagonals(apart[None], strip)

    def of(
        self, strip: Strip, sequences: slice
    ) -> tuple[
        Float[Tensor, "#tiles heads height width"],
        Bool[Tensor, "tiles 1 height 1"] | None,
    ]:
        """The bias, and which queries see no key: the bias lets these see their whole tile."""
        apart = distances(strip, self._query_start, self._slopes.device)
        penalty = (-self._slopes[strip.heads] * apart.abs()).to(self.dtype)  # rounded once
        if self._causal:
            penalty = penalty.masked_fill(apart < 0, -torch.inf)
        bias = on_diagonals(penalty, strip)
        if not self._has_obstacle(strip):
            return bias, None
        seen = apart >= 0 if self._causal else torch.ones_like(apart, dtype=torch.bool)
        visible = on_diagonals(seen[None], strip)
        strip = replace(strip, heads=slice(0, 1))  # masks are the same for all heads
        if self._visible is not None:
            visible = visible & key_tiles(self._visible[:, None, :, None], strip, sequences, 1).mT
        if self._segments is not None:
            of_key = self._segments[:, None, :, None]
            # In reverse order, as all queries of a tile.
            of_query = query_tiles(of_key[:, :, self._query_start :], strip, sequences).flip(2)
            visible = visible & (of_query == key_tiles(of_key, strip, sequences, 1).mT)
        # A softmax of only -inf is NaN: such queries see everything here, and become 0 later.
        is_empty = ~visible.any(dim=-1, keepdim=True)
        return bias.masked_fill(~visible, -torch.inf).masked_fill(is_empty, 0.0), is_empty

    def _has_obstacle(self, strip: Strip) -> bool:
        """Whether a mask or a boundary of segments lies among the keys or queries of a strip."""
        if self._obstacles is None:
            return False
        first_query = self._query_start + strip.first_query
        last_key = strip.first_key + (strip.tiles - 1) * strip.height + strip.width
        start = min(strip.first_key, first_query)
        end = max(last_key, first_query + strip.queries)
        return self._obstacles[end] > self._obstacles[start]


def _obstacles(
    visible: Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
) -> list[int] | None:
    """How many keys before each position are hidden, or begin a segment, in some sequence."""
    if visible is None and segment_ids is None:
        return None
    obstacles = [] if visible is None else [~visible]
    if segment_ids is not None:
        obstacles.append(segment_ids.diff(dim=1, prepend=segment_ids[:, :1]) != 0)
    marks = torch.stack(obstacles).flatten(0, 1).any(dim=0)
    return [0, *marks.long().cumsum(dim=0).tolist()]
