"""Inputs on which float32 arithmetic is exact, so that correct backends agree to the last bit.

Parameters and activations are small integers times powers of two; scale and slopes are powers of
two. Every product and every partial sum, in any order, up to the biased logits is then an integer
below 2^24 times one power of two: exactly representable, whatever the order of summation and with
or without fused multiply-adds. `exact_attention` proves this for the very arrays it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.config import ALiBiConfig
from alibi_spec.parameters import parameter_table
from alibi_spec.reference import biased_logits, shared_heads

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

_FLOAT32_INTEGERS = 2**24  # every integer up to here is a float32
_ACTIVATION_UNIT = 2.0**-1
_WEIGHT_UNIT = 2.0**-2


@dataclass(frozen=True)
class ExactAttention:
    """One attention layer whose biased logits are exact in float32.

    Attributes:
        config: the configuration given, cut to one layer, with power-of-two scale and slopes, and
            without options that round: interpolated slopes, clamping, norms of queries and keys.
        parameters: every parameter of `config` by torch name.
        inputs: what enters the attention layer.
        attention_mask: padding on the left of one sequence and on the right of another.
        biased_logits: the only right answer.
    """

    config: ALiBiConfig
    parameters: dict[str, Float32[np.ndarray, "..."]]
    inputs: Float32[np.ndarray, "batch seq embed"]
    attention_mask: Int64[np.ndarray, "batch seq"]
    biased_logits: Float32[np.ndarray, "batch heads seq seq"]


def exact_attention(
    config: ALiBiConfig, batch: int = 3, seq: int = 320, seed: int = 0
) -> ExactAttention:
    """An exact case with the heads, widths and options of `config`.

    Raises:
        ValueError: the case would not be exact: scale, width or length need more than 24 bits.
    """
    slopes = 2.0 ** -(1 + np.arange(config.num_heads) % 8)
    config = replace(
        config,
        num_layers=1,
        vocab_size=None,
        attention_scale=2.0 ** min(max(round(math.log2(config.scale)), -8), 4),
        slopes="learned" if config.slopes == "learned" else tuple(slopes.tolist()),
        slope_interpolation=None,
        qkv_clip=None,
        qk_norm=False,
        attention_output_norm=False,
    )
    rng = np.random.default_rng(seed)
    # About 32 non-zero weights per output keep the sums short at any width.
    density = min(1.0, 32 / config.d_model)

    def dyadic(shape: tuple[int, ...], unit: float, density: float) -> np.ndarray:
        keep = rng.random(shape) < density
        return (rng.integers(-2, 3, shape) * unit * keep).astype(np.float32)

    parameters = {
        row.name: dyadic(row.shape, _WEIGHT_UNIT, density) for row in parameter_table(config)
    }
    if config.slopes == "learned":
        parameters["layers.0.attn.slopes"] = slopes.astype(np.float32)
    inputs = dyadic((batch, seq, config.d_model), _ACTIVATION_UNIT, 1.0)
    attention_mask = np.ones((batch, seq), dtype=np.int64)
    attention_mask[0, : seq // 3] = 0
    attention_mask[-1, seq - seq // 4 :] = 0

    query, key = (_project(config, parameters, inputs, name) for name in ("query", "key"))
    largest_key = shared_heads(np.abs(key), config.num_heads).max(axis=2)
    largest_score = (np.abs(query).max(axis=2) * largest_key).sum(axis=-1).max()
    bias_scale = config.scale if config.distance == "bfloat16" else 1.0
    unit = min(config.scale * (_ACTIVATION_UNIT * _WEIGHT_UNIT) ** 2, bias_scale * slopes.min())
    largest = config.scale * largest_score + bias_scale * slopes.max() * seq
    _require_exact("biased logits", largest, unit)
    logits = biased_logits(
        query,
        key,
        slopes,
        causal=config.causal,
        scale=config.scale,
        attention_mask=attention_mask,
        distance=config.distance,
    )
    return ExactAttention(config, parameters, inputs, attention_mask, logits.astype(np.float32))


def _project(
    config: ALiBiConfig, parameters: dict[str, np.ndarray], inputs: np.ndarray, name: str
) -> np.ndarray:
    weight = parameters[f"layers.0.attn.{name}.weight"].astype(np.float64)
    bias = parameters.get(f"layers.0.attn.{name}.bias", np.zeros(len(weight)))
    magnitude = np.abs(inputs) @ np.abs(weight).T + np.abs(bias)
    _require_exact(name, magnitude.max(), _ACTIVATION_UNIT * _WEIGHT_UNIT)
    projected = inputs @ weight.T + bias
    batch, seq, _ = projected.shape
    return projected.reshape(batch, seq, -1, config.head_dim).swapaxes(1, 2)


def _require_exact(name: str, largest: float, unit: float) -> None:
    """Every partial sum is a multiple of `unit` of magnitude at most `largest`."""
    if largest / unit > _FLOAT32_INTEGERS:
        raise ValueError(
            f"{name} would need {math.log2(largest / unit):.1f} bits, float32 has 24; "
            "shorten the sequence"
        )
