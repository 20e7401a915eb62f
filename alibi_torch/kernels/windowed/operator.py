"""Attention over certified windows, tile by tile: the cost grows linearly with the sequence.

`certificate` says which keys a query needs, `tiles` groups them into strips of tiles, `workers`
divides these among threads, and the passes of one technology compute them. All of it is one
operator with a gradient, opaque to torch.compile, torch.func and checkpointing. Its backward pass
recomputes every tile.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from alibi_spec.certificate import BLOCK_SIZE, tolerance_of
from alibi_spec.checks import without_derivative
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.dropout import Dropout
from alibi_torch.kernels.finite import are_ordinary, broken_queries, cleaned
from alibi_torch.kernels.windowed.bias import Bias
from alibi_torch.kernels.windowed.tiles import (
    Attended,
    Gradients,
    Strip,
    Tiles,
    add_key_tiles,
    key_tiles,
    query_tiles,
    reversed_query_tiles,
    strips_of,
    windows_of,
)
from alibi_torch.kernels.windowed.workers import Team

# With dropout, this many arrays as large as the logits exist at once. Strips are shorter by this
# factor, so that they still fit the CPU's cache.
_ARRAYS_WITH_DROPOUT = 4


@runtime_checkable
class Passes(Protocol):
    """The two passes over tiles, by one technology: a module of this package.

    Sums, logarithms and gradients are float32 (float64), in which the bias is given.
    """

    __name__: str

    @property
    def UNIT(self) -> float:
        """The factor on bias and logarithms: log2(e) for powers of two."""
        ...

    def forward(self, tiles: Tiles) -> Attended:
        """softmax(scale · q·k + bias) times v, and `UNIT` · log of the softmax's denominator."""
        ...

    def backward(
        self,
        tiles: Tiles,
        gradient: Float[Tensor, "tiles heads height value_dim"],
        attended: Float[Tensor, "tiles heads height value_dim"],
        log_total: Float[Tensor, "tiles heads height"],
        distance: Float[Tensor, "1 1 height width"] | None,
    ) -> Gradients:
        """Gradients of query, key and value, and of the slopes where distances are given."""
        ...


def attention(call: Call, passes: Passes) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Attention of one call, up to its tolerance."""
    arrays = (call.query, call.key, call.value, call.slopes)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or not any(map(is_functorch_wrapped_tensor, arrays)):
        _refuse_tangents(*arrays)  # torch.func calls `jvp` below
    attend: Any = _AttendEagerly.apply
    if is_compiling:  # which accepts a Function only with gradients
        has_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in arrays)
        attend = _Attend.apply if has_gradients else _attend
    attended, _, _ = attend(
        *arrays,
        *(call.attention_mask, call.segment_ids),
        *((None, None) if call.dropout is None else call.dropout[1:]),
        *(call.causal, call.scale, call.query_start),
        tolerance_of(call.tolerance, str(call.query.dtype).removeprefix("torch.")),
        0.0 if call.dropout is None else call.dropout.rate,
        passes.__name__.rpartition(".")[2],
        BLOCK_SIZE,
    )
    return attended


def _passes_named(name: str) -> Passes:
    """The file of that name in this folder."""
    module: Any = importlib.import_module(f"{__package__}.{name}")
    return module


# A torch operator takes no objects: `attention` passes the parts of a call, `_Work` rebuilds it.
_ARRAYS = (
    "Tensor query, Tensor key, Tensor value, Tensor slopes, Tensor? attention_mask, "
    "Tensor? segment_ids, Tensor? query_hashes, Tensor? key_hashes"
)
_OPTIONS = (
    "bool causal, float scale, SymInt query_start, float tolerance, float dropout, "
    "str passes, int block_size"
)


@torch.library.custom_op(
    "alibi_torch::attend",
    mutates_args=(),
    schema=f"({_ARRAYS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _attend(
    *arguments: Any,
) -> tuple[
    Float[Tensor, "batch heads query_len value_dim"],
    Float[Tensor, "batch heads query_len"],
    Integer[Tensor, "2 heads query_blocks_and_one"],
]:
    """Attended values; the log of each softmax's denominator; the windows, then an empty one."""
    work = _Work(*arguments)
    call, team = work.call, Team.of(work.call.query.device)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        windows = windows_of(call, work.block_size)
        windows = torch.nn.functional.pad(windows, (0, 1))  # see `_shapes`
        cut = _Cut(work, windows)
        attended = call.value.new_zeros((*call.query.shape[:3], call.value.shape[3]))
        log_totals = call.slopes.new_zeros(call.query.shape[:3], dtype=cut.bias.dtype)

        def compute_strip(part: tuple[Strip, slice]) -> None:
            strip, sequences = part
            tiles, is_empty = cut.tiles(strip, sequences)
            result, log_total = work.passes.forward(tiles)
            query_tiles(attended, strip, sequences).copy_(_cleared(result, is_empty).flip(2))
            query_tiles(log_totals, strip, sequences).copy_(log_total.flip(2))

        for _ in team.each(compute_strip, cut.parts):
            pass  # no two strips write the same queries
        if work.broken is not None:
            attended = attended.masked_fill(work.broken, math.nan)
        return attended, log_totals, windows

    return team.lead(compute)


