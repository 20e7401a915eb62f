"""Attention over certified windows, block by block: the cost grows linearly with the sequence.

`windows` says which blocks of keys a block of queries needs; `blockwise` or `pallas_tpu` passes
over them. The backward pass computes every block again, once for the queries and once for the keys:
nothing is added up in an order that could change, so the bits do not change either. Gradients of
gradients, and forward-mode ones, are left to dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, Integer, Shaped

from alibi_flax.kernels.call import Call, wide_dtype
from alibi_flax.kernels.windows import attention_plan
from alibi_spec.windows import BLOCK_SIZE


@dataclass(frozen=True)
class Windows:
    """One call cut for the passes: heads come first, and the last block is filled up with zeros.

    Attributes:
        query, key, value: heads of key and value serve consecutive heads of queries.
        slopes: m of each head, in the dtype of logits and sums.
        query_ids, key_ids: a query sees keys of its own number alone; None where it sees all.
        first, last: half-open ranges of key blocks for each block of queries.
        causal, scale: as in the call.
        offset: the position of the first query among the keys.
        block_size: positions in a block.
    """

    query: Float[Array, "batch heads queries head_dim"]
    key: Float[Array, "batch kv_heads keys head_dim"]
    value: Float[Array, "batch kv_heads keys value_dim"]
    slopes: Float[Array, " heads"]
    query_ids: Int32[Array, "batch queries"] | None
    key_ids: Int32[Array, "batch keys"] | None
    first: Integer[Array, "batch heads query_blocks"]
    last: Integer[Array, "batch heads query_blocks"]
    causal: bool
    scale: float
    offset: int
    block_size: int

    @property
    def query_blocks(self) -> int:
        """How many blocks the queries make."""
        return self.query.shape[2] // self.block_size

    @property
    def key_blocks(self) -> int:
        """How many blocks the keys make."""
        return self.key.shape[2] // self.block_size

    @property
    def group(self) -> int:
        """Heads of queries that one head of keys serves."""
        return self.query.shape[1] // self.key.shape[1]

    def dot(self, equation: str, left: Array, right: Array) -> Array:
        """A product of narrow or wide numbers, summed in float32 (float64)."""
        precision = jax.lax.Precision.HIGHEST  # of float32; the default can be bfloat16 or TF32
        dtype = self.slopes.dtype
        return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=dtype)


@dataclass(frozen=True)
class Rows:
    """What the backward pass knows of every query.

    Attributes:
        gradient: of its result.
        log_total: log Σ_j exp(s_ij), inf where it sees no key.
        shift: Σ_j p_ij dp_ij, which the softmax takes off every dp_ij.
    """

    gradient: Float[Array, "batch heads queries value_dim"]
    log_total: Float[Array, "batch heads queries"]
    shift: Float[Array, "batch heads queries"]


@runtime_checkable
class Passes(Protocol):
    """The three passes over the blocks, by one technology. Sums are float32 (float64)."""

    def attended(
        self, windows: Windows
    ) -> tuple[Float[Array, "batch heads queries value_dim"], Float[Array, "batch heads queries"]]:
        """The result in the dtype of the values, and log Σ_j exp(s_ij), inf in empty rows."""
        ...

    def query_gradients(
        self, windows: Windows, rows: Rows
    ) -> tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries"]]:
        """Gradients of the queries, and each query's share of the gradient of m."""
        ...

    def key_gradients(
        self, windows: Windows, rows: Rows
    ) -> tuple[
        Float[Array, "batch heads keys head_dim"], Float[Array, "batch heads keys value_dim"]
    ]:
        """Gradients of the keys and values, for each head of queries."""
        ...


Masks = tuple[Array | None, Array | None, Array, Array]  # attention_mask, segment_ids, first, last


