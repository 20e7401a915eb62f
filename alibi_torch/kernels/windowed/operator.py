"""Attention over certified windows, tile by tile: the cost grows linearly with the sequence.

`certificate` says which keys a query needs, `tiles` groups them into strips of tiles, `workers`
shares these out among threads, and the passes of one technology compute them. The whole is one
operator with a gradient, which torch.compile, torch.func and checkpointing see as a box. Its
backward pass computes every tile again.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int32, Integer
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from alibi_spec.windows import BLOCK_SIZE, tolerance_of
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.dropout import Dropout
from alibi_torch.kernels.finite import are_ordinary, broken_queries, cleaned
from alibi_torch.kernels.windowed.bias import Bias
from alibi_torch.kernels.windowed.tiles import (
    Strip,
    Tiles,
    add_key_tiles,
    in_order,
    key_tiles,
    query_tiles,
    reversing_order,
    strips_of,
    windows_of,
)
from alibi_torch.kernels.windowed.workers import Team

# Arrays as large as the logits that are held at once with dropout. Strips are so much shorter that
# they still fit the cache.
_ARRAYS_WITH_DROPOUT = 4
_NO_TANGENTS = "attention over windows has no forward-mode derivative; use implementation='dense'"


@runtime_checkable
class Passes(Protocol):
    """The two passes over tiles, by one technology: a module of this package.

    Sums, logarithms and gradients are float32 (float64), in which the bias is given.
    """

    __name__: str

    @property
    def UNIT(self) -> float:
        """What bias and logarithms are multiplied by: log2(e) for powers of two."""
        ...

    def forward(
        self, tiles: Tiles
    ) -> tuple[Float[Tensor, "tiles heads height value_dim"], Float[Tensor, "tiles heads height"]]:
        """softmax(scale · q·k + bias) times v, and `UNIT` · log of the softmax's denominator."""
        ...

    def backward(
        self,
        tiles: Tiles,
        gradient: Float[Tensor, "tiles heads height value_dim"],
        attended: Float[Tensor, "tiles heads height value_dim"],
        log_total: Float[Tensor, "tiles heads height"],
        distance: Float[Tensor, "1 1 height width"] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, " heads"] | None]:
        """Gradients of query, key and value, and of the slopes where distances are given."""
        ...


def attention(call: Call, passes: Passes) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Attention of one call, up to its tolerance."""
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
        call.query_start,
        tolerance_of(call.tolerance, str(call.query.dtype).removeprefix("torch.")),
        passes.__name__.rpartition(".")[2],
        BLOCK_SIZE,
        0.0 if call.dropout is None else call.dropout.rate,
    )
    return attended


def _passes_named(name: str) -> Passes:
    """An operator of torch takes no modules, so passes go by the name of their file."""
    module: Any = importlib.import_module(f"{__package__}.{name}")
    return module


@torch.library.custom_op(
    "alibi_torch::attend",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor slopes, Tensor? attention_mask, "
    "Tensor? segment_ids, Tensor? query_hashes, Tensor? key_hashes, bool causal, float scale, "
    "SymInt query_start, float tolerance, str passes, int block_size, float dropout) "
    "-> (Tensor, Tensor, Tensor)",
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
    query_start: int,
    tolerance: float,
    passes: str,
    block_size: int,
    dropout: float,
) -> tuple[
    Float[Tensor, "batch heads query_len value_dim"],
    Float[Tensor, "batch heads query_len"],
    Integer[Tensor, "2 heads query_blocks_and_one"],
]:
    """Attended values; the logarithm of each softmax's denominator; the windows, the last empty."""
    is_ordinary, broken = are_ordinary(query, key, value), None
    masks = (attention_mask, segment_ids)
    if not is_ordinary:
        passes = "plain"
        broken = broken_queries(query, key, value, causal, query_start, *masks)
        query, key, value = cleaned(query, key, value, attention_mask)
    team = Team.of(query.device)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        windows = windows_of(
            *(query, key, slopes, *masks),
            causal=causal,
            scale=scale,
            query_start=query_start,
            tolerance=tolerance,
            block_size=block_size,
        )
        windows = torch.nn.functional.pad(windows, (0, 1))  # as `_shapes` says
        hashes = None if query_hashes is None or key_hashes is None else (query_hashes, key_hashes)
        cut = _Cut(
            *(query, key, value, slopes, *masks, hashes, windows, causal, scale, query_start),
            *(_passes_named(passes), block_size, dropout, is_ordinary),
        )
        attended = value.new_zeros((*query.shape[:3], value.shape[3]))
        log_totals = slopes.new_zeros(query.shape[:3], dtype=cut.bias.dtype)

        def compute_strip(part: tuple[Strip, slice]) -> None:
            strip, sequences = part
            tiles, is_empty = cut.tiles(strip, sequences)
            result, log_total = cut.passes.forward(tiles)
            query_tiles(attended, strip, sequences).copy_(_cleared(result, is_empty))
            query_tiles(log_totals, strip, sequences).copy_(log_total)

        for _ in team.each(compute_strip, cut.parts):
            pass  # every strip writes its own queries
        attended, log_totals = in_order(attended, cut.order), in_order(log_totals, cut.order)
        if broken is not None:
            attended = attended.masked_fill(broken, math.nan)
        return attended, log_totals, windows

    return team.lead(compute)


