"""From certified windows to few large products: which tiles of queries and keys meet.

A tile is one block of queries with one contiguous range of keys. Consecutive blocks whose ranges
have the same width form a run: their keys are overlapping views of one array, and since the bias
depends on distances alone, they share one bias. Within a tile queries stand in reverse order, so
that the bias of a row is that of the row above moved by one key: a view of a single row of numbers,
which keeps its precision at every distance and takes no memory.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_torch.kernels.windows import attention_plan

# Numbers that one product may make: of logits, or of the gradients of keys. Runs end there.
_RUN_ELEMENTS = 2**21
# How much wider than the sum of its tiles' own windows a run may be.
_RUN_WASTE = 1.1


class Run(NamedTuple):
    """Tiles of a few heads: `tiles` blocks of `rows` queries, each with `width` keys.

    Tile t holds the queries from `row + t * rows` and the keys from `start + t * rows`.
    """

    heads: slice
    row: int
    rows: int
    tiles: int
    start: int
    width: int

    @property
    def products(self) -> int:
        """How many pairs of a query and a key meet."""
        return (self.heads.stop - self.heads.start) * self.tiles * self.rows * self.width


def windows_of(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    slopes: Float[Tensor, " heads"],
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
    *,
    causal: bool,
    scale: float,
    tolerance: float,
    block_size: int,
) -> Integer[Tensor, "2 heads query_blocks"]:
    """First key and end of the keys that each block of queries needs, in any sequence of the batch.

    Where the certificate's ranges differ between sequences, all take the widest. A block whose
    queries see no key has an empty range.
    """
    plan = attention_plan(
        *(query, key, slopes),
        causal=causal,
        scale=scale,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        tolerance=tolerance,
        block_size=block_size,
    )
    first = plan.first.amin(dim=0) * block_size
    last = torch.where(plan.last > plan.first, plan.last, 0).amax(dim=0) * block_size
    query_len, key_len = query.shape[2], key.shape[2]
    end = torch.arange(plan.first.shape[2], device=query.device) * block_size + block_size
    end = end.clamp(max=query_len) + (key_len - query_len)  # after the position of the last query
    last = torch.minimum(last, end) if causal else last.clamp(max=key_len)
    return torch.stack([first, last])


def runs_of(
    windows: Integer[Tensor, "2 heads query_blocks"],
    query_len: int,
    key_len: int,
    block_size: int,
    *,
    group: int,
    key_elements: int,
) -> list[Run]:
    """The runs that cover all windows, those with most to do first.

    Heads that share keys and have equal runs go together.

    Args:
        group: query heads per head of keys.
        key_elements: numbers per key that a product makes, in all sequences of the batch.
    """
    heads_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, ranges in enumerate(windows.permute(1, 2, 0).tolist()):
        for run in _head_runs(ranges, query_len, key_len, block_size, key_elements):
            heads_of[run].append(head)
    runs = []
    for (row, rows, count, start, width), heads in heads_of.items():
        blocks = count * -(-rows // block_size)
        limit = max(1, _RUN_ELEMENTS // (blocks * width * key_elements))
        for begin, end in _neighbours(heads, group, limit):
            runs.append(Run(slice(begin, end), row, rows, count, start, width))
    return sorted(runs, key=lambda run: -run.products)


def _head_runs(
    windows: list[list[int]],
    query_len: int,
    key_len: int,
    block_size: int,
    key_elements: int,
) -> list[tuple[int, ...]]:
    """(row, rows, count, start, width) of the runs of one head.

    From each block on, whatever covers more: tiles that slide along with the queries (far from the
    beginning), or one tall tile for several blocks (near it, where windows end at the first key).
    """
    offset, block, runs = key_len - query_len, 0, []
    while block < len(windows):
        first, last = windows[block]
        row = block * block_size
        if first >= last:
            block += 1
            continue
        left, right, start, end = offset + row - first, last - offset - row, first, last
        sliding, tall, needed = 1, 1, last - first
        for other in range(block + 1, len(windows)):
            first, last = windows[other]
            count, position = other + 1 - block, offset + other * block_size
            if first >= last:
                break
            needed += last - first
            limit = min(_RUN_WASTE * needed, _RUN_ELEMENTS / key_elements)
            if sliding == count - 1 and (other + 1) * block_size <= query_len:
                reach = max(left, position - first), max(right, last - position)
                is_inside = reach[0] <= offset + row and position + reach[1] <= key_len
                if is_inside and count * sum(reach) <= limit:
                    (left, right), sliding = reach, count
            if tall == count - 1 and count * (max(end, last) - min(start, first)) <= limit:
                start, end, tall = min(start, first), max(end, last), count
            if max(sliding, tall) < count:
                break
        if tall > sliding:
            rows = min(tall * block_size, query_len - row)
            runs.append((row, rows, 1, start, end - start))
        else:
            rows = min(block_size, query_len - row)
            runs.append((row, rows, sliding, offset + row - left, left + right))
        block += max(sliding, tall)
    return runs


def _neighbours(heads: list[int], group: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of consecutive heads: of any heads, or if keys are shared, of one head of keys."""
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


