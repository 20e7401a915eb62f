"""From certified windows to a few large products of tiles.

A tile is a block of queries (or several) with one contiguous range of keys. Consecutive blocks
whose windows have the same width form a strip: their keys are overlapping views of one array, and
since the bias depends on distances only, they share one bias. Within a tile queries stand in
reverse order, so that the bias of a query is that of the query above it moved by one key: a view of
a single line of numbers, which keeps its precision at every distance and takes no memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from alibi_torch.kernels.call import Call
from alibi_torch.kernels.certificate import attention_plan
from alibi_torch.kernels.dropout import Dropout

# The most elements of one product (logits, or gradients of keys): a strip ends before it has more.
_PRODUCT_ELEMENTS = 2**21
# The most keys of a strip's tiles, over those of their own windows.
_STRIP_WASTE = 1.1


@dataclass(frozen=True)
class Tiles:
    """The input of the passes for one strip; the queries of each tile in reverse order.

    Attributes:
        query, key, value: of each tile; heads that share keys see the same ones.
        bias: times the `UNIT` of the passes; -inf where a query does not see a key.
        scale: factor on q·k.
        dropout: None without dropout.
        is_ordinary: False if products with hidden keys can be infinite.
    """

    query: Float[Tensor, "tiles heads height head_dim"]
    key: Float[Tensor, "tiles heads width head_dim"]
    value: Float[Tensor, "tiles heads width value_dim"]
    bias: Float[Tensor, "#tiles #heads height width"]
    scale: float
    dropout: Dropout | None
    is_ordinary: bool


# What the passes return: result and log-sums; gradients of query, key, value and perhaps slopes.
Attended = tuple[Float[Tensor, "tiles heads height value_dim"], Float[Tensor, "tiles heads height"]]
Gradients = tuple[Tensor, Tensor, Tensor, Float[Tensor, " heads"] | None]


@dataclass(frozen=True)
class Extent:
    """`tiles` tiles of `height` queries, each with `width` keys.

    Tile t holds the queries from `first_query + t * height` and the keys from
    `first_key + t * height`.
    """

    first_query: int
    height: int
    tiles: int
    first_key: int
    width: int

    @property
    def queries(self) -> int:
        """How many queries all tiles hold."""
        return self.tiles * self.height


@dataclass(frozen=True)
class Strip(Extent):
    """The same tiles of a few consecutive heads."""

    heads: slice

    @property
    def products(self) -> int:
        """How many pairs of a query and a key are computed."""
        return (self.heads.stop - self.heads.start) * self.queries * self.width


def windows_of(call: Call, block_size: int) -> Integer[Tensor, "2 heads query_blocks"]:
    """First key and end of the keys that each block of queries needs, in any sequence of the batch.

    Where the certificate's ranges differ between sequences, all take the widest. A block whose
    queries see no key has an empty window.
    """
    plan, query_len = attention_plan(call, block_size), call.query.shape[2]
    first = plan.first.amin(dim=0) * block_size
    # An empty range must not widen those of other sequences.
    last = torch.where(plan.last > plan.first, plan.last, 0).amax(dim=0) * block_size
    end = torch.arange(1, plan.first.shape[2] + 1, device=call.query.device) * block_size
    end = end.clamp(max=query_len) + call.query_start  # after the position of the last query
    last = torch.minimum(last, end) if call.causal else last.clamp(max=call.key.shape[2])
    return torch.stack([first, last])


def strips_of(
    windows: Integer[Tensor, "2 heads query_blocks"],
    query_start: int,
    query_len: int,
    key_len: int,
    block_size: int,
    *,
    group: int,
    key_elements: int,
) -> list[Strip]:
    """The strips that cover all windows, the largest first.

    Consecutive heads with equal tiles go together; if keys are shared, those of one head of keys.

    Args:
        group: query heads per head of keys.
        key_elements: elements of a product per key and block, in all sequences of the batch.
    """
    heads_of: dict[Extent, list[int]] = defaultdict(list)
    for head, ranges in enumerate(windows.permute(1, 2, 0).tolist()):
        cover = _Cover(ranges, query_start, query_len, key_len, block_size, key_elements)
        for extent in cover.extents():
            heads_of[extent].append(head)
    strips = []
    for extent, heads in heads_of.items():
        blocks = extent.tiles * -(-extent.height // block_size)  # of queries
        limit = max(1, _PRODUCT_ELEMENTS // (blocks * extent.width * key_elements))
        for begin, end in _neighbours(heads, group, limit):
            strips.append(Strip(**vars(extent), heads=slice(begin, end)))
    return sorted(strips, key=lambda strip: -strip.products)


@dataclass(frozen=True)
class _Cover:
    """The windows of one head, to be covered by tiles."""

    windows: list[list[int]]  # first key and end, of each block of queries
    query_start: int
    query_len: int
    key_len: int
    block_size: int
    key_elements: int

    def extents(self) -> list[Extent]:
        """One after another, each of the kind that covers more queries.

        Far from the beginning these are tiles that slide along with the queries; near it, where
        windows end at the first key, one tall tile for several blocks.
        """
        extents, block = [], 0
        while block < len(self.windows):
            first, end = self.windows[block]
            if first >= end:
                block += 1
                continue
            sliding, tall = self._sliding(block), self._tall(block)
            extents.append(tall if tall.queries > sliding.queries else sliding)
            block += -(-extents[-1].queries // self.block_size)
        return extents

    def _sliding(self, block: int) -> Extent:
        """Tiles of one block each, all with the widest reach to either side of the first query."""
        start, first_query = self.query_start, block * self.block_size
        first, end = self.windows[block]
        # The reach of a tile: its keys before its first query, and from there on.
        before, after = start + first_query - first, end - (start + first_query)
        tiles, needed = 1, end - first
        for first, end in islice(self.windows, block + 1, None):
            query = first_query + tiles * self.block_size
            needed += end - first
            reach = max(before, start + query - first), max(after, end - (start + query))
            # All tiles have the same reach. So the first must not begin before the first key, the
            # last must not end after the last key, and a shorter block of queries cannot join.
            has_keys = reach[0] <= start + first_query and start + query + reach[1] <= self.key_len
            is_whole = query + self.block_size <= self.query_len
            fits = (tiles + 1) * sum(reach) <= self._limit(needed)
            if first >= end or not (has_keys and is_whole and fits):
                break
            (before, after), tiles = reach, tiles + 1
        height = min(self.block_size, self.query_len - first_query)
        return Extent(first_query, height, tiles, start + first_query - before, before + after)

    def _tall(self, block: int) -> Extent:
        """One tile of several blocks, with all keys that any of them needs."""
        start, end = self.windows[block]
        blocks, needed = 1, end - start
        for first, last in islice(self.windows, block + 1, None):
            needed += last - first
            union = min(start, first), max(end, last)
            fits = (blocks + 1) * (union[1] - union[0]) <= self._limit(needed)
            if first >= last or not fits:
                break
            (start, end), blocks = union, blocks + 1
        first_query = block * self.block_size
        height = min(blocks * self.block_size, self.query_len - first_query)
        return Extent(first_query, height, 1, start, end - start)

    def _limit(self, needed: int) -> float:
        """The most keys that the tiles of blocks may have together if the blocks need `needed`."""
        return min(_STRIP_WASTE * needed, _PRODUCT_ELEMENTS / self.key_elements)


def _neighbours(heads: list[int], group: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of up to `limit` consecutive heads; with shared keys, each of one head of keys."""
    ranges: list[tuple[int, int]] = []
    for head in heads:
        if ranges:
            begin, end = ranges[-1]
            shares = group == 1 or begin // group == head // group
            if head == end and shares and end - begin < limit:
                ranges[-1] = (begin, head + 1)
                continue
        ranges.append((head, head + 1))
    return ranges


