"""The oracle: the whole model in float64 NumPy, every intermediate visible (SPEC.md §5).

Written for reading, from SPEC.md alone; it shares no arithmetic with the backends but the slopes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.bias import bias, model_slopes
from alibi_spec.checks import check_embeddings, check_mask, check_token_range, check_tokens
from alibi_spec.masks import masked_softmax, visible_keys
from alibi_spec.parameters import parameter_table

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Integer, Num

    from alibi_spec.config import ALiBiConfig

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """Exact GELU, x Φ(x), with the error function rather than its tanh approximation."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def layer_norm(
    x: Float64[np.ndarray, "*batch embed"],
    weight: Float64[np.ndarray, " embed"],
    shift: Float64[np.ndarray, " embed"],
    eps: float,
) -> Float64[np.ndarray, "*batch embed"]:
    """LayerNorm with the two-pass variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight + shift


def biased_logits(
    query: Float[np.ndarray, "batch heads query_len head_dim"],
    key: Float[np.ndarray, "batch heads key_len head_dim"],
    slopes: Float[np.ndarray, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[np.ndarray, "batch key_len"] | None = None,
    segment_ids: Integer[np.ndarray, "batch key_len"] | None = None,
    distance: str = "absolute",
) -> Float64[np.ndarray, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    query, key, slopes = (array.astype(np.float64) for array in (query, key, slopes))
    query_len, key_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    logits = scale * (query @ key.swapaxes(-1, -2))
    logits = logits + bias(slopes, query_len, key_len, distance)
    visible = visible_keys(query_len, key_len, causal, attention_mask, segment_ids)
    return np.where(visible, logits, -np.inf)


def reference_forward(
    config: ALiBiConfig,
    parameters: Mapping[str, Num[np.ndarray, "..."]],
    inputs: Num[np.ndarray, "batch seq *d_model"],
    attention_mask: Integer[np.ndarray, "batch seq"] | None = None,
) -> dict[str, Float64[np.ndarray, "..."]]:
    """The forward pass without dropout, in float64.

    Args:
        parameters: the arrays of `parameter_table(config)` by name, torch layout, any float dtype.
        inputs: tokens [batch, seq] when the configuration has a vocabulary, else embeddings
            [batch, seq, d_model].
        attention_mask: 1 for real positions, 0 for padding on either side.

    Returns:
        Every intermediate by name, in the order of computation: "embedding"; per layer i
        "layers.i.query", ".key", ".value", ".biased_logits" [batch, heads, seq, seq],
        ".probabilities", ".attn" and ".ffn" (the two residual branches) and "layers.i" (the
        block's output); "output"; and "logits" [batch, seq, vocab] with a vocabulary.

    Raises:
        ValueError: inputs or mask have the wrong shape, dtype or range; parameters are missing.
    """
    is_integer = np.issubdtype(inputs.dtype, np.integer)
    if config.vocab_size is None:
        check_embeddings(inputs.shape, not is_integer, config.d_model)
    else:
        check_tokens(inputs.shape, is_integer)
        check_token_range(int(inputs.min()), int(inputs.max()), config.vocab_size)
    if attention_mask is not None:
        is_floating = np.issubdtype(attention_mask.dtype, np.floating)
        check_mask("attention_mask", attention_mask.shape, not is_floating, *inputs.shape[:2])
    missing = [row.name for row in parameter_table(config) if row.name not in parameters]
    if missing:
        raise ValueError(f"{len(missing)} parameters are missing, first {missing[0]}")
    prefix = "" if config.vocab_size is None else "transformer."
    slopes = model_slopes(config)
    trace: dict[str, Float64[np.ndarray, "..."]] = {}

    def weight(name: str) -> Float64[np.ndarray, "..."]:
        return parameters[name].astype(np.float64)

    def linear(x: np.ndarray, module: str, has_bias: bool = True) -> np.ndarray:
        y = x @ weight(f"{module}.weight").T
        return y + weight(f"{module}.bias") if has_bias else y

    def norm(x: np.ndarray, module: str) -> np.ndarray:
        return layer_norm(x, weight(f"{module}.weight"), weight(f"{module}.bias"), config.norm_eps)

    def split_heads(x: np.ndarray) -> np.ndarray:
        batch, seq, _ = x.shape
        return x.reshape(batch, seq, config.num_heads, config.head_dim).swapaxes(1, 2)

    def merge_heads(x: np.ndarray) -> np.ndarray:
        batch, _, seq, _ = x.shape
        return x.swapaxes(1, 2).reshape(batch, seq, config.d_model)

    if config.vocab_size is None:
        x = inputs.astype(np.float64)
    else:
        x = weight("token_embedding.weight")[inputs]
    trace["embedding"] = x

    for index in range(config.num_layers):
        layer = f"layers.{index}"
        module = f"{prefix}{layer}"
        normed = norm(x, f"{module}.attn_norm")
        for name in ("query", "key", "value"):
            projected = linear(normed, f"{module}.attn.{name}", config.attention_bias)
            trace[f"{layer}.{name}"] = split_heads(projected)
        trace[f"{layer}.biased_logits"] = biased_logits(
            trace[f"{layer}.query"],
            trace[f"{layer}.key"],
            slopes,
            causal=config.causal,
            scale=config.scale,
            attention_mask=attention_mask,
            distance=config.distance,
        )
        trace[f"{layer}.probabilities"] = masked_softmax(trace[f"{layer}.biased_logits"])
        attended = merge_heads(trace[f"{layer}.probabilities"] @ trace[f"{layer}.value"])
        if config.output_projection:
            attended = linear(attended, f"{module}.attn.output", config.attention_bias)
        trace[f"{layer}.attn"] = attended
        x = x + attended

        hidden = gelu(linear(norm(x, f"{module}.ffn_norm"), f"{module}.ffn.fc1"))
        trace[f"{layer}.ffn"] = linear(hidden, f"{module}.ffn.fc2")
        x = x + trace[f"{layer}.ffn"]
        trace[layer] = x

    if config.final_norm:
        x = norm(x, f"{prefix}final_norm")
    trace["output"] = x
    if config.vocab_size is not None:
        head = "token_embedding" if config.tie_embeddings else "lm_head"
        trace["logits"] = x @ weight(f"{head}.weight").T
    return trace
