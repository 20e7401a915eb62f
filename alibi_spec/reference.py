"""The oracle: the whole model in float64 NumPy, every intermediate visible (SPEC.md §5).

Written for reading, from SPEC.md; it shares no arithmetic with the backends except the slopes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_spec.biases import bias, default_scale, interpolation, model_slopes, rounded_bias
from alibi_spec.checks import (
    check_cache,
    check_embeddings,
    check_mask,
    check_segments,
    check_token_range,
    check_tokens,
)
from alibi_spec.masks import masked_softmax, visible_keys
from alibi_spec.parameters import parameter_table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Integer, Num

    from alibi_spec.cache import Cache
    from alibi_spec.config import ALiBiConfig
    from alibi_spec.masks import AttentionMask

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """Exact GELU, x Φ(x), with the error function rather than its tanh approximation."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_tanh(x: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """The tanh approximation of GELU."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """x times the logistic function of x, without overflow."""
    return x * 0.5 * (1 + np.tanh(x / 2))


def relu(x: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """The positive part."""
    return np.maximum(x, 0)


ACTIVATION_FUNCTIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "silu": silu}


def layer_norm(
    x: Float64[np.ndarray, "*batch embed"],
    weight: Float64[np.ndarray, " embed"],
    shift: Float64[np.ndarray, " embed"] | float,
    eps: float,
) -> Float64[np.ndarray, "*batch embed"]:
    """LayerNorm with the two-pass variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight + shift


