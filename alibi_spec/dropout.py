"""Dropout on attention probabilities: which of them are dropped (SPEC.md §4.1).

A probability is dropped by a hash of its place (sequence, head, query, key) and of the call's seed.
So the same seed drops the same probabilities in both backends, in every kernel, in the forward pass
and again in the backward pass, however the work is divided, and nothing needs to be stored.

Numbers are 32 bits and wrap. `_mixed` is "lowbias32" (C. Wellons, Prospecting for hash functions,
2018). Each query and each key have a hash of their own. The work for a pair is then short enough
for the innermost loop of a kernel: one xor, two products, one shift, one comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer, UInt32

FACTORS = (0x7FEB352D, 0x846CA68B)  # odd: a product with one loses no bit
GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: consecutive keys start far apart


def query_hashes(
    seed: Integer[np.ndarray, "2"], batch: int, heads: int, query_len: int, query_start: int = 0
) -> UInt32[np.ndarray, "batch heads query_len"]:
    """A hash of each query of each head.

    Args:
        seed: two words of 32 bits, drawn once per call of attention.
        batch, heads, query_len: of the call.
        query_start: the position of the first query among the keys.
    """
    words = np.asarray(seed).astype(np.uint32)
    start = _mixed(_mixed(words[:1]) ^ words[1:])
    sequence = _mixed(start + np.arange(batch, dtype=np.uint32))
    head = _mixed(sequence[:, None] + np.arange(heads, dtype=np.uint32))
    position = np.arange(query_start, query_start + query_len, dtype=np.uint32)
    return _mixed(head[:, :, None] + position)


def key_hashes(key_len: int) -> UInt32[np.ndarray, " key_len"]:
    """A hash of each key's position."""
    return _mixed(np.arange(key_len, dtype=np.uint32) * np.uint32(GOLDEN))


def is_kept(
    query_hash: UInt32[np.ndarray, "*shape query_len"],
    key_hash: UInt32[np.ndarray, " key_len"],
    rate: float,
) -> Bool[np.ndarray, "*shape query_len key_len"]:
    """Which probabilities stay, to be divided by 1 - rate; the others become 0."""
    x = (query_hash[..., None] ^ key_hash) * np.uint32(FACTORS[0])
    x ^= x >> np.uint32(15)
    x *= np.uint32(FACTORS[1])
    return x.view(np.int32) >= np.int32(threshold(rate))


def threshold(rate: float) -> int:
    """The least hash of a pair, as a signed number, that is kept.

    Signed, because PyTorch compares no unsigned numbers.
    """
    # A rate just below 1 would round to 2^31, which no signed number reaches.
    return min(round(rate * 2**32) - 2**31, 2**31 - 1)


def _mixed(x: UInt32[np.ndarray, "*shape"]) -> UInt32[np.ndarray, "*shape"]:
    """A bijection of 32-bit numbers that scatters neighbours."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(FACTORS[0])
    x ^= x >> np.uint32(15)
    x *= np.uint32(FACTORS[1])
    return x ^ (x >> np.uint32(16))
