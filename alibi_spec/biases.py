"""Slopes, distances and the linear bias itself (SPEC.md §2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int

    from alibi_spec.config import ALiBiConfig
    from alibi_spec.masks import AttentionMask

SLOPE_RULES = ("paper", "geometric", "learned")
DISTANCES = ("absolute", "signed", "bfloat16")


def slopes(num_heads: int, bias_max: float = 8.0) -> Float32[np.ndarray, " heads"]:
    """The paper's slopes for any head count (Press et al. 2021, §3 and its released code).

    With P the largest power of two not above `num_heads`, the first P are 2^(-M k / P) for
    k = 1 … P and the others 2^(-M k / 2P) for k = 1, 3, 5 …, where M is `bias_max`.

    Computed in float64, rounded to float32 once: every backend starts from the same bits.

    Raises:
        ValueError: `num_heads` below 1 or `bias_max` not above 0.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} is not valid; expected at least 1")
    if not bias_max > 0:
        raise ValueError(f"bias_max={bias_max} is not valid; expected a number above 0")
    power = 2 ** int(math.log2(num_heads))
    first = [2 ** (-bias_max * k / power) for k in range(1, power + 1)]
    rest = [2 ** (-bias_max * k / (2 * power)) for k in range(1, 2 * (num_heads - power), 2)]
    return np.array(first + rest, dtype=np.float64).astype(np.float32)


def geometric_slopes(num_heads: int, bias_max: float = 8.0) -> Float32[np.ndarray, " heads"]:
    """jaketae/alibi's slopes: 2^(-M k / heads), k = 1 … heads, for any head count."""
    ratio = (2**bias_max) ** (1 / num_heads)
    return np.array([1 / ratio**k for k in range(1, num_heads + 1)]).astype(np.float32)


def model_slopes(config: ALiBiConfig) -> Float32[np.ndarray, "layers heads"]:
    """The slopes of every layer, before interpolation; learned slopes start at these values."""
    if config.slopes in ("paper", "learned"):
        values = slopes(config.num_heads, config.bias_max)
    elif config.slopes == "geometric":
        values = geometric_slopes(config.num_heads, config.bias_max)
    else:
        values = np.array(config.slopes, dtype=np.float64).astype(np.float32)
    return np.broadcast_to(values, (config.num_layers, config.num_heads)).copy()


def interpolation(config: ALiBiConfig, key_len: int) -> float:
    """The factor on the slopes for `key_len` keys (SPEC.md §2.1): 1 up to the limit."""
    limit = config.slope_interpolation
    return 1.0 if limit is None else limit / max(limit, key_len)


def default_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q·k: `scale`, or 1/sqrt(head_dim) if it is None."""
    return 1 / math.sqrt(head_dim) if scale is None else float(scale)


def query_positions(query_len: int, key_len: int) -> Int[np.ndarray, " query_len"]:
    """The positions of the queries among the keys: the last query is at the last key."""
    return np.arange(key_len - query_len, key_len)


def relative_position(query_len: int, key_len: int) -> Int[np.ndarray, "query_len key_len"]:
    """j - i for every query i and key j; the last query stands at the last key.

    Integers relative to the query: exact, and small where attention is large, so that the product
    with a slope keeps its bits at any sequence length.
    """
    return np.arange(key_len)[None, :] - query_positions(query_len, key_len)[:, None]


def bias(
    slopes: Float[np.ndarray, " heads"],
    query_len: int,
    key_len: int,
    distance: str = "absolute",
) -> Float[np.ndarray, "heads query_len key_len"]:
    """-m |i - j| ("absolute") or m (j - i) ("signed"), in the dtype of `slopes`.

    `rounded_bias` computes the third kind of distance.

    One rounding per element: slope and distance are exact, their product is rounded once.
    """
    relative = relative_position(query_len, key_len)
    if distance == "absolute":
        relative = -np.abs(relative)
    return slopes[:, None, None] * relative.astype(slopes.dtype)


def rounded_bias(
    slopes: Float[np.ndarray, " heads"],
    key_len: int,
    attention_mask: AttentionMask | None = None,
) -> Float[np.ndarray, "#batch heads 1 key_len"]:
    """Falcon-RW's bias as published ("bfloat16"): m p_j, slopes and products rounded to bfloat16.

    p_j counts the keys that the mask shows, from 0, so that the rounding, which grows with p_j,
    depends on where a sequence begins. It is added before the scale is applied. The dtype is that
    of `slopes`.
    """
    if attention_mask is None:
        position = np.arange(key_len)[None]
    else:
        visible = (attention_mask != 0).astype(np.int64)
        position = (visible.cumsum(axis=-1) - 1) * visible
    position = _round_to_bfloat16(position.astype(np.float32))
    rounded = _round_to_bfloat16(slopes.astype(np.float32))
    product = _round_to_bfloat16(rounded[None, :, None] * position[:, None, :])
    return product[:, :, None, :].astype(slopes.dtype)


def _round_to_bfloat16(values: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """To the nearest of 8 significant bits, ties to even; finite values only."""
    bits = values.view(np.uint32)
    bits = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