def attention(
    call: Call, passes: Passes, block_size: int
) -> Float[Array, "batch query_len heads value_dim"]:
    """Attention of one call, up to its tolerance."""
    # Few queries need no large block; registers of a TPU hold 128 numbers in a row.
    block_size = min(block_size, -(-call.query.shape[1] // BLOCK_SIZE) * BLOCK_SIZE)
    options = _Options(passes, call.causal, call.scale, call.tolerance, block_size)
    arrays = (call.query, call.key, call.value)
    return _in_place(options, *arrays, call.slopes, call.attention_mask, call.segment_ids)


@dataclass(frozen=True)
class _Options:
    passes: Passes
    causal: bool
    scale: float
    tolerance: str | float
    block_size: int


@partial(jax.jit, static_argnums=0)  # or every call outside of jit would compile its loops anew
def _in_place(
    options: _Options,
    query: Array,
    key: Array,
    value: Array,
    slopes: Array,
    mask: Array | None,
    segments: Array | None,
) -> Array:
    """Let every device attend to the sequences and heads that it holds, if the arrays say so.

    Those on a mesh with explicit axes do. Elsewhere XLA decides, and gathers what it must; a kernel
    for TPUs it cannot divide, so there the call belongs into a `jax.shard_map`.
    """
    attend = partial(_planned, options)
    arguments = (query, key, value, slopes, mask, segments)
    shardings = [jax.typeof(x).sharding for x in arguments if x is not None]
    if not any(axes is not None for sharding in shardings for axes in sharding.spec):
        return attend(*arguments)
    batch, _, heads, _ = jax.typeof(query).sharding.spec
    arrays, rows = PartitionSpec(batch, None, heads), PartitionSpec(batch)
    specs = (arrays, arrays, arrays, PartitionSpec(heads), rows, rows)
    mesh = shardings[0].mesh
    placed: list[Any] = [
        x if x is None else jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    divided = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=arrays, check_vma=False)
    return divided(*placed)


def _planned(
    options: _Options,
    query: Array,
    key: Array,
    value: Array,
    slopes: Array,
    mask: Array | None,
    segments: Array | None,
) -> Array:
    plan = attention_plan(
        *jax.lax.stop_gradient((query, key, slopes)),
        causal=options.causal,
        scale=options.scale,
        attention_mask=mask,
        segment_ids=segments,
        tolerance=options.tolerance,
        block_size=options.block_size,
    )
    masks = (mask, segments, plan.first, plan.last)
    return _attend(options, query, key, value, slopes, masks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: _Options,
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    value: Float[Array, "batch key_len kv_heads value_dim"],
    slopes: Float[Array, " heads"],
    masks: Masks,
) -> Float[Array, "batch query_len heads value_dim"]:
    return _forward(options, query, key, value, slopes, masks)[0]


def _forward(
    options: _Options, query: Array, key: Array, value: Array, slopes: Array, masks: Masks
) -> tuple[Float[Array, "batch query_len heads value_dim"], tuple[Any, ...]]:
    windows = _windows(options, query, key, value, slopes, masks)
    attended, log_total = options.passes.attended(windows)
    attended = _seq_first(attended, query.shape[1])
    return attended, (query, key, value, slopes, masks, attended, log_total)


def _backward(
    options: _Options,
    residuals: tuple[Any, ...],
    gradient: Float[Array, "batch query_len heads value_dim"],
) -> tuple[Array | None, ...]:
    query, key, value, slopes, masks, attended, log_total = residuals
    windows = _windows(options, query, key, value, slopes, masks)
    gradient, attended = (_heads_first(x, options.block_size) for x in (gradient, attended))
    shift = windows.dot("bhqd,bhqd->bhq", gradient, attended)
    rows = Rows(gradient, log_total, shift)
    of_query, of_slopes = options.passes.query_gradients(windows, rows)
    of_key, of_value = options.passes.key_gradients(windows, rows)

    def grouped(x: Float[Array, "batch heads keys width"]) -> Array:
        shape = (x.shape[0], -1, windows.group, *x.shape[2:])
        return _seq_first(x.reshape(shape).sum(axis=2), key.shape[1])

    return (
        _seq_first(of_query, query.shape[1]).astype(query.dtype),
        grouped(of_key).astype(key.dtype),
        grouped(of_value).astype(value.dtype),
        of_slopes.sum(axis=(0, 2)).astype(slopes.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _windows(
    options: _Options, query: Array, key: Array, value: Array, slopes: Array, masks: Masks
) -> Windows:
    attention_mask, segment_ids, first, last = masks
    size = options.block_size
    offset = key.shape[1] - query.shape[1]
    query_ids, key_ids = None, None
    is_padded = not options.causal and key.shape[1] % size > 0  # causality hides padding, too
    if attention_mask is not None or segment_ids is not None or is_padded:
        ids = jnp.zeros(key.shape[:2], jnp.int32) if segment_ids is None else _ranks(segment_ids)
        padding = ((0, 0), (0, -query.shape[1] % size))
        query_ids = jnp.pad(ids[:, offset:], padding)
        if attention_mask is not None:
            ids = jnp.where(attention_mask.astype(jnp.bool_), ids, -1)
        padding = ((0, 0), (0, -key.shape[1] % size))
        key_ids = jnp.pad(ids, padding, constant_values=-1)
    return Windows(
        *(_heads_first(x, size) for x in (query, key, value)),
        slopes=slopes.astype(wide_dtype(query)),
        query_ids=query_ids,
        key_ids=key_ids,
        first=first,
        last=last,
        causal=options.causal,
        scale=options.scale,
        offset=offset,
        block_size=size,
    )


def _ranks(segment_ids: Integer[Array, "batch key_len"]) -> Int32[Array, "batch key_len"]:
    """Numbers from 0, equal where segments are: 64-bit ids fit no kernel."""

    def ranks(ids: Integer[Array, " key_len"]) -> Int32[Array, " key_len"]:
        return jnp.searchsorted(jnp.sort(ids), ids, method="sort").astype(jnp.int32)

    return jax.vmap(ranks)(segment_ids)


def _heads_first(
    x: Shaped[Array, "batch seq heads width"], block_size: int
) -> Shaped[Array, "batch heads padded_seq width"]:
    padding = ((0, 0), (0, -x.shape[1] % block_size), (0, 0), (0, 0))
    return jnp.pad(x, padding).swapaxes(1, 2)


def _seq_first(
    x: Shaped[Array, "batch heads padded_seq width"], seq: int
) -> Shaped[Array, "batch seq heads width"]:
    return x.swapaxes(1, 2)[:, :seq]
