"""Attention over certified windows, block by block: the cost grows linearly with the sequence.

`certificate` says which blocks of keys a block of queries needs; the passes of one technology
compute them; `partition` divides them among devices. The backward pass recomputes every block, once
for the queries and once for the keys. So no sum has an order that could change, and the bits are
always the same. Only dense attention has second and forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, Integer, Shaped

from alibi_flax.kernels import neighbours
from alibi_flax.kernels.call import HIGHEST, Call, of_queries, wide_dtype
from alibi_flax.kernels.certificate import attention_plan
from alibi_flax.kernels.partition import automatic_mesh, divided, varying, varying_axes
from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.checks import without_derivative
from alibi_spec.sharding import activation_axes, devices_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("query", "key", "value", "slopes", "query_ids", "key_ids"),
        *("query_hashes", "key_hashes", "first", "last", "query_start"),
    ),
    meta_fields=("causal", "scale", "dropout", "block_size"),
)
@dataclass(frozen=True)
class BlockedCall:
    """The input of the passes: one call, and zeros to fill the last block.

    Attributes:
        query, key, value: heads of key and value serve consecutive heads of queries.
        slopes: m of each head, in the dtype of logits and sums.
        query_ids, key_ids: a query sees only keys with its own id; None if it sees all.
        query_hashes, key_hashes: of dropout; None without.
        first, last: half-open ranges of key blocks for each block of queries.
        query_start: the position of the first query among the keys.
        causal, scale: as in the call.
        dropout: the share of probabilities that is dropped.
        block_size: positions in a block.
    """

    query: Float[Array, "batch heads queries head_dim"]
    key: Float[Array, "batch kv_heads keys head_dim"]
    value: Float[Array, "batch kv_heads keys value_dim"]
    slopes: Float[Array, " heads"]
    query_ids: Int32[Array, "batch queries"] | None
    key_ids: Int32[Array, "batch keys"] | None
    query_hashes: Int32[Array, "batch heads queries"] | None
    key_hashes: Int32[Array, "1 keys"] | None
    first: Integer[Array, "batch heads query_blocks"]
    last: Integer[Array, "batch heads query_blocks"]
    query_start: Int32[Array, "1"]
    causal: bool
    scale: float
    dropout: float
    block_size: int

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries."""
        return self.query.shape[2] // self.block_size

    @property
    def key_blocks(self) -> int:
        """Number of blocks of keys."""
        return self.key.shape[2] // self.block_size

    @property
    def group(self) -> int:
        """Heads of queries that one head of keys serves."""
        return self.query.shape[1] // self.key.shape[1]

    def dot(self, equation: str, left: Array, right: Array) -> Array:
        """A product of narrow or wide numbers, summed in float32 (float64)."""
        dtype = self.slopes.dtype
        return jnp.einsum(equation, left, right, precision=HIGHEST, preferred_element_type=dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("gradient", "log_total", "shift"),
    meta_fields=(),
)
@dataclass(frozen=True)
class PerQuery:
    """The facts about every query that the backward pass uses.

    Attributes:
        gradient: of its result.
        log_total: log Σ_j exp(s_ij), inf where it sees no key.
        shift: Σ_j p_ij dp_ij, which the softmax's gradient subtracts from every dp_ij.
    """

    gradient: Float[Array, "batch heads queries value_dim"]
    log_total: Float[Array, "batch heads queries"]
    shift: Float[Array, "batch heads queries"]


# What the three passes return.
Attended = tuple[Float[Array, "batch heads queries value_dim"], Float[Array, "batch heads queries"]]
OfQueries = tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries"]]
OfKeys = tuple[
    Float[Array, "batch heads keys head_dim"], Float[Array, "batch heads keys value_dim"]
]


@runtime_checkable
class Passes(Protocol):
    """The three passes over the blocks, by one technology: a file of this folder.

    Sums are float32 (float64).
    """

    def block_size(self, call: Call) -> int:
        """Positions in a block, for a call with many queries."""
        ...

    def attended(self, blocked: BlockedCall) -> Attended:
        """The result, in the dtype of the values; log Σ_j exp(s_ij), inf if it sees no key."""
        ...

    def query_gradients(self, blocked: BlockedCall, per_query: PerQuery) -> OfQueries:
        """Gradients of the queries, and each query's share of the gradient of m."""
        ...

    def key_gradients(self, blocked: BlockedCall, per_query: PerQuery) -> OfKeys:
        """Gradients of the keys and values, for each head of queries."""
        ...


