"""The passes over blocks as Pallas kernels for TPUs.

A program computes one block of queries (or of keys) of one head, and streams the blocks in its
range through two buffers. Blocks outside the range are neither fetched nor computed. Numbers per
query are rows, [1, queries], which a TPU stores without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Integer, Shaped

from alibi_flax.kernels.call import Call, refuses_bias
from alibi_flax.kernels.certificate import query_block_ranges
from alibi_flax.kernels.dropout import is_kept
from alibi_flax.kernels.partition import shape_of, varying_axes
from alibi_flax.kernels.windowed.operator import Attended, BlockedCall, OfKeys, OfQueries, PerQuery

_BLOCK_SIZE = 512  # so that a step takes longer than its overhead
_LANES = 128  # numbers in a row of a register

Refs = list[Any]
Step = Callable[[Array, list[Array]], None]


@dataclass(frozen=True)
class _Head:
    """What a program knows about its head.

    Attributes:
        slope: m.
        query_start: the position of the first query among the keys.
    """

    slope: Array
    query_start: Array

    def start(self, blocked: BlockedCall, query_block: Array, key_block: Array) -> Array:
        """The position of the first key of a block, minus that of the first query of another."""
        return (key_block - query_block) * blocked.block_size - self.query_start


Program = Callable[[_Head, Array, Refs, Refs, Refs], tuple[Step, Callable[[], None]]]


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    if call.platform != "tpu":
        return f"it needs a TPU, and this runs on a {call.platform}"
    if str(call.query.dtype) not in ("bfloat16", "float32"):
        return f"a TPU does not compute in {call.query.dtype}"
    return refuses_bias(call)


def block_size(call: Call) -> int:  # noqa: ARG001
    """Positions in a block."""
    return _BLOCK_SIZE


def attended(blocked: BlockedCall) -> Attended:
    """The result, in the dtype of the values; log Σ_j exp(s_ij), inf if it sees no key."""

    def program(head: _Head, block: Array, own: Refs, state: Refs, outputs: Refs) -> Any:
        largest, total, weighted = state
        largest[...] = jnp.full(largest.shape, -math.inf, largest.dtype)
        total[...], weighted[...] = _zeros(total), _zeros(weighted)
        query, *vectors = own
        columns = [_column(vector[0]) for vector in vectors]

        def step(key_block: Array, others: list[Array]) -> None:
            key, value, *key_rows = others
            start = head.start(blocked, block, key_block)
            ids, hashes = _ids_and_hashes(blocked, columns, key_rows)
            logits, _ = _logits(blocked, head.slope, query[0], key, start, 1, ids)
            new = jnp.maximum(largest[...], logits.max(axis=1, keepdims=True))
            base = jnp.where(new == -math.inf, 0.0, new)  # else -inf - -inf would be NaN
            weights, decay = jnp.exp(logits - base), jnp.exp(largest[...] - base)
            largest[...] = new
            total[...] = decay * total[...] + weights.sum(axis=1, keepdims=True)
            weights = _dropped(blocked, weights, hashes).astype(value.dtype)
            weighted[...] = decay * weighted[...] + _dot(weights, value, 1, 0)

        def finish() -> None:
            result, log_total = outputs
            is_empty = total[...] == 0.0
            mean = jnp.where(is_empty, 0.0, weighted[...] / total[...])
            result[0] = mean.astype(result.dtype)
            log_total[0] = _row(jnp.where(is_empty, math.inf, largest[...] + jnp.log(total[...])))

        return step, finish

    size, width = blocked.block_size, blocked.value.shape[3]
    result, log_total = _sweep(
        *(blocked, program, blocked.first, blocked.last),
        own=[_matrix(blocked.query), *_of_queries(blocked)],
        others=_keys(blocked),
        state=[(size, 1), (size, 1), (size, width)],
        outputs=[
            _matrix(_empty(blocked.query, width, blocked.value.dtype)),
            _vector(_empty(blocked.query, None, blocked.slopes.dtype)),
        ],
    )
    return result, log_total


def query_gradients(blocked: BlockedCall, per_query: PerQuery) -> OfQueries:
    """Gradients of the queries, and each query's share of the gradient of m."""

    def program(head: _Head, block: Array, own: Refs, state: Refs, outputs: Refs) -> Any:
        of_query, of_slope = state
        of_query[...], of_slope[...] = _zeros(of_query), _zeros(of_slope)
        query, gradient, *vectors = own
        log_total, shift, *columns = (_column(vector[0]) for vector in vectors)

        def step(key_block: Array, others: list[Array]) -> None:
            key, value, *key_rows = others
            start = head.start(blocked, block, key_block)
            ids, hashes = _ids_and_hashes(blocked, columns, key_rows)
            logits, distance = _logits(blocked, head.slope, query[0], key, start, 1, ids)
            weights = jnp.exp(logits - log_total)
            of_weights = _dropped(blocked, _dot(gradient[0], value, 1, 1), hashes)
            of_logits = weights * (of_weights - shift)
            of_query[...] += _dot(of_logits.astype(key.dtype), key, 1, 0)
            of_slope[...] -= (of_logits * distance).sum(axis=1, keepdims=True)

        def finish() -> None:
            outputs[0][0] = blocked.scale * of_query[...]
            outputs[1][0] = _row(of_slope[...])

        return step, finish

    size, width, dtype = blocked.block_size, blocked.query.shape[3], blocked.slopes.dtype
    of_query, of_slope = _sweep(
        *(blocked, program, blocked.first, blocked.last),
        own=_queries(blocked, per_query),
        others=_keys(blocked),
        state=[(size, width), (size, 1)],
        outputs=[
            _matrix(_empty(blocked.query, width, dtype)),
            _vector(_empty(blocked.query, None, dtype)),
        ],
    )
    return of_query, of_slope


