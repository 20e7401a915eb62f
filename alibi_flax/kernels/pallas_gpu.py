"""The passes over blocks as Pallas kernels for GPUs, compiled by Triton.

A program owns one block of one head and keeps its state in registers; its steps are those of
`blockwise`. JAX 0.11 has deprecated Triton under Pallas, and what is to replace it (Mosaic GPU)
cannot be tried without a GPU.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Shaped

from alibi_flax.kernels import blockwise
from alibi_flax.kernels.blockwise import Blocks, Index, State, Visit
from alibi_flax.kernels.call import Call, refuses_bias
from alibi_flax.kernels.partition import shape_of, varying_axes
from alibi_flax.kernels.windowed import Rows, Windows

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


def attended(
    windows: Windows,
) -> tuple[Float[Array, "batch heads queries value_dim"], Float[Array, "batch heads queries"]]:
    """The result in the dtype of the values, and log Σ_j exp(s_ij), inf in empty rows."""
    result, log_total = blockwise.attended(_widened(windows), run=in_programs)
    return result[..., : windows.value.shape[3]], log_total


def query_gradients(
    windows: Windows, rows: Rows
) -> tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries"]]:
    """Gradients of the queries, and each query's share of the gradient of m."""
    found = blockwise.query_gradients(_widened(windows), _widened_rows(rows), run=in_programs)
    of_query, of_slope = found
    return of_query[..., : windows.query.shape[3]], of_slope


def key_gradients(
    windows: Windows, rows: Rows
) -> tuple[Float[Array, "batch heads keys head_dim"], Float[Array, "batch heads keys value_dim"]]:
    """Gradients of the keys and values, for each head of queries."""
    found = blockwise.key_gradients(_widened(windows), _widened_rows(rows), run=in_programs)
    of_key, of_value = found
    return of_key[..., : windows.key.shape[3]], of_value[..., : windows.value.shape[3]]


def in_programs(
    windows: Windows, rows: Rows | None, ranges: tuple[Array, Array], visit: Visit
) -> State:
    """Every block of every head by a program of its own: a `Run`."""
    size, (batch, heads, blocks) = windows.block_size, ranges[0].shape
    names = ("query", "key", "value", "slopes")
    names = (*names, "query_ids", "key_ids", "query_hashes", "key_hashes")
    of_windows = {name: getattr(windows, name) for name in names}
    of_ranges = [x.astype(jnp.int32) for x in ranges]
    arrays, structure = jax.tree.flatten((of_ranges, of_windows, rows and vars(rows)))

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: len(arrays)], refs[len(arrays) :]
        (first, last), of_windows, of_rows = jax.tree.unflatten(structure, inputs)
        own = Blocks(dataclasses.replace(windows, **of_windows), of_rows and Rows(**of_rows), load)
        head, block = pl.program_id(0), pl.program_id(1)
        state, step, finish = visit(own, head, block)
        place = (*_divided(head, heads), block)
        state = jax.lax.fori_loop(first[place], last[place], step, state)
        for output, found in zip(outputs, finish(state), strict=True):
            output[...] = found

    def load(ref: Any, sequence: Index, block: Index) -> Array:
        leading = (sequence,) if ref.ndim == 2 else _divided(sequence, ref.shape[1])
        return ref[(*leading, pl.ds(block * size, size))]

    def one_block() -> State:
        zero, load = jnp.int32(0), partial(blockwise.load, size=size)
        state, _, finish = visit(Blocks(windows, rows, load), zero, zero)
        return finish(state)

    outputs, axes = jax.eval_shape(one_block), varying_axes(windows.query)
    found = pl.pallas_call(
        kernel,
        grid=(batch * heads, blocks),
        out_shape=[
            shape_of(
                jax.ShapeDtypeStruct((batch * heads, blocks * size, *x.shape[1:]), x.dtype), axes
            )
            for x in outputs
        ],
        out_specs=[pl.BlockSpec((None, *x.shape), partial(_own_block, x.ndim)) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )(*arrays)
    return tuple(x.reshape(batch, heads, *x.shape[1:]) for x in found)


def _own_block(ndim: int, head: Index, block: Index) -> tuple[Any, ...]:
    return (head, block, *[0] * (ndim - 1))


def _divided(number: Index, size: int) -> tuple[Index, Index]:
    return jax.lax.div(number, jnp.int32(size)), jax.lax.rem(number, jnp.int32(size))


def _widened(windows: Windows) -> Windows:
    """With as many columns as Triton takes: a power of two."""
    query, key, value = (_padded(x) for x in (windows.query, windows.key, windows.value))
    return dataclasses.replace(windows, query=query, key=key, value=value)


def _widened_rows(rows: Rows) -> Rows:
    return dataclasses.replace(rows, gradient=_padded(rows.gradient))


def _padded(x: Shaped[Array, "batch heads positions width"]) -> Shaped[Array, "..."]:
    return jnp.pad(x, [*[(0, 0)] * 3, (0, _width(x) - x.shape[3])])


def _width(x: Shaped[Array, "..."]) -> int:
    """The next power of two."""
    return max(_NARROWEST, pl.next_power_of_2(x.shape[3]))
