"""The passes over blocks as Pallas kernels for GPUs, compiled by Triton.

A program computes one block of one head and keeps its state in registers; its steps are those of
`xla_loops`. JAX 0.11 has deprecated Triton under Pallas; its replacement (Mosaic GPU) cannot be
tried without a GPU.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Shaped

from alibi_flax.kernels.call import Call, refuses_bias
from alibi_flax.kernels.partition import shape_of, varying_axes
from alibi_flax.kernels.windowed import xla_loops
from alibi_flax.kernels.windowed.operator import Attended, BlockedCall, OfKeys, OfQueries, PerQuery
from alibi_flax.kernels.windowed.xla_loops import Blocks, Index, State, Visit

try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11
    triton: Any = None

_NARROWEST = 16  # columns of a matrix for tensor cores
_LEAST_BLOCK = 32
# Of a block of keys. With larger ones the backward pass needs more than the 99 KB of shared memory
# that GPUs have at least (from compute capability 8.0 on).
_BLOCK_BYTES = 2**14


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    if call.platform not in ("gpu", "cuda", "rocm"):
        return f"it needs a GPU, and this runs on a {call.platform}"
    if str(call.query.dtype) not in ("bfloat16", "float32"):
        return f"it does not compute in {call.query.dtype}"
    if triton is None:
        return f"JAX {jax.__version__} has no Triton under Pallas"
    if _row_bytes(call) * _LEAST_BLOCK > _BLOCK_BYTES:
        return "its heads are too wide for a GPU's shared memory"
    return refuses_bias(call)


def block_size(call: Call) -> int:
    """Positions in a block: fewer where they are wide."""
    return 64 if 64 * _row_bytes(call) <= _BLOCK_BYTES else _LEAST_BLOCK


def _row_bytes(call: Call) -> int:
    return max(_width(call.query), _width(call.value)) * call.query.dtype.itemsize


def attended(blocked: BlockedCall) -> Attended:
    """The result, in the dtype of the values; log Σ_j exp(s_ij), inf if it sees no key."""
    result, log_total = xla_loops.attended(_widened(blocked), sweep=in_programs)
    return result[..., : blocked.value.shape[3]], log_total


def query_gradients(blocked: BlockedCall, per_query: PerQuery) -> OfQueries:
    """Gradients of the queries, and each query's share of the gradient of m."""
    arrays = (_widened(blocked), _widened_per_query(per_query))
    of_query, of_slope = xla_loops.query_gradients(*arrays, sweep=in_programs)
    return of_query[..., : blocked.query.shape[3]], of_slope


def key_gradients(blocked: BlockedCall, per_query: PerQuery) -> OfKeys:
    """Gradients of the keys and values, for each head of queries."""
    arrays = (_widened(blocked), _widened_per_query(per_query))
    of_key, of_value = xla_loops.key_gradients(*arrays, sweep=in_programs)
    return of_key[..., : blocked.key.shape[3]], of_value[..., : blocked.value.shape[3]]


def in_programs(
    blocked: BlockedCall, per_query: PerQuery | None, ranges: tuple[Array, Array], visit: Visit
) -> State:
    """A `Sweep` with one program for every block of every head."""
    size, (batch, heads, blocks) = blocked.block_size, ranges[0].shape
    first, last = (x.astype(jnp.int32) for x in ranges)
    # In a kernel every array is a reference to memory, under the same name.
    blocked = dataclasses.replace(blocked, first=first, last=last)
    arrays, structure = jax.tree.flatten((blocked, per_query))

    def kernel(*references: Any) -> None:
        inputs, outputs = references[: len(arrays)], references[len(arrays) :]
        in_memory, of_queries = jax.tree.unflatten(structure, inputs)
        head, block = pl.program_id(0), pl.program_id(1)
        state, step, finish = visit(Blocks(in_memory, of_queries, load), head, block)
        place = (*_divided(head, heads), block)
        state = jax.lax.fori_loop(in_memory.first[place], in_memory.last[place], step, state)
        for output, result in zip(outputs, finish(state), strict=True):
            output[...] = result

    def load(reference: Any, sequence: Index, block: Index) -> Array:
        leading = (sequence,) if reference.ndim == 2 else _divided(sequence, reference.shape[1])
        return reference[(*leading, pl.ds(block * size, size))]

    def one_block() -> State:
        """The result of one program, for its shapes."""
        of_arrays = Blocks(blocked, per_query, partial(xla_loops.load, size=size))
        state, _, finish = visit(of_arrays, jnp.int32(0), jnp.int32(0))
        return finish(state)

    results, axes = jax.eval_shape(one_block), varying_axes(blocked.query)
    shapes = [(batch * heads, blocks * size, *x.shape[1:]) for x in results]
    found = pl.pallas_call(
        kernel,
        grid=(batch * heads, blocks),
        out_shape=[
            shape_of(jax.ShapeDtypeStruct(shape, x.dtype), axes)
            for shape, x in zip(shapes, results, strict=True)
        ],
        out_specs=[pl.BlockSpec((None, *x.shape), partial(_own_block, x.ndim)) for x in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )(*arrays)
    return tuple(x.reshape(batch, heads, *x.shape[1:]) for x in found)


def _own_block(ndim: int, head: Index, block: Index) -> tuple[Any, ...]:
    return (head, block, *[0] * (ndim - 1))


def _divided(number: Index, size: int) -> tuple[Index, Index]:
    return jax.lax.div(number, jnp.int32(size)), jax.lax.rem(number, jnp.int32(size))


def _widened(blocked: BlockedCall) -> BlockedCall:
    """With zeros up to a number of columns that Triton takes: a power of two."""
    query, key, value = (_padded(x) for x in (blocked.query, blocked.key, blocked.value))
    return dataclasses.replace(blocked, query=query, key=key, value=value)


def _widened_per_query(per_query: PerQuery) -> PerQuery:
    return dataclasses.replace(per_query, gradient=_padded(per_query.gradient))


def _padded(x: Shaped[Array, "batch heads positions width"]) -> Shaped[Array, "..."]:
    return jnp.pad(x, [*[(0, 0)] * 3, (0, _width(x) - x.shape[3])])


def _width(x: Shaped[Array, "..."]) -> int:
    """The next power of two."""
    return max(_NARROWEST, pl.next_power_of_2(x.shape[3]))