@torch.library.custom_op(
    "alibi_torch::attend_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, bool needs_slopes, Tensor attended, Tensor log_totals, "
    f"Tensor windows, {_ARRAYS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    gradient: Float[Tensor, "batch heads query_len value_dim"],
    needs_slopes: bool,
    attended: Float[Tensor, "batch heads query_len value_dim"],
    log_totals: Float[Tensor, "batch heads query_len"],
    windows: Integer[Tensor, "2 heads query_blocks_and_one"],
    *arguments: Any,
) -> tuple[
    Float[Tensor, "batch heads query_len head_dim"],
    Float[Tensor, "batch kv_heads key_len head_dim"],
    Float[Tensor, "batch kv_heads key_len value_dim"],
    Float[Tensor, " heads"],
]:
    """Gradients of query, key, value and slopes; zeros for slopes that need none."""
    work = _Work(*arguments)
    call, team = work.call, Team.of(work.call.query.device)
    if work.broken is not None:
        gradient, attended = (x.masked_fill(work.broken, 0.0) for x in (gradient, attended))

    def compute() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cut = _Cut(work, windows)

        def compute_strip(part: tuple[Strip, slice]) -> Gradients:
            strip, sequences = part
            tiles, is_empty = cut.tiles(strip, sequences)
            cotangent, result, log_total = (
                reversed_query_tiles(x, strip, sequences) for x in (gradient, attended, log_totals)
            )
            distance = cut.bias.distance(strip) if needs_slopes else None
            cotangent = _cleared(cotangent, is_empty)
            of_tiles = work.passes.backward(tiles, cotangent, result, log_total, distance)
            return of_tiles[0].flip(2), *of_tiles[1:]

        of_query = call.query.new_zeros(call.query.shape)
        # Tiles overlap in keys: the gradients of a key are summed in the dtype of the logits.
        of_key, of_value, of_slopes = (
            x.new_zeros(x.shape, dtype=cut.bias.dtype) for x in (call.key, call.value, call.slopes)
        )
        # Added in the order of the strips, so that the bits do not depend on the threads.
        for (strip, sequences), of_tiles in team.each(compute_strip, cut.parts):
            query_tiles(of_query, strip, sequences).copy_(of_tiles[0])
            add_key_tiles(of_key, of_tiles[1], strip, sequences, cut.group)
            add_key_tiles(of_value, of_tiles[2], strip, sequences, cut.group)
            if of_tiles[3] is not None:
                of_slopes[strip.heads] += of_tiles[3]
        of_slopes = of_slopes.to(call.slopes.dtype)
        return of_query, of_key.to(call.key.dtype), of_value.to(call.value.dtype), of_slopes

    return team.lead(compute)


class _Work:
    """The input of the operators: a call of finite numbers, and how to compute it.

    Attributes:
        broken: the queries that see a number that is not finite; None where all are ordinary.
    """

    def __init__(self, *arguments: Any) -> None:
        *arrays, query_hashes, key_hashes = arguments[:8]
        causal, scale, query_start, tolerance, rate, passes, self.block_size = arguments[8:]
        dropout = None if query_hashes is None else Dropout(rate, query_hashes, key_hashes)
        query, key, value, slopes, attention_mask, segment_ids = arrays
        call = Call(
            *(query, key, value, slopes, causal, scale, query_start, attention_mask, segment_ids),
            *(tolerance, "absolute", dropout),
        )
        self.is_ordinary = are_ordinary(query, key, value)
        self.broken = None if self.is_ordinary else broken_queries(call)
        self.call = call if self.is_ordinary else cleaned(call)
        self.passes = _passes_named(passes if self.is_ordinary else "plain")