def key_gradients(blocked: BlockedCall, per_query: PerQuery) -> OfKeys:
    """Gradients of the keys and values, for each head of queries."""

    def program(head: _Head, block: Array, own: Refs, state: Refs, outputs: Refs) -> Any:
        of_key, of_value = state
        of_key[...], of_value[...] = _zeros(of_key), _zeros(of_value)
        key, value, *vectors = own
        columns = [_column(vector[0]) for vector in vectors]

        def step(query_block: Array, others: list[Array]) -> None:
            # Logits are [keys, queries] here, so that rows per query need no transpose.
            query, gradient, log_total, shift, *query_rows = others
            start = head.start(blocked, query_block, block)
            ids, hashes = _ids_and_hashes(blocked, columns, query_rows)
            logits, _ = _logits(blocked, head.slope, key[0], query, start, 0, ids)
            weights = jnp.exp(logits - log_total)
            of_weights = _dropped(blocked, _dot(value[0], gradient, 1, 1), hashes)
            of_logits = weights * (of_weights - shift)
            of_key[...] += _dot(of_logits.astype(query.dtype), query, 1, 0)
            weights = _dropped(blocked, weights, hashes)
            of_value[...] += _dot(weights.astype(gradient.dtype), gradient, 1, 0)

        def finish() -> None:
            outputs[0][0] = blocked.scale * of_key[...]
            outputs[1][0] = of_value[...]

        return step, finish

    (batch, heads), keys = blocked.query.shape[:2], blocked.key.shape[2]
    widths = (blocked.key.shape[3], blocked.value.shape[3])
    dtype = blocked.slopes.dtype
    of_key, of_value = _sweep(
        *(blocked, program),
        *query_block_ranges(blocked.first, blocked.last, blocked.key_blocks),
        own=_keys(blocked),
        others=_queries(blocked, per_query),
        state=[(blocked.block_size, width) for width in widths],
        outputs=[
            _matrix(jax.ShapeDtypeStruct((batch, heads, keys, width), dtype)) for width in widths
        ],
    )
    return of_key, of_value


@dataclass(frozen=True)
class _Operand:
    """An array [sequences, rows, columns] that is read or written block by block.

    Attributes:
        array: or its shape and dtype.
        shared: consecutive programs, by batch and head, that read the same sequence.
        axis: of the positions: 1 for a matrix, 2 for a vector.
    """

    array: Any
    shared: int
    axis: int

    def block_shape(self, size: int) -> tuple[int, int]:
        """The shape of one block."""
        return (size, self.array.shape[2]) if self.axis == 1 else (1, size)

    def own_block(self, size: int) -> pl.BlockSpec:
        """The block of a program."""

        def index(head: Array, block: Array) -> tuple[Array, Array, Array]:
            sequence, zero = jax.lax.div(head, jnp.int32(self.shared)), jnp.int32(0)
            return (sequence, block, zero) if self.axis == 1 else (sequence, zero, block)

        return pl.BlockSpec((1, *self.block_shape(size)), index)

    def block_of(self, ref: Any, head: Array, block: Array, size: int) -> Any:
        """A reference to one block of the whole array."""
        sequence, positions = jax.lax.div(head, jnp.int32(self.shared)), pl.ds(block * size, size)
        return ref.at[sequence, positions] if self.axis == 1 else ref.at[sequence, :, positions]