def query_tiles(x: Tensor, strip: Strip, sequences: slice) -> Tensor:
    """A view of x [batch, heads, query_len, …] as [tiles, heads, height, …].

    Tiles are those of the strip in a single sequence, or its only one in many sequences.
    """
    x = x[sequences, strip.heads, strip.first_query : strip.first_query + strip.queries]
    x = x.unflatten(2, (strip.tiles, strip.height))
    return x[:, :, 0] if strip.tiles == 1 else x[0].transpose(0, 1)


def reversed_query_tiles(x: Tensor, strip: Strip, sequences: slice) -> Tensor:
    """A copy of `query_tiles` with the queries of each tile in reverse order, and dense rows."""
    return query_tiles(x, strip, sequences).contiguous().flip(2)


def key_tiles(x: Tensor, strip: Strip, sequences: slice, group: int) -> Tensor:
    """A view of x [batch, kv_heads, key_len, …] as [tiles, heads, width, …]."""
    x = x[sequences, _key_heads(strip, group)]
    start, moved = strip.first_key, (strip.tiles - 1) * strip.height
    x = x[:, :, start : start + moved + strip.width]
    if strip.tiles > 1:
        x = _overlapping(x[0], strip.width, strip.height)
    # With shared keys one head of keys stands for all heads of the strip.
    return x.expand(-1, strip.heads.stop - strip.heads.start, *x.shape[2:])


def add_key_tiles(total: Tensor, tiles: Tensor, strip: Strip, sequences: slice, group: int) -> None:
    """Add [tiles, heads, width, …] to where `key_tiles` took them from, in a fixed order."""
    if group > 1:
        tiles = tiles.sum(dim=1, keepdim=True, dtype=total.dtype)
    total, start = total[sequences, _key_heads(strip, group)], strip.first_key
    if strip.tiles == 1:
        total[:, :, start : start + strip.width] += tiles
    elif strip.width > strip.queries:  # fewer tiles than parts, as below
        for tile in tiles:
            total[0, :, start : start + strip.width] += tile
            start += strip.height
    else:  # tiles in parts of `height` keys: the n-th parts of all tiles do not overlap
        for part in tiles.split(strip.height, dim=2):
            end = start + (strip.tiles - 1) * strip.height + part.shape[2]
            _overlapping(total[0, :, start:end], part.shape[2], strip.height).add_(part)
            start += strip.height


def _key_heads(strip: Strip, group: int) -> slice:
    if group == 1:
        return strip.heads
    return slice(strip.heads.start // group, strip.heads.start // group + 1)


def _overlapping(x: Tensor, width: int, step: int) -> Tensor:
    """A view of x [heads, keys, …] as [tiles, heads, width, …], each tile `step` keys farther."""
    return x.unfold(1, width, step).transpose(0, 1).movedim(-1, 2)


def distances(
    strip: Strip, query_start: int, device: torch.device
) -> Integer[Tensor, " diagonals"]:
    """i - j on each diagonal of a tile, from the far corner: its last query and first key."""
    farthest = query_start + strip.first_query + strip.height - 1 - strip.first_key
    return farthest - torch.arange(strip.width + strip.height - 1, device=device)


def on_diagonals(x: Tensor, strip: Strip) -> Tensor:
    """A view of [heads, diagonals] as [1, heads, height, width], queries in reverse order."""
    # In that order the next query and the next key are both one diagonal on: equal strides.
    shape = (1, x.shape[0], strip.height, strip.width)
    return x.as_strided(shape, (0, x.stride(0), x.stride(1), x.stride(1)))
