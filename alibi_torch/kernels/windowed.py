"""Attention over certified windows, tile by tile: the cost grows linearly with the sequence.

`windows` says which keys a query needs, `runs` groups them into tiles, `workers` shares these out
among threads, and `aten_flash` or `blockwise` computes them. The whole is one operator with a
gradient, which torch.compile, torch.func and checkpointing see as a box. Its backward pass computes
every tile again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Integer
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from alibi_spec.windows import BLOCK_SIZE, tolerance_of
from alibi_torch.kernels import aten_flash, blockwise
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.dropout import Dropout
from alibi_torch.kernels.finite import are_ordinary, broken_rows, cleaned
from alibi_torch.kernels.runs import (
    Run,
    add_key_tiles,
    distances,
    key_tiles,
    on_diagonals,
    query_tiles,
    reverse_rows,
    reversed_rows,
    runs_of,
    windows_of,
)
from alibi_torch.kernels.workers import Results, with_workers

# What is held of every pair of a tile at once with dropout, so that runs are shorter and stay in
# the cache.
_PASSES = 4
_NO_TANGENTS = "attention over windows has no forward-mode derivative; use implementation='dense'"
TILES = {"aten_flash": aten_flash, "blockwise": blockwise}


def attention(call: Call, tiles: str) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Attention of one call, its tiles computed by one of `TILES`."""
    arrays = (call.query, call.key, call.value, call.slopes)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or not any(map(is_functorch_wrapped_tensor, arrays)):
        _refuse_tangents(*arrays)  # torch.func asks `jvp` below
    attend: Any = _AttendEagerly.apply
    if is_compiling:  # and a Function may only be where there are gradients
        has_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in arrays)
        attend = _Attend.apply if has_gradients else _attend
    attended, _, _ = attend(
        *arrays,
        *(call.attention_mask, call.segment_ids),
        *((None, None) if call.dropout is None else call.dropout[1:]),
        call.causal,
        call.scale,
        tolerance_of(call.tolerance, str(call.query.dtype).removeprefix("torch.")),
        tiles,
        BLOCK_SIZE,
        0.0 if call.dropout is None else call.dropout.rate,
    )
    return attended


@torch.library.custom_op(
    "alibi_torch::attend",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor slopes, Tensor? attention_mask, "
    "Tensor? segment_ids, Tensor? query_hashes, Tensor? key_hashes, bool causal, float scale, "
    "float tolerance, str tiles, int block_size, float dropout) -> (Tensor, Tensor, Tensor)",
)
def _attend(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    value: Float[Tensor, "batch kv_heads key_len value_dim"],
    slopes: Float[Tensor, " heads"],
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
    query_hashes: Int32[Tensor, "batch heads query_len"] | None,
    key_hashes: Int32[Tensor, " key_len"] | None,
    causal: bool,
    scale: float,
    tolerance: float,
    tiles: str,
    block_size: int,
    dropout: float,
) -> tuple[
    Float[Tensor, "batch heads query_len value_dim"],
    Float[Tensor, "batch heads query_len"],
    Integer[Tensor, "2 heads query_blocks_and_one"],
]:
    """Attended values; the logarithm of each softmax's denominator; the windows, the last empty."""
    is_ordinary, broken = are_ordinary(query, key, value), None
    if not is_ordinary:
        tiles = "blockwise"
        broken = broken_rows(query, key, value, causal, attention_mask, segment_ids)
        query, key, value = cleaned(query, key, value, attention_mask)
    key, value = _with_dense_rows(key), _with_dense_rows(value)

    def compute(results: Results) -> tuple[Tensor, Tensor, Tensor]:
        windows = windows_of(
            *(query, key, slopes, attention_mask, segment_ids),
            causal=causal,
            scale=scale,
            tolerance=tolerance,
            block_size=block_size,
        )
        windows = torch.nn.functional.pad(windows, (0, 1))  # as `_shapes` says
        masks = (attention_mask, segment_ids)
        bias = _Bias(query, key, slopes, *masks, causal, TILES[tiles].UNIT)
        runs, rows = _runs(windows, query, key, block_size, dropout)
        upended, group = reverse_rows(query, rows), query.shape[1] // key.shape[1]
        hashes = None if query_hashes is None else reverse_rows(query_hashes, rows)
        attended = value.new_zeros((*query.shape[:3], value.shape[3]))
        log_totals = slopes.new_zeros(query.shape[:3], dtype=bias.dtype)

        def compute_run(part: tuple[Run, slice]) -> None:
            run, sequences = part
            tile_bias, is_empty = bias.of(run, sequences)
            tile, log_total = TILES[tiles].forward(
                _cleared(query_tiles(upended, run, sequences), is_empty),
                key_tiles(key, run, sequences, group),
                key_tiles(value, run, sequences, group),
                tile_bias,
                scale,
                _dropout(dropout, hashes, key_hashes, run, sequences),
                is_ordinary,
            )
            query_tiles(attended, run, sequences).copy_(_cleared(tile, is_empty))
            query_tiles(log_totals, run, sequences).copy_(log_total)

        for _ in results(compute_run, runs):
            pass  # every run writes its own rows
        attended, log_totals = reverse_rows(attended, rows), reverse_rows(log_totals, rows)
        if broken is not None:
            attended = attended.masked_fill(broken, math.nan)
        return attended, log_totals, windows

    return with_workers(query.device, compute)