# The axes of every array, by name: what can be divided among devices.
LAYOUTS = {
    "query": "batch heads query_len head_dim",
    "key": "batch kv_heads key_len head_dim",
    "value": "batch kv_heads key_len value_dim",
    "slopes": "heads",
    "query_start": "one",
    "attention_mask": "batch key_len",
    "segment_ids": "batch key_len",
    "query_hashes": "batch heads query_len",
    "key_hashes": "key_len",
    "attended": "batch query_len heads value_dim",
    "gradient": "batch query_len heads value_dim",
    "log_total": "batch heads queries",
    "first": "batch heads query_blocks",
    "last": "batch heads query_blocks",
    "of_keys": "batch heads keys head_dim",
    "of_values": "batch heads keys value_dim",
    "of_slopes": "batch heads",
}


_OF_KEYS = ("key", "value")
_NAMES = ("query", "key", "value", "slopes", "attention_mask", "segment_ids")  # of a call
# Of the arguments.
NOT_DIFFERENTIATED = (
    *("query_start", "attention_mask", "segment_ids"),
    *("query_hashes", "key_hashes"),
)


def attention(
    call: Call, passes: Passes, block_size: int | None = None
) -> Float[Array, "batch query_len heads value_dim"]:
    """Attention of one call, up to its tolerance, in blocks of this size or the passes' own."""
    size = passes.block_size(call) if block_size is None else block_size
    # Few queries need no large block. Sizes are multiples of 128, the width of a TPU's registers.
    size = min(size, -(-call.query.shape[2] // BLOCK_SIZE) * BLOCK_SIZE)
    rate, *hashes = (0.0, None, None) if call.dropout is None else call.dropout
    options = _Options(*(passes, call.causal, call.scale, call.tolerance, rate, size, call.windows))
    arrays = {name: getattr(call, name) for name in _NAMES}
    arrays["query_start"] = jnp.full(1, call.query_start, jnp.int32)
    return _in_place(
        options, arrays | dict(zip(("query_hashes", "key_hashes"), hashes, strict=True))
    )


@dataclass(frozen=True)
class _Options:
    passes: Passes
    causal: bool
    scale: float
    tolerance: str | float
    dropout: float
    block_size: int
    windows: tuple[int, ...] | None


Arrays = dict[str, Any]  # arrays, or None, by their names in `LAYOUTS`


@partial(jax.jit, static_argnums=0)  # else every call outside of jit would compile its loops
def _in_place(options: _Options, arrays: Arrays) -> Array:
    """Let every device attend to the sequences and heads that it holds.

    On a mesh with explicit axes the types of the arrays say where they are, and on one that
    `jax.set_mesh` chose the rules of SPEC.md §19 do. Otherwise XLA decides that later, and
    `partition` tells it how the passes can be divided.
    """
    mesh = automatic_mesh()
    if mesh is not None:
        return _by_rules(options, mesh, arrays)
    shardings = [jax.typeof(x).sharding for x in arrays.values() if x is not None]
    if not any(axes is not None for sharding in shardings for axes in sharding.spec):
        return _attend_alike(options, arrays)
    batch, heads, *_ = jax.typeof(arrays["query"]).sharding.spec
    places = {"batch": batch, "heads": heads, "kv_heads": heads}
    specs = {name: PartitionSpec(*map(places.get, LAYOUTS[name].split())) for name in arrays}
    mesh = jax.typeof(arrays["query"]).sharding.mesh
    placed: Arrays = {
        name: x if x is None else jax.sharding.reshard(x, NamedSharding(mesh, specs[name]))
        for name, x in arrays.items()
    }
    return _mapped(partial(_attend_alike, options), mesh, specs)(placed)


def _by_rules(options: _Options, mesh: AbstractMesh, arrays: Arrays) -> Array:
    """Every device attends to its sequences, positions and heads, from the keys that these need.

    Where the devices are a multiple of the heads of keys, several get the same one.
    """
    (batch, heads, seq, _), (_, kv_heads, key_len, _) = arrays["query"].shape, arrays["key"].shape
    axes = activation_axes({"batch": batch, "seq": seq, "heads": heads}, mesh.shape)
    devices = devices_of(axes["heads"], mesh.shape)
    if devices % kv_heads == 0:
        copies = {name: jnp.repeat(arrays[name], devices // kv_heads, 1) for name in _OF_KEYS}
        arrays = arrays | copies
    elif kv_heads % devices:
        axes["heads"] = ()
    places = axes | {"kv_heads": axes["heads"]}
    if seq != key_len:  # the queries of a cache stay together
        axes["seq"] = ()
    attend = partial(_attend_alike, options)
    if axes["seq"]:
        attend = partial(_attend_with_neighbours, options, axes["seq"])
        places |= {"query_len": axes["seq"], "key_len": axes["seq"]}
        if arrays["attention_mask"] is None:
            arrays = arrays | {"attention_mask": jnp.ones((batch, seq), jnp.bool_)}
    specs = {name: PartitionSpec(*map(places.get, LAYOUTS[name].split())) for name in arrays}
    return _mapped(attend, mesh, specs)(arrays)


def _mapped(
    attend: Callable[[Arrays], Array], mesh: Any, specs: Mapping[str, PartitionSpec]
) -> Any:
    batch, heads, query_len, _ = specs["query"]
    goal = PartitionSpec(batch, query_len, heads)
    return jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=goal)


def _attend_with_neighbours(options: _Options, axes: tuple[str, ...], arrays: Arrays) -> Array:
    def attend_here(query_start: int, arrays: Arrays) -> Array:
        return _attend_alike(options, arrays | {"query_start": jnp.full(1, query_start, jnp.int32)})

    return neighbours.attend(
        *(attend_here, arrays, axes, LAYOUTS),
        causal=options.causal,
        scale=options.scale,
        windows=options.windows,
    )


def _attend_alike(options: _Options, arrays: Arrays) -> Array:
    """Let all arrays in a shard_map vary along the same axes, so that gradients do, too."""
    axes = varying_axes(*arrays.values())
    arrays = {name: x if x is None else varying(x, axes) for name, x in arrays.items()}
    return _attend(options, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, arrays: Arrays) -> Float[Array, "batch query_len heads value_dim"]:
    return _forward(options, arrays)[0]


def _forward(
    options: _Options, arrays: Arrays
) -> tuple[Float[Array, "batch query_len heads value_dim"], Arrays]:
    results = ("attended", "log_total", "first", "last")
    found = _divided(partial(_forward_here, options), results, arrays)
    residuals = dict(zip(results, found, strict=True))
    return residuals["attended"], arrays | residuals


def _backward(
    options: _Options, residuals: Arrays, gradient: Float[Array, "batch query_len heads value_dim"]
) -> tuple[Arrays]:
    results = ("query", "of_keys", "of_values", "of_slopes")
    of_query, of_key, of_value, of_slopes = _divided(
        partial(_backward_here, options), results, residuals | {"gradient": gradient}
    )

    def grouped(x: Float[Array, "batch heads keys width"], like: Array) -> Array:
        """The sum over the heads of queries that share a head of keys."""
        shape = (x.shape[0], like.shape[1], -1, *x.shape[2:])
        return x.reshape(shape).sum(axis=2).astype(like.dtype)

    gradients = {
        "query": of_query,
        "key": grouped(of_key, residuals["key"]),
        "value": grouped(of_value, residuals["value"]),
        "slopes": of_slopes.sum(axis=0).astype(residuals["slopes"].dtype),
    }
    gradients |= dict.fromkeys(NOT_DIFFERENTIATED)
    return (gradients,)


_attend.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _divided(
    function: Callable[[Arrays], tuple[Array, ...]], results: tuple[str, ...], arrays: Arrays
) -> tuple[Array, ...]:
    return divided(function, LAYOUTS, tuple(LAYOUTS[name] for name in results), arrays)


@_divided.defjvp
def _(*_: Any) -> Any:
    raise RuntimeError(without_derivative("second"))


def _forward_here(options: _Options, arrays: Arrays) -> tuple[Array, ...]:
    """Of one device: the result, the log-sums and the windows, for the backward pass."""
    named: Any = {name: arrays.get(name) for name in _NAMES}
    call = Call(
        **named,
        causal=options.causal,
        scale=options.scale,
        query_start=arrays["query_start"][0],
        tolerance=options.tolerance,
        distance="absolute",
        dropout=None,
    )
    plan = attention_plan(call, options.block_size)
    ranges = {"first": plan.first, "last": plan.last}
    attended, log_total = options.passes.attended(_blocked(options, arrays | ranges))
    return _seq_first(attended, arrays["query"].shape[2]), log_total, plan.first, plan.last


def _backward_here(options: _Options, arrays: Arrays) -> tuple[Array, ...]:
    """Of one device: gradients of queries; of keys and values per query head; of m per sequence."""
    query, key = arrays["query"], arrays["key"]
    blocked = _blocked(options, arrays)
    gradient, attended = (
        _padded(arrays[name].swapaxes(1, 2), options.block_size)
        for name in ("gradient", "attended")
    )
    shift = blocked.dot("bhqd,bhqd->bhq", gradient, attended)
    per_query = PerQuery(gradient, arrays["log_total"], shift)
    of_query, of_slopes = options.passes.query_gradients(blocked, per_query)
    of_key, of_value = options.passes.key_gradients(blocked, per_query)
    return (
        of_query[:, :, : query.shape[2]].astype(query.dtype),
        *(x[:, :, : key.shape[2]] for x in (of_key, of_value)),
        of_slopes.sum(axis=2),
    )


def _blocked(options: _Options, arrays: Arrays) -> BlockedCall:
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    attention_mask, segment_ids = arrays.get("attention_mask"), arrays.get("segment_ids")
    (batch, _, query_len, _), key_len, size = query.shape, key.shape[2], options.block_size
    query_ids, key_ids = None, None
    is_padded = not options.causal and key_len % size > 0  # causal queries see no padding
    if attention_mask is not None or segment_ids is not None or is_padded:
        ids = jnp.zeros((batch, key_len), jnp.int32) if segment_ids is None else _ranks(segment_ids)
        own = of_queries(ids, arrays["query_start"][0], query_len)
        query_ids = jnp.pad(own, ((0, 0), (0, -query_len % size)))
        if attention_mask is not None:  # -1 is the id of no query
            ids = jnp.where(attention_mask.astype(jnp.bool_), ids, -1)
        key_ids = jnp.pad(ids, ((0, 0), (0, -key_len % size)), constant_values=-1)
    query_hashes, key_hashes = arrays.get("query_hashes"), arrays.get("key_hashes")
    if query_hashes is not None and key_hashes is not None:
        query_hashes = jnp.pad(query_hashes, ((0, 0), (0, 0), (0, -query_len % size)))
        key_hashes = jnp.pad(key_hashes, (0, -key_len % size))[None]
    return BlockedCall(
        *(_padded(x, size) for x in (query, key, value)),
        slopes=arrays["slopes"].astype(wide_dtype(query)),
        query_ids=query_ids,
        key_ids=key_ids,
        query_hashes=query_hashes,
        key_hashes=key_hashes,
        first=arrays["first"],
        last=arrays["last"],
        query_start=arrays["query_start"],
        causal=options.causal,
        scale=options.scale,
        dropout=options.dropout,
        block_size=size,
    )


def _ranks(segment_ids: Integer[Array, "batch key_len"]) -> Int32[Array, "batch key_len"]:
    """Ids from 0, equal where segments are: kernels take no 64-bit ids."""

    def ranks(ids: Integer[Array, " key_len"]) -> Int32[Array, " key_len"]:
        return jnp.searchsorted(jnp.sort(ids), ids, method="sort").astype(jnp.int32)

    return jax.vmap(ranks)(segment_ids)


def _padded(
    x: Shaped[Array, "batch heads seq width"], block_size: int
) -> Shaped[Array, "batch heads padded_seq width"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block_size), (0, 0)))


def _seq_first(
    x: Shaped[Array, "batch heads padded_seq width"], seq: int
) -> Shaped[Array, "batch seq heads width"]:
    return x.swapaxes(1, 2)[:, :seq]