def _matrix(x: Any, shared: int = 1) -> _Operand:
    """Of [batch, heads, positions, width]."""
    return _Operand(_reshaped(x, (-1, *x.shape[2:])), shared, axis=1)


def _vector(x: Any, shared: int = 1) -> _Operand:
    """Of [..., positions]."""
    return _Operand(_reshaped(x, (-1, 1, x.shape[-1])), shared, axis=2)


def _of_queries(blocked: BlockedCall) -> list[_Operand]:
    """The id and the hash of each query, where there are any."""
    ids, hashes = blocked.query_ids, blocked.query_hashes
    operands = [] if ids is None else [_vector(ids, blocked.query.shape[1])]
    return operands if hashes is None else [*operands, _vector(hashes)]


def _of_keys(blocked: BlockedCall) -> list[_Operand]:
    """The same of each key."""
    (batch, heads), ids, hashes = blocked.query.shape[:2], blocked.key_ids, blocked.key_hashes
    operands = [] if ids is None else [_vector(ids, heads)]
    return operands if hashes is None else [*operands, _vector(hashes, batch * heads)]


def _keys(blocked: BlockedCall) -> list[_Operand]:
    matrices = [_matrix(x, blocked.group) for x in (blocked.key, blocked.value)]
    return [*matrices, *_of_keys(blocked)]


def _queries(blocked: BlockedCall, per_query: PerQuery) -> list[_Operand]:
    matrices = [_matrix(x) for x in (blocked.query, per_query.gradient)]
    vectors = [_vector(x) for x in (per_query.log_total, per_query.shift)]
    return [*matrices, *vectors, *_of_queries(blocked)]


def _empty(like: Array, width: int | None, dtype: Any) -> jax.ShapeDtypeStruct:
    shape = like.shape[:3] if width is None else (*like.shape[:3], width)
    return jax.ShapeDtypeStruct(shape, dtype)


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    reshape = partial(jnp.reshape, shape=shape)
    return jax.eval_shape(reshape, x) if isinstance(x, jax.ShapeDtypeStruct) else reshape(x)


@dataclass(frozen=True)
class _Stream:
    """Blocks that a program fetches one by one, each during the computation with the previous one.

    Attributes:
        operands, sources: the arrays, and where the whole of each is stored.
        buffers: two slots of each array, for a block in use and one that is being fetched.
        semaphores: one for each array and slot.
        head: of the program.
        size: positions in a block.
    """

    operands: list[_Operand]
    sources: Refs
    buffers: Refs
    semaphores: Any
    head: Array
    size: int

    def visit(self, start: Array, end: Array, step: Step) -> None:
        """Call `step` with the blocks from `start` up to `end`."""

        def visit_one(block: Array, _: None) -> None:
            slot = jax.lax.rem(block - start, jnp.int32(2))
            pl.when(block + 1 < end)(lambda: self._fetch(block + 1, 1 - slot))
            for copy in self._copies(block, slot):
                copy.wait()
            step(block, [buffer[slot] for buffer in self.buffers])

        pl.when(start < end)(lambda: self._fetch(start, jnp.int32(0)))
        jax.lax.fori_loop(start, end, visit_one, None)

    def _fetch(self, block: Array, slot: Array) -> None:
        for copy in self._copies(block, slot):
            copy.start()

    def _copies(self, block: Array, slot: Array) -> list[Any]:
        arrays = zip(self.operands, self.sources, self.buffers, strict=True)
        return [
            pltpu.make_async_copy(
                operand.block_of(source, self.head, block, self.size),
                buffer.at[slot],
                self.semaphores.at[number, slot],
            )
            for number, (operand, source, buffer) in enumerate(arrays)
        ]