def reversed_rows(
    runs: list[Run], heads: int, query_len: int, device: torch.device
) -> Integer[Tensor, " all_rows"]:
    """Where each query of each head goes, in [heads, query_len], to reverse every tile.

    Going there twice is coming back.
    """
    index = torch.arange(heads * query_len, device=device).view(heads, query_len)
    for run in runs:
        tiles = index[run.heads, run.row : run.row + run.tiles * run.rows]
        tiles.copy_(tiles.unflatten(1, (run.tiles, run.rows)).flip(2).flatten(1))
    return index.flatten()


def reverse_rows(x: Tensor, index: Integer[Tensor, " all_rows"]) -> Tensor:
    """A copy of x [batch, heads, query_len, …] with the rows of every tile in reverse order."""
    return x.contiguous().flatten(1, 2).index_select(1, index).unflatten(1, x.shape[1:3])


def query_tiles(x: Tensor, run: Run, sequences: slice) -> Tensor:
    """A view of x [batch, heads, query_len, …] as [tiles, heads, rows, …].

    Tiles are the blocks of the run in a single sequence, or one block in many sequences.
    """
    x = x[sequences, run.heads, run.row : run.row + run.tiles * run.rows]
    x = x.unflatten(2, (run.tiles, run.rows))
    return x[:, :, 0] if run.tiles == 1 else x[0].transpose(0, 1)


def key_tiles(x: Tensor, run: Run, sequences: slice, group: int) -> Tensor:
    """A view of x [batch, kv_heads, key_len, …] as [tiles, heads, width, …]."""
    x = x[sequences, _key_heads(run, group)]
    x = x[:, :, run.start : run.start + (run.tiles - 1) * run.rows + run.width]
    if run.tiles > 1:
        x = _windows(x[0], run.width, run.rows)
    return x.expand(-1, run.heads.stop - run.heads.start, *x.shape[2:])


def add_key_tiles(total: Tensor, tiles: Tensor, run: Run, sequences: slice, group: int) -> None:
    """Add [tiles, heads, width, …] to where `key_tiles` took them from, in a fixed order."""
    if group > 1:
        tiles = tiles.sum(dim=1, keepdim=True, dtype=total.dtype)
    total = total[sequences, _key_heads(run, group)]
    if run.tiles == 1:
        total[:, :, run.start : run.start + run.width] += tiles
    elif run.width > run.tiles * run.rows:  # one tile after another
        for index, tile in enumerate(tiles):
            start = run.start + index * run.rows
            total[0, :, start : start + run.width] += tile
    else:  # all tiles at once, as many keys of each as do not overlap
        for part in tiles.split(run.rows, dim=2):
            end = (run.tiles - 1) * run.rows + part.shape[2]
            _windows(total[0, :, run.start : run.start + end], part.shape[2], run.rows).add_(part)
            run = run._replace(start=run.start + run.rows)


def _key_heads(run: Run, group: int) -> slice:
    if group == 1:
        return run.heads
    return slice(run.heads.start // group, run.heads.start // group + 1)


def _windows(x: Tensor, width: int, step: int) -> Tensor:
    """A view of x [heads, keys, …] as [windows, heads, width, …]."""
    return x.unfold(1, width, step).transpose(0, 1).movedim(-1, 2)


def distances(run: Run, offset: int, device: torch.device) -> Integer[Tensor, " diagonals"]:
    """i - j on each diagonal of a tile, from the far corner: its last query and first key."""
    farthest = offset + run.row + run.rows - 1 - run.start
    return farthest - torch.arange(run.width + run.rows - 1, device=device)


def on_diagonals(x: Tensor, run: Run) -> Tensor:
    """A view of [heads, diagonals] as [1, heads, rows, width], rows in reverse order."""
    shape = (1, x.shape[0], run.rows, run.width)
    return x.as_strided(shape, (0, x.stride(0), x.stride(1), x.stride(1)))