def rms_norm(
    x: Float64[np.ndarray, "*batch embed"], weight: Float64[np.ndarray, " embed"], eps: float
) -> Float64[np.ndarray, "*batch embed"]:
    """RMSNorm: the root mean square stays, the mean is not removed."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def adaptive_log_probabilities(
    logits: Float64[np.ndarray, "*batch vocab"],
    cluster_logits: Float64[np.ndarray, "*batch clusters"],
    cutoffs: tuple[int, ...],
) -> Float64[np.ndarray, "*batch vocab"]:
    """log p of an adaptive softmax (Grave et al. 2017): of the word, or its cluster and the word.

    The tokens before the first cutoff compete with the clusters; those of each cluster with one
    another.
    """
    first, ends = cutoffs[0], (*cutoffs, logits.shape[-1])
    head = np.concatenate([logits[..., :first], cluster_logits], axis=-1)
    parts = [log_softmax(head)]
    for cluster, (start, end) in enumerate(itertools.pairwise(ends)):
        chosen = parts[0][..., first + cluster, None]
        parts.append(chosen + log_softmax(logits[..., start:end]))
    parts[0] = parts[0][..., :first]
    return np.concatenate(parts, axis=-1)


def log_softmax(logits: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """Logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def biased_logits(
    query: Float[np.ndarray, "batch heads query_len head_dim"],
    key: Float[np.ndarray, "batch kv_heads key_len head_dim"],
    slopes: Float[np.ndarray, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
    segment_ids: Integer[np.ndarray, "batch key_len"] | None = None,
    distance: str = "absolute",
) -> Float64[np.ndarray, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    query, key, slopes = (array.astype(np.float64) for array in (query, key, slopes))
    query_len, key_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    scale = default_scale(scale, head_dim)
    products = query @ shared_heads(key, query.shape[1]).swapaxes(-1, -2)
    if distance == "bfloat16":
        logits = scale * (products + rounded_bias(slopes, key_len, attention_mask))
    else:
        logits = scale * products + bias(slopes, query_len, key_len, distance)
    visible = visible_keys(query_len, key_len, causal, attention_mask, segment_ids)
    return np.where(visible, logits, -np.inf)


def shared_heads(
    x: Float[np.ndarray, "batch kv_heads key_len head_dim"], num_heads: int
) -> Float[np.ndarray, "batch heads key_len head_dim"]:
    """Keys or values, each head repeated for the group of query heads that shares it."""
    return np.repeat(x, num_heads // x.shape[1], axis=1)


def reference_forward(
    config: ALiBiConfig,
    parameters: Mapping[str, Num[np.ndarray, "..."]],
    inputs: Num[np.ndarray, "batch seq *d_model"],
    attention_mask: Integer[np.ndarray, "batch seq"] | Bool[np.ndarray, "batch seq"] | None = None,
    token_type_ids: Integer[np.ndarray, "batch seq"] | None = None,
    *,
    segment_ids: Integer[np.ndarray, "batch seq"] | None = None,
    cache: Cache | None = None,
    interpolated_len: int | None = None,
) -> dict[str, Float64[np.ndarray, "..."]]:
    """The forward pass without dropout, in float64.

    Args:
        parameters: the arrays of `parameter_table(config)` by name, torch layout, any float dtype.
        inputs: tokens [batch, seq] when the configuration has a vocabulary, else embeddings
            [batch, seq, d_model].
        attention_mask: 1 for real positions, 0 for padding on either side.
        token_type_ids: of a model with `type_vocab_size`; None is 0 everywhere.
        segment_ids: of packed documents, which do not see one another (SPEC.md §4.3).
        cache: of the positions before these inputs (SPEC.md §10). Pass
            `cache.extended(result, attention_mask)` to the next call.
        interpolated_len: number of keys for interpolated slopes; None counts all keys so far.

    Returns:
        Every intermediate by name, in the order of computation: "embedding"; per layer i
        "layers.i.query", ".key" and ".value" (including the cache), ".biased_logits"
        [batch, heads, seq, key_len], ".probabilities", ".attn" and ".ffn" (the two residual
        branches) and "layers.i" (the block's output); "output"; and "logits" [batch, seq, vocab]
        with a vocabulary and a head.

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
    if segment_ids is not None:
        is_floating = np.issubdtype(segment_ids.dtype, np.floating)
        check_mask("segment_ids", segment_ids.shape, not is_floating, *inputs.shape[:2])
        check_segments(config, inputs.shape[1], cache is not None)
    missing = [row.name for row in parameter_table(config) if row.name not in parameters]
    if missing:
        raise ValueError(f"{len(missing)} parameters are missing, first {missing[0]}")
    prefix = "" if config.vocab_size is None else "transformer."
    key_len = inputs.shape[1]
    if cache is not None:
        check_cache(config, cache.visible.shape[0], inputs.shape[0])
        attention_mask, key_len = cache.mask(attention_mask, key_len), key_len + cache.length
    slope_factor = interpolation(config, interpolated_len or key_len)
    fixed_slopes = model_slopes(config) * np.float32(slope_factor)
    activation = ACTIVATION_FUNCTIONS[config.activation]
    trace: dict[str, Float64[np.ndarray, "..."]] = {}

    def weight(name: str) -> Float64[np.ndarray, "..."]:
        return parameters[name].astype(np.float64)

    def linear(x: np.ndarray, module: str, has_bias: bool = True) -> np.ndarray:
        y = x @ weight(f"{module}.weight").T
        return y + weight(f"{module}.bias") if has_bias else y

    def norm(x: np.ndarray, module: str) -> np.ndarray:
        if config.norm == "rms":
            return rms_norm(x, weight(f"{module}.weight"), config.norm_eps)
        shift = weight(f"{module}.bias") if config.norm_bias else 0.0
        return layer_norm(x, weight(f"{module}.weight"), shift, config.norm_eps)

    def projection(x: np.ndarray, module: str, name: str) -> np.ndarray:
        projected = linear(x, f"{module}.{name}", config.attention_bias)
        if config.qkv_clip is not None:
            projected = projected.clip(-config.qkv_clip, config.qkv_clip)
        if config.qk_norm and name != "value":
            projected = norm(projected, f"{module}.{name}_norm")
        batch, seq, _ = projected.shape
        return projected.reshape(batch, seq, -1, config.head_dim).swapaxes(1, 2)

    def slopes(layer: str) -> np.ndarray:
        if config.slopes == "learned":
            return weight(f"{prefix}{layer}.attn.slopes") * slope_factor
        return fixed_slopes[int(layer.removeprefix("layers."))]

    def attention(x: np.ndarray, layer: str) -> np.ndarray:
        module = f"{prefix}{layer}.attn"
        for name in ("query", "key", "value"):
            trace[f"{layer}.{name}"] = projection(x, module, name)
        if cache is not None:
            index = int(layer.removeprefix("layers."))
            for name, before in (("key", cache.keys[index]), ("value", cache.values[index])):
                trace[f"{layer}.{name}"] = np.concatenate([before, trace[f"{layer}.{name}"]], 2)
        trace[f"{layer}.biased_logits"] = biased_logits(
            trace[f"{layer}.query"],
            trace[f"{layer}.key"],
            slopes(layer),
            causal=config.causal,
            scale=config.scale,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            distance=config.distance,
        )
        trace[f"{layer}.probabilities"] = masked_softmax(trace[f"{layer}.biased_logits"])
        value = shared_heads(trace[f"{layer}.value"], config.num_heads)
        attended = (trace[f"{layer}.probabilities"] @ value).swapaxes(1, 2).reshape(x.shape)
        if config.output_projection:
            attended = linear(attended, f"{module}.output", config.attention_bias)
        trace[f"{layer}.attn"] = attended
        if config.attention_output_norm:
            return norm(x + attended, f"{prefix}{layer}.attn_output_norm")
        return attended

    def feed_forward(x: np.ndarray, layer: str) -> np.ndarray:
        module = f"{prefix}{layer}.ffn"
        hidden = linear(x, f"{module}.fc1", config.ffn_bias)
        if config.gated_ffn:
            hidden = hidden * activation(linear(x, f"{module}.gate", config.ffn_bias))
        else:
            hidden = activation(hidden)
        trace[f"{layer}.ffn"] = linear(hidden, f"{module}.fc2", config.ffn_bias)
        return trace[f"{layer}.ffn"]

    def residual(x: np.ndarray, layer: str, name: str, branch: Callable[..., Any]) -> np.ndarray:
        module = f"{prefix}{layer}.{name}_norm"
        if config.norm_placement == "post":
            return norm(x + branch(x, layer), module)
        normed = norm(x, module)
        return (normed if config.norm_placement == "pre_residual" else x) + branch(normed, layer)

    if config.vocab_size is None:
        x = inputs.astype(np.float64)
    else:
        x = weight("token_embedding.weight")[inputs] * config.embedding_scale
        if config.type_vocab_size is not None:
            types = np.zeros_like(inputs) if token_type_ids is None else token_type_ids
            x = x + weight("token_type_embedding.weight")[types]
        if config.embedding_norm:
            x = norm(x, "embedding_norm")
    trace["embedding"] = x

    for index in range(config.num_layers):
        layer = f"layers.{index}"
        x = residual(x, layer, "attn", attention)
        x = residual(x, layer, "ffn", feed_forward)
        trace[layer] = x

    if config.final_norm:
        x = norm(x, f"{prefix}final_norm")
    trace["output"] = x
    if config.vocab_size is None or config.head == "none":
        return trace

    if config.head == "masked_lm":
        x = norm(activation(linear(x, "head_transform")), "head_norm")
    head = "token_embedding" if config.tie_embeddings else "lm_head"
    logits = linear(x, head, has_bias=False) * config.logit_scale
    if config.head == "masked_lm":
        logits = logits + weight("head_bias")
    if config.adaptive_cutoffs is not None:
        clusters = linear(x, "cluster_head", has_bias=False) * config.logit_scale
        logits = adaptive_log_probabilities(logits, clusters, config.adaptive_cutoffs)
    trace["logits"] = logits
    return trace
