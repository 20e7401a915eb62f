"""Dropout on attention probabilities: which of them are dropped (SPEC.md §4.1).

`alibi_spec.dropout` is the same in NumPy. torch has few operations on unsigned numbers. Products
of int32 wrap as theirs do, and a logical shift is an arithmetic shift with the sign bits cleared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from alibi_spec.dropout import FACTORS, GOLDEN, threshold


class Dropout(NamedTuple):
    """Decides which probabilities of a call, or of a tile of it, are dropped.

    Attributes:
        rate: the share that is dropped.
        query_hashes, key_hashes: a pair of them decides about one probability.
    """

    rate: float
    query_hashes: Int32[Tensor, "*shape query_len"]
    key_hashes: Int32[Tensor, "#*shape key_len"]

    def kept(self) -> Int32[Tensor, "*shape query_len key_len"]:
        """1 where a probability stays, to be divided by 1 - rate; 0 where it is dropped."""
        x = self.query_hashes[..., None] ^ self.key_hashes[..., None, :]
        x *= _signed(FACTORS[0])
        x ^= _shifted(x, 15)
        x *= _signed(FACTORS[1])
        return x.ge_(threshold(self.rate))


def drawn_dropout(
    rate: float,
    generator: torch.Generator | None,
    query: Float[Tensor, "batch heads query_len head_dim"],
    query_start: int,
    key_len: int,
) -> Dropout:
    """Dropout for one call of attention, with a seed from the generator (None: torch's own)."""
    seed = torch.randint(
        *(-(2**31), 2**31, (2,)), generator=generator, dtype=torch.int32, device=query.device
    )
    hashes = query_hashes(seed, *query.shape[:3], query_start=query_start)
    return Dropout(rate, hashes, key_hashes(key_len, query.device))


def query_hashes(
    seed: Int32[Tensor, "2"], batch: int, heads: int, query_len: int, query_start: int
) -> Int32[Tensor, "batch heads query_len"]:
    """A hash of each query of each head; the first stands at `query_start` among the keys."""
    start = _mixed(_mixed(seed[:1]) ^ seed[1:])
    sequence = _mixed(start + _count(batch, seed.device))
    head = _mixed(sequence[:, None] + _count(heads, seed.device))
    return _mixed(head[:, :, None] + query_start + _count(query_len, seed.device))


def key_hashes(key_len: int, device: torch.device) -> Int32[Tensor, " key_len"]:
    """A hash of each key's position."""
    return _mixed(_count(key_len, device) * _signed(GOLDEN))


def drop(x: Tensor, kept: Int32[Tensor, "*shape"]) -> None:
    """Set to 0, in place, all numbers that are not kept, NaN too.

    Multiplies their bits as integers, in a quarter of the time of a selection.
    """
    x.view(torch.int64 if x.dtype == torch.float64 else torch.int32).mul_(kept)


def _mixed(x: Int32[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
    """A bijection of 32-bit numbers that scatters neighbours."""
    x = (x ^ _shifted(x, 16)) * _signed(FACTORS[0])
    x = (x ^ _shifted(x, 15)) * _signed(FACTORS[1])
    return x ^ _shifted(x, 16)


def _shifted(x: Int32[Tensor, "*shape"], bits: int) -> Int32[Tensor, "*shape"]:
    shifted = x >> bits
    shifted &= 2 ** (32 - bits) - 1
    return shifted


def _signed(word: int) -> int:
    """The signed number of the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def _count(length: int, device: torch.device) -> Int32[Tensor, " length"]:
    return torch.arange(length, dtype=torch.int32, device=device)