def _sweep(
    blocked: BlockedCall,
    program: Program,
    first: Integer[Array, "batch heads blocks"],
    last: Integer[Array, "batch heads blocks"],
    *,
    own: list[_Operand],
    others: list[_Operand],
    state: list[tuple[int, int]],
    outputs: list[_Operand],
) -> list[Array]:
    """Call `program` for every head and block, and its step for the blocks from first to last.

    A program takes its head, its block, its blocks of `own`, memory for its state, and its
    outputs. It returns a step, which takes one block of `others`, and a function that writes the
    outputs.
    """
    size, (batch, heads, blocks) = blocked.block_size, first.shape

    def kernel(slopes: Any, query_start: Any, first: Any, last: Any, *refs: Any) -> None:
        rest = iter(refs)  # in the order of the arguments of pallas_call below
        groups = (own, others, outputs, state, others)
        own_refs, sources, output_refs, state_refs, buffers = (
            list(islice(rest, len(group))) for group in groups
        )
        (semaphores,) = rest
        head, block = pl.program_id(0), pl.program_id(1)
        of_head = _Head(slopes[jax.lax.rem(head, jnp.int32(heads))], query_start[0])
        step, finish = program(of_head, block, own_refs, state_refs, output_refs)
        stream = _Stream(others, sources, buffers, semaphores, head, size)
        stream.visit(first[0, 0, block], last[0, 0, block], step)
        finish()

    def own_bounds(head: Array, _: Array) -> tuple[Array, Array, Array]:
        return head, jnp.int32(0), jnp.int32(0)

    axes = varying_axes(blocked.query)
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    bounds = pl.BlockSpec((1, 1, blocks), own_bounds, memory_space=pltpu.SMEM)
    results = pl.pallas_call(
        kernel,
        grid=(batch * heads, blocks),
        in_specs=[
            *(scalars, scalars, bounds, bounds),
            *(operand.own_block(size) for operand in own),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in others),
        ],
        out_specs=[operand.own_block(size) for operand in outputs],
        out_shape=[shape_of(operand.array, axes) for operand in outputs],
        scratch_shapes=[
            *(pltpu.VMEM(shape, blocked.slopes.dtype) for shape in state),
            *(pltpu.VMEM((2, *each.block_shape(size)), each.array.dtype) for each in others),
            pltpu.SemaphoreType.DMA((len(others), 2)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(
        *(blocked.slopes, blocked.query_start),
        *(x.astype(jnp.int32).reshape(batch * heads, 1, blocks) for x in (first, last)),
        *(operand.array for operand in (*own, *others)),
    )
    return [
        x.reshape(batch, heads, *(x.shape[1:] if operand.axis == 1 else x.shape[2:]))
        for x, operand in zip(results, outputs, strict=True)
    ]


def _logits(
    blocked: BlockedCall,
    slope: Array,
    left: Float[Array, "block head_dim"],
    right: Float[Array, "block head_dim"],
    start: Array,
    key_axis: int,
    ids: list[tuple[Array, Array]],
) -> tuple[Float[Array, "block block"], Float[Array, "block block"]]:
    """Biased logits of two blocks, with the keys along `key_axis`, and their distances.

    `ids` are those of the left block as a column, and of the right one as a row.
    """
    shape = (blocked.block_size, blocked.block_size)
    index = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (key_axis, 1 - key_axis)]
    relative = index[0] - index[1] + start
    distance = jnp.abs(relative).astype(jnp.float32)
    logits = blocked.scale * _dot(left, right, 1, 1) - slope * distance
    if blocked.causal:
        logits = jnp.where(relative <= 0, logits, -math.inf)
    for column, row in ids:
        logits = jnp.where(column == row, logits, -math.inf)
    return logits, distance


def _ids_and_hashes(
    blocked: BlockedCall, columns: list[Array], rows: list[Array]
) -> tuple[list[tuple[Array, Array]], list[tuple[Array, Array]]]:
    """Columns and rows of two blocks in pairs: of ids if there are any, of hashes for dropout."""
    pairs = list(zip(columns, rows, strict=True))
    count = 0 if blocked.query_ids is None else 1
    return pairs[:count], pairs[count:]


def _dropped(
    blocked: BlockedCall, x: Float[Array, "block block"], hashes: list[tuple[Array, Array]]
) -> Float[Array, "block block"]:
    """0 where dropout drops; the rest is divided by the share that is kept."""
    for column, row in hashes:
        x = jnp.where(is_kept(blocked.dropout, column, row), x / (1 - blocked.dropout), 0.0)
    return x


def _dot(
    left: Array, right: Array, left_axis: int, right_axis: int
) -> Float[Array, "rows columns"]:
    """A product summed in float32; by default a TPU would round float32 inputs to bfloat16."""
    is_wide = left.dtype == jnp.float32
    return jax.lax.dot_general(
        *(left, right, (((left_axis,), (right_axis,)), ((), ()))),
        precision=jax.lax.Precision.HIGHEST if is_wide else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _zeros(ref: Any) -> Array:
    return jnp.zeros(ref.shape, ref.dtype)


def _column(row: Shaped[Array, "1 block"]) -> Shaped[Array, "block 1"]:
    """Transposed as a full register, the only shape that a TPU transposes."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def _row(column: Shaped[Array, "block 1"]) -> Shaped[Array, "1 block"]:
    return jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]
