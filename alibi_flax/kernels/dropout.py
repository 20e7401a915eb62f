"""Dropout on attention probabilities: which of them are dropped (SPEC.md §4.1).

`alibi_spec.dropout` is the same in NumPy. Hashes are int32 here, the integers of a TPU;
their products wrap like those of uint32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32, Key

from alibi_spec.dropout import FACTORS, GOLDEN, threshold


class Dropout(NamedTuple):
    """Decides which probabilities of a call are dropped.

    Attributes:
        rate: the share that is dropped.
        query_hashes, key_hashes: a pair of them decides about one probability. They have the axes
            of query and key, so that a device holds those of its own sequences and heads.
    """

    rate: float
    query_hashes: Int32[Array, "batch heads query_len"]
    key_hashes: Int32[Array, " key_len"]


def is_kept(
    rate: float, hashes: Int32[Array, "#*shape"], others: Int32[Array, "#*shape"]
) -> Bool[Array, "*shape"]:
    """Which probabilities stay, to be divided by 1 - rate, by the hashes of query and key."""
    x = jnp.bitwise_xor(hashes, others) * _signed(FACTORS[0])
    x = jnp.bitwise_xor(x, _shifted(x, 15)) * _signed(FACTORS[1])
    return x >= np.int32(threshold(rate))


def drawn_dropout(
    rate: float,
    rng: Key[Array, ""],
    query: Float[Array, "batch heads query_len head_dim"],
    query_start: int | Int32[Array, ""],
    key_len: int,
) -> Dropout:
    """Dropout for one call of attention, with a seed from the key."""
    seed = jax.lax.bitcast_convert_type(jax.random.bits(rng, (2,), jnp.uint32), jnp.int32)
    hashes = query_hashes(seed, *query.shape[:3], query_start=query_start)
    return Dropout(rate, hashes, key_hashes(key_len))


def query_hashes(
    seed: Int32[Array, "2"],
    batch: int,
    heads: int,
    query_len: int,
    query_start: int | Int32[Array, ""],
) -> Int32[Array, "batch heads query_len"]:
    """A hash of each query of each head; the first stands at `query_start` among the keys."""
    start = _mixed(jnp.bitwise_xor(_mixed(seed[:1]), seed[1:]))
    sequence = _mixed(start + _count(batch))
    head = _mixed(sequence[:, None] + _count(heads)[None])
    position = _count(query_len) + jnp.int32(query_start)
    return _mixed(head[:, :, None] + position[None, None])


def key_hashes(key_len: int) -> Int32[Array, " key_len"]:
    """A hash of each key's position."""
    return _mixed(_count(key_len) * _signed(GOLDEN))


def _mixed(x: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """A bijection of 32-bit numbers that scatters neighbours."""
    x = jnp.bitwise_xor(x, _shifted(x, 16)) * _signed(FACTORS[0])
    x = jnp.bitwise_xor(x, _shifted(x, 15)) * _signed(FACTORS[1])
    return jnp.bitwise_xor(x, _shifted(x, 16))


def _shifted(x: Int32[Array, "*shape"], bits: int) -> Int32[Array, "*shape"]:
    return jax.lax.shift_right_logical(x, jnp.full(x.shape, bits, jnp.int32))


def _signed(word: int) -> np.int32:
    """The signed number of the same 32 bits."""
    return np.uint32(word).astype(np.int32)


def _count(length: int) -> Int32[Array, " length"]:
    return jnp.arange(length, dtype=jnp.int32)