class _Cut:
    """One call, cut into strips.

    Attributes:
        parts: every strip with the sequences that it is computed for at once.
        group: query heads per head of keys.
    """

    def __init__(
        self, work: _Work, windows: Integer[Tensor, "2 heads query_blocks_and_one"]
    ) -> None:
        call, dropout = work.call, work.call.dropout
        (batch, heads, query_len, head_dim), key_len = call.query.shape, call.key.shape[2]
        self.group, self.bias = heads // call.key.shape[1], Bias(call, work.passes.UNIT)
        arrays = 1 if dropout is None else _ARRAYS_WITH_DROPOUT
        strips = strips_of(
            *(windows, call.query_start, query_len, key_len, work.block_size),
            group=self.group,
            key_elements=batch * max(head_dim, work.block_size) * arrays,
        )
        # `query_tiles` makes one axis of tiles: those of one sequence, or one tile per sequence.
        all_at_once, one_by_one = [slice(0, batch)], [slice(b, b + 1) for b in range(batch)]
        self.parts = [
            (strip, each)
            for strip in strips
            for each in (all_at_once if strip.tiles == 1 else one_by_one)
        ]
        self._query = call.query
        self._key, self._value = _with_dense_rows(call.key), _with_dense_rows(call.value)
        self._dropout, self._scale, self._is_ordinary = dropout, call.scale, work.is_ordinary

    def tiles(
        self, strip: Strip, sequences: slice
    ) -> tuple[Tiles, Bool[Tensor, "tiles 1 height 1"] | None]:
        """The input of the passes, and which queries see no key: those are 0."""
        bias, is_empty = self.bias.of(strip, sequences)
        dropout = self._dropout
        if dropout is not None:
            first = replace(strip, heads=slice(0, 1))  # keys have one hash for all heads
            of_key = key_tiles(dropout.key_hashes[None, None], first, slice(0, 1), 1)
            of_query = reversed_query_tiles(dropout.query_hashes, strip, sequences)
            dropout = Dropout(dropout.rate, of_query, of_key)
        tiles = Tiles(
            _cleared(reversed_query_tiles(self._query, strip, sequences), is_empty),
            key_tiles(self._key, strip, sequences, self.group),
            key_tiles(self._value, strip, sequences, self.group),
            *(bias, self._scale, dropout, self._is_ordinary),
        )
        return tiles, is_empty


def _cleared(
    x: Float[Tensor, "tiles heads height width"], is_empty: Bool[Tensor, "tiles 1 height 1"] | None
) -> Float[Tensor, "tiles heads height width"]:
    """0 where a query sees no key, so that nothing can overflow there."""
    return x if is_empty is None else x.masked_fill(is_empty, 0.0)


def _with_dense_rows(x: Tensor) -> Tensor:
    # ATen's kernel takes any strides, but assumes 1 for the last axis without a check.
    return x if x.stride(-1) == 1 else x.contiguous()


@_attend.register_fake
def _shapes(
    query: Tensor, _key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, query_len, _ = query.shape
    dtype, block_size = torch.promote_types(query.dtype, torch.float32), options[-1]
    return (
        value.new_empty((batch, heads, query_len, value.shape[3])),
        query.new_empty((batch, heads, query_len), dtype=dtype),
        # One more, empty: torch.export would fix a size that is 1 in its example.
        query.new_empty((2, heads, -(-query_len // block_size) + 1), dtype=torch.int64),
    )


@_attend_backward.register_fake
def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[5:9])  # query, key, value, slopes


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
        ctx.options = inputs[8:]
        ctx.save_for_backward(*output, *inputs[:8])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        needs_slopes = ctx.needs_input_grad[3]
        # The compiler cannot trace a Function inside another. It does not need `_AttendBackward`,
        # which only adds vmap and an error.
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        *gradients, of_slopes = differentiate(
            output_gradients[0], needs_slopes, *ctx.saved_tensors, *ctx.options
        )
        return *gradients, of_slopes if needs_slopes else None, *[None] * 11


def _refuse_tangents(*arrays: Tensor) -> None:
    if any(unpack_dual(x).tangent is not None for x in arrays):
        raise RuntimeError(without_derivative("forward-mode"))


class _AttendEagerly(_Attend):
    """`_Attend` with the methods that torch.func needs and the compiler refuses."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # noqa: ARG004
        raise RuntimeError(without_derivative("forward-mode"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_AttendEagerly, info, in_dims, *arguments)


class _AttendBackward(torch.autograd.Function):
    """`_attend_backward`, with an error as its derivative."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _attend_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:  # noqa: ARG004
        raise RuntimeError(without_derivative("second"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_AttendBackward, info, in_dims, *arguments)