@torch.library.custom_op(
    "alibi_torch::attend_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor slopes, "
    "Tensor? attention_mask, Tensor? segment_ids, Tensor? query_hashes, Tensor? key_hashes, "
    "Tensor attended, Tensor log_totals, Tensor windows, bool causal, float scale, str tiles, "
    "int block_size, float dropout, bool needs_slopes) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    gradient: Float[Tensor, "batch heads query_len value_dim"],
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    value: Float[Tensor, "batch kv_heads key_len value_dim"],
    slopes: Float[Tensor, " heads"],
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
    query_hashes: Int32[Tensor, "batch heads query_len"] | None,
    key_hashes: Int32[Tensor, " key_len"] | None,
    attended: Float[Tensor, "batch heads query_len value_dim"],
    log_totals: Float[Tensor, "batch heads query_len"],
    windows: Integer[Tensor, "2 heads query_blocks_and_one"],
    causal: bool,
    scale: float,
    tiles: str,
    block_size: int,
    dropout: float,
    needs_slopes: bool,
) -> tuple[
    Float[Tensor, "batch heads query_len head_dim"],
    Float[Tensor, "batch kv_heads key_len head_dim"],
    Float[Tensor, "batch kv_heads key_len value_dim"],
    Float[Tensor, " heads"],
]:
    """Gradients of query, key, value and slopes; zeros for slopes that need none."""
    is_ordinary = are_ordinary(query, key, value)  # as in the forward pass
    if not is_ordinary:
        tiles = "blockwise"
        broken = broken_rows(query, key, value, causal, attention_mask, segment_ids)
        query, key, value = cleaned(query, key, value, attention_mask)
        gradient, attended = gradient.masked_fill(broken, 0.0), attended.masked_fill(broken, 0.0)
    key, value = _with_dense_rows(key), _with_dense_rows(value)

    def compute(results: Results) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        masks = (attention_mask, segment_ids)
        bias = _Bias(query, key, slopes, *masks, causal, TILES[tiles].UNIT)
        runs, rows = _runs(windows, query, key, block_size, dropout)
        hashes = None if query_hashes is None else reverse_rows(query_hashes, rows)
        upended = [reverse_rows(x, rows) for x in (gradient, query, attended, log_totals)]
        group = query.shape[1] // key.shape[1]

        def compute_run(
            part: tuple[Run, slice],
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            run, sequences = part
            tile_bias, is_empty = bias.of(run, sequences)
            cotangent, tile_query, *tile = (query_tiles(x, run, sequences) for x in upended)
            return TILES[tiles].backward(
                _cleared(cotangent, is_empty),
                _cleared(tile_query, is_empty),
                key_tiles(key, run, sequences, group),
                key_tiles(value, run, sequences, group),
                *tile,
                tile_bias,
                scale,
                bias.distance(run) if needs_slopes else None,
                _dropout(dropout, hashes, key_hashes, run, sequences),
                is_ordinary,
            )

        of_query = torch.zeros_like(upended[1])
        # Tiles overlap in keys: what they add to one is summed in the dtype of the logits.
        of_key, of_value = (x.new_zeros(x.shape, dtype=bias.dtype) for x in (key, value))
        of_slopes = slopes.new_zeros(slopes.shape, dtype=bias.dtype)
        for (run, sequences), of_tile in results(compute_run, runs):
            query_tiles(of_query, run, sequences).copy_(of_tile[0])
            add_key_tiles(of_key, of_tile[1], run, sequences, group)
            add_key_tiles(of_value, of_tile[2], run, sequences, group)
            if of_tile[3] is not None:
                of_slopes[run.heads] += of_tile[3]
        of_query = reverse_rows(of_query, rows)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_slopes.to(slopes.dtype)

    return with_workers(query.device, compute)


def _runs(
    windows: Integer[Tensor, "2 heads query_blocks_and_one"],
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    block_size: int,
    dropout: float,
) -> tuple[list[tuple[Run, slice]], Integer[Tensor, " all_rows"]]:
    """Every run with the sequences that it is computed for at once; the order of the rows."""
    batch, heads, query_len, head_dim = query.shape
    runs = runs_of(
        *(windows, query_len, key.shape[2], block_size),
        group=heads // key.shape[1],
        key_elements=batch * max(head_dim, block_size) * (_PASSES if dropout > 0 else 1),
    )
    all_at_once, one_by_one = [slice(0, batch)], [slice(b, b + 1) for b in range(batch)]
    pairs = [
        (run, each) for run in runs for each in (all_at_once if run.tiles == 1 else one_by_one)
    ]
    return pairs, reversed_rows(runs, heads, query_len, query.device)


def _dropout(
    rate: float,
    hashes: Int32[Tensor, "batch heads query_len"] | None,
    key_hashes: Int32[Tensor, " key_len"] | None,
    run: Run,
    sequences: slice,
) -> Dropout | None:
    """The dropout of a run's tiles, whose rows are in reverse order, as those of `hashes`."""
    if hashes is None or key_hashes is None:
        return None
    run, of_query = run._replace(heads=slice(0, 1)), query_tiles(hashes, run, sequences)
    of_key = key_tiles(key_hashes[None, None], run, slice(0, 1), 1)
    return Dropout(rate, of_query, of_key)


def _cleared(
    x: Float[Tensor, "tiles heads rows width"], is_empty: Bool[Tensor, "tiles 1 rows 1"] | None
) -> Float[Tensor, "tiles heads rows width"]:
    """0 where a query sees no key, so that nothing can overflow there."""
    return x if is_empty is None else x.masked_fill(is_empty, 0.0)


def _with_dense_rows(x: Tensor) -> Tensor:
    # ATen's kernel takes any strides but that of the last axis, which it does not look at.
    return x if x.stride(-1) == 1 else x.contiguous()


class _Bias:
    """-m |i - j| times a unit, for tiles; -inf where a query may not see a key."""

    def __init__(
        self,
        query: Float[Tensor, "batch heads query_len head_dim"],
        key: Float[Tensor, "batch kv_heads key_len head_dim"],
        slopes: Float[Tensor, " heads"],
        attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
        segment_ids: Integer[Tensor, "batch key_len"] | None,
        causal: bool,
        unit: float,
    ) -> None:
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self._slopes = unit * slopes.double()[:, None]
        self._offset = key.shape[2] - query.shape[2]
        self._causal = causal
        self._visible = None if attention_mask is None else attention_mask.to(torch.bool)
        self._segments = segment_ids
        self._obstacles = _obstacles(self._visible, segment_ids)

    def distance(self, run: Run) -> Float[Tensor, "1 1 rows width"]:
        """|i - j| for one tile of a run, which is that of every tile."""
        apart = distances(run, self._offset, self._slopes.device).abs().to(self.dtype)
        return on_diagonals(apart[None], run)

    def of(
        self, run: Run, sequences: slice
    ) -> tuple[
        Float[Tensor, "#tiles heads rows width"],
        Bool[Tensor, "tiles 1 rows 1"] | None,
    ]:
        """The bias, and which queries see no key: these see all of their tile instead."""
        apart = distances(run, self._offset, self._slopes.device)
        penalty = (-self._slopes[run.heads] * apart.abs()).to(self.dtype)  # rounded once
        if self._causal:
            penalty = penalty.masked_fill(apart < 0, -torch.inf)
        bias = on_diagonals(penalty, run)
        if not self._has_obstacle(run):
            return bias, None
        seen = apart >= 0 if self._causal else torch.ones_like(apart, dtype=torch.bool)
        visible = on_diagonals(seen[None], run)
        run = run._replace(heads=slice(0, 1))
        if self._visible is not None:
            visible = visible & key_tiles(self._visible[:, None, :, None], run, sequences, 1).mT
        if self._segments is not None:
            of_key = self._segments[:, None, :, None]
            of_query = query_tiles(of_key[:, :, self._offset :], run, sequences).flip(2)
            visible = visible & (of_query == key_tiles(of_key, run, sequences, 1).mT)
        is_empty = ~visible.any(dim=-1, keepdim=True)
        return bias.masked_fill(~visible, -torch.inf).masked_fill(is_empty, 0.0), is_empty

    def _has_obstacle(self, run: Run) -> bool:
        """Whether a mask or a boundary of segments lies among the keys or queries of a run."""
        if self._obstacles is None:
            return False
        moved = (run.tiles - 1) * run.rows
        start = min(run.start, self._offset + run.row)
        end = max(run.start + moved + run.width, self._offset + run.row + moved + run.rows)
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


@_attend.register_fake
def _shapes(
    query: Tensor, _key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, query_len, _ = query.shape
    dtype, block_size = torch.promote_types(query.dtype, torch.float32), options[-2]
    return (
        value.new_empty((batch, heads, query_len, value.shape[3])),
        query.new_empty((batch, heads, query_len), dtype=dtype),
        # An empty block more: torch.export goes by its example where a size may be 1.
        query.new_empty((2, heads, -(-query_len // block_size) + 1), dtype=torch.int64),
    )


@_attend_backward.register_fake
def _backward_shapes(_gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


def _one_by_one(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    *arguments: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each element of the axis that vmap maps."""
    pairs = list(zip(arguments, in_dims, strict=True))
    calls = [
        function.apply(*(x if axis is None else x.select(axis, index) for x, axis in pairs))
        for index in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(each) for each in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


class _Attend(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _attend(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.causal, ctx.scale, _, ctx.tiles, ctx.block_size, ctx.dropout = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        needs_slopes = ctx.needs_input_grad[3]
        options = (ctx.causal, ctx.scale, ctx.tiles, ctx.block_size, ctx.dropout, needs_slopes)
        # The compiler cannot follow one Function inside another, but needs none of what it adds.
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        *gradients, of_slopes = differentiate(output_gradients[0], *ctx.saved_tensors, *options)
        return *gradients, of_slopes if needs_slopes else None, *[None] * 10


def _refuse_tangents(*arrays: Tensor) -> None:
    if any(unpack_dual(x).tangent is not None for x in arrays):
        raise RuntimeError(_NO_TANGENTS)


class _AttendEagerly(_Attend):
    """`_Attend` with what torch.func asks for besides, and the compiler refuses."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # noqa: ARG004
        raise RuntimeError(_NO_TANGENTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_AttendEagerly, info, in_dims, *arguments)


class _AttendBackward(torch.autograd.Function):
    """`_attend_backward`, which nobody may differentiate."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _attend_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:  # noqa: ARG004
        raise RuntimeError(
            "attention over windows has no second derivative; use implementation='dense'"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_AttendBackward, info, in_dims, *arguments)