@torch.library.custom_op(
    "alibi_torch::attend_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor slopes, "
    "Tensor? attention_mask, Tensor? segment_ids, Tensor? query_hashes, Tensor? key_hashes, "
    "Tensor attended, Tensor log_totals, Tensor windows, bool causal, float scale, "
    "SymInt query_start, str passes, int block_size, float dropout, bool needs_slopes) "
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
    query_start: int,
    passes: str,
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
    masks = (attention_mask, segment_ids)
    if not is_ordinary:
        passes = "plain"
        broken = broken_queries(query, key, value, causal, query_start, *masks)
        query, key, value = cleaned(query, key, value, attention_mask)
        gradient, attended = gradient.masked_fill(broken, 0.0), attended.masked_fill(broken, 0.0)
    team = Team.of(query.device)

    def compute() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hashes = None if query_hashes is None or key_hashes is None else (query_hashes, key_hashes)
        cut = _Cut(
            *(query, key, value, slopes, *masks, hashes, windows, causal, scale, query_start),
            *(_passes_named(passes), block_size, dropout, is_ordinary),
        )
        reversed_arrays = [in_order(x, cut.order) for x in (gradient, attended, log_totals)]

        def compute_strip(part: tuple[Strip, slice]) -> tuple[Tensor, Tensor, Tensor, Any]:
            strip, sequences = part
            tiles, is_empty = cut.tiles(strip, sequences)
            cotangent, result, log_total = (
                query_tiles(x, strip, sequences) for x in reversed_arrays
            )
            distance = cut.bias.distance(strip) if needs_slopes else None
            cotangent = _cleared(cotangent, is_empty)
            return cut.passes.backward(tiles, cotangent, result, log_total, distance)

        of_query = torch.zeros_like(cut.query)
        # Tiles overlap in keys: what they add to one is summed in the dtype of the logits.
        of_key, of_value = (x.new_zeros(x.shape, dtype=cut.bias.dtype) for x in (key, value))
        of_slopes = slopes.new_zeros(slopes.shape, dtype=cut.bias.dtype)
        # One strip after another, in their order: so the bits do not depend on the threads.
        for (strip, sequences), of_tiles in team.each(compute_strip, cut.parts):
            query_tiles(of_query, strip, sequences).copy_(of_tiles[0])
            add_key_tiles(of_key, of_tiles[1], strip, sequences, cut.group)
            add_key_tiles(of_value, of_tiles[2], strip, sequences, cut.group)
            if of_tiles[3] is not None:
                of_slopes[strip.heads] += of_tiles[3]
        of_query = in_order(of_query, cut.order)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_slopes.to(slopes.dtype)

    return team.lead(compute)


class _Cut:
    """One call, cut into strips.

    Attributes:
        parts: every strip with the sequences that it is computed for at once.
        order: of the queries, in which those of every tile are reversed.
        query: in that order.
        group: query heads per head of keys.
        bias, passes: what tiles are computed with.
    """

    def __init__(
        self,
        query: Float[Tensor, "batch heads query_len head_dim"],
        key: Float[Tensor, "batch kv_heads key_len head_dim"],
        value: Float[Tensor, "batch kv_heads key_len value_dim"],
        slopes: Float[Tensor, " heads"],
        attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
        segment_ids: Integer[Tensor, "batch key_len"] | None,
        hashes: tuple[Int32[Tensor, "batch heads query_len"], Int32[Tensor, " key_len"]] | None,
        windows: Integer[Tensor, "2 heads query_blocks_and_one"],
        causal: bool,
        scale: float,
        query_start: int,
        passes: Passes,
        block_size: int,
        dropout: float,
        is_ordinary: bool,
    ) -> None:
        (batch, heads, query_len, head_dim), (kv_heads, key_len) = query.shape, key.shape[1:3]
        self.passes, self.group = passes, heads // kv_heads
        self.bias = Bias(
            *(query, slopes, attention_mask, segment_ids, causal, query_start, passes.UNIT)
        )
        arrays = 1 if hashes is None else _ARRAYS_WITH_DROPOUT
        strips = strips_of(
            *(windows, query_start, query_len, key_len, block_size),
            group=self.group,
            key_elements=batch * max(head_dim, block_size) * arrays,
        )
        # Several tiles are one after another in a sequence, so only a lone one is in many.
        all_at_once, one_by_one = [slice(0, batch)], [slice(b, b + 1) for b in range(batch)]
        self.parts = [
            (strip, each)
            for strip in strips
            for each in (all_at_once if strip.tiles == 1 else one_by_one)
        ]
        self.order = reversing_order(strips, heads, query_len, query.device)
        self.query = in_order(query, self.order)
        self._key, self._value = _with_dense_rows(key), _with_dense_rows(value)
        self._hashes = None if hashes is None else (in_order(hashes[0], self.order), hashes[1])
        self._scale, self._rate, self._is_ordinary = scale, dropout, is_ordinary

    def tiles(
        self, strip: Strip, sequences: slice
    ) -> tuple[Tiles, Bool[Tensor, "tiles 1 height 1"] | None]:
        """What the passes compute, and which queries see no key: these are 0."""
        bias, is_empty = self.bias.of(strip, sequences)
        tiles = Tiles(
            _cleared(query_tiles(self.query, strip, sequences), is_empty),
            key_tiles(self._key, strip, sequences, self.group),
            key_tiles(self._value, strip, sequences, self.group),
            bias,
            self._scale,
            self._dropout(strip, sequences),
            self._is_ordinary,
        )
        return tiles, is_empty

    def _dropout(self, strip: Strip, sequences: slice) -> Dropout | None:
        if self._hashes is None:
            return None
        of_query, of_key = self._hashes
        of_key = key_tiles(of_key[None, None], replace(strip, heads=slice(0, 1)), slice(0, 1), 1)
        return Dropout(self._rate, query_tiles(of_query, strip, sequences), of_key)


def _cleared(
    x: Float[Tensor, "tiles heads height width"], is_empty: Bool[Tensor, "tiles 1 height 1"] | None
) -> Float[Tensor, "tiles heads height width"]:
    """0 where a query sees no key, so that nothing can overflow there."""
    return x if is_empty is None else x.masked_fill(is_empty, 0.0)


def _with_dense_rows(x: Tensor) -> Tensor:
    # ATen's kernel takes any strides but that of the last axis, which it does not look at.
    return x if x.stride(-1) == 1 else x.contiguous()


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
        *tensors, ctx.causal, ctx.scale, ctx.query_start, _, ctx.passes = inputs[:-2]
        ctx.block_size, ctx.dropout = inputs[-2:]
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        needs_slopes = ctx.needs_input_grad[3]
        options = (ctx.causal, ctx.scale, ctx.query_start, ctx.passes, ctx.block_size, ctx.dropout)
        # The compiler cannot follow one Function inside another, but needs none of what it adds.
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        *gradients, of_slopes = differentiate(
            output_gradients[0], *ctx.saved_tensors, *options, needs_slopes
        )
        return *gradients, of_slopes if needs_slopes else None, *[None] * 11


def _refuse_tangents(*arrays: Tensor) -> None:
    if any(unpack_dual(x).tangent is not None for x in arrays):
        raise RuntimeError(_NO_TANGENTS)


class _AttendEagerly(_Attend):
    """`_Attend` with what torch.func needs as well, and the compiler refuses."""

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
