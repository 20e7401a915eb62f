"""The oracle: the whole model in float64 NumPy, every intermediate visible (SPEC.md §5).

Written for reading, from SPEC.md; it shares no arithmetic with the backends except the slopes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_spec.biases import bias, default_scale, interpolation, model_slopes, rounded_bias
from alibi_spec.checks import (
    check_cache,
    check_embeddings,
    check_mask,
    check_segments,
    check_token_range,
    check_token_types,
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
        ValueError: inputs, mask, segments or token types have the wrong shape, dtype or range;
            parameters are missing.
    """
    is_integer = np.issubdtype(inputs.dtype, np.integer)
    if config.vocab_size is None:
        check_embeddings(inputs.shape, not is_integer, config.d_model)
    else:
        _check_ids(inputs, config.vocab_size)
    check_token_types(config.type_vocab_size, token_type_ids is not None)
    if token_type_ids is not None and config.type_vocab_size is not None:
        _check_ids(token_type_ids, config.type_vocab_size, "token type")
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
    key_len = inputs.shape[1]
    if cache is not None:
        check_cache(config, cache.visible.shape[0], inputs.shape[0])
        attention_mask, key_len = cache.mask(attention_mask, key_len), key_len + cache.length
    slope_factor = interpolation(config, interpolated_len or key_len)
    model = Reference(config, parameters, slope_factor, attention_mask, segment_ids, cache)
    x = model.embedding(inputs, token_type_ids)
    for index in range(config.num_layers):
        x = model.block(x, index)
    x = model.output(x)
    if config.vocab_size is not None and config.head != "none":
        model.logits(x)
    return model.trace


def _check_ids(ids: Num[np.ndarray, "batch seq"], vocab_size: int, what: str = "token") -> None:
    """Raise ValueError unless these are tokens, or token types, of a vocabulary."""
    check_tokens(ids.shape, np.issubdtype(ids.dtype, np.integer))
    if ids.size:
        check_token_range(int(ids.min()), int(ids.max()), vocab_size, what)


@dataclass
class Reference:
    """The stages of `reference_forward`, one method each; what each computes is in `trace`.

    A subclass can alter a stage, to see what a mistake in it would do.

    Attributes:
        config, parameters, attention_mask, segment_ids, cache: as for `reference_forward`.
        slope_factor: what interpolation makes of the slopes (SPEC.md §2.1).
        trace: what `reference_forward` returns, as far as it has been computed.
    """

    config: ALiBiConfig
    parameters: Mapping[str, Num[np.ndarray, "..."]]
    slope_factor: float = 1.0
    attention_mask: AttentionMask | None = None
    segment_ids: Integer[np.ndarray, "batch seq"] | None = None
    cache: Cache | None = None
    trace: dict[str, Float64[np.ndarray, "..."]] = field(default_factory=dict, init=False)

    def embedding(
        self,
        inputs: Num[np.ndarray, "batch seq *d_model"],
        token_type_ids: Integer[np.ndarray, "batch seq"] | None = None,
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """The input of the first block."""
        config = self.config
        if config.vocab_size is None:
            x = inputs.astype(np.float64)
        else:
            x = self.weight("token_embedding.weight", inputs) * config.embedding_scale
            if config.type_vocab_size is not None:
                types = np.zeros_like(inputs) if token_type_ids is None else token_type_ids
                x = x + self.weight("token_type_embedding.weight", types)
            if config.embedding_norm:
                x = self.norm(x, "embedding_norm")
        self.trace["embedding"] = x
        return x

    def block(
        self, x: Float64[np.ndarray, "batch seq embed"], index: int
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """One residual block."""
        x = self._residual(self.attended(x, index), index, "ffn", self.feed_forward)
        self.trace[f"layers.{index}"] = x
        return x

    def attended(
        self, x: Float64[np.ndarray, "batch seq embed"], index: int
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """The first half of a block: the residual stream after attention."""
        return self._residual(x, index, "attn", self.attention)

    def output(
        self, x: Float64[np.ndarray, "batch seq embed"]
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """Hidden states after the last block, and the final norm."""
        if self.config.final_norm:
            x = self.norm(x, f"{self._prefix}final_norm")
        self.trace["output"] = x
        return x

    def logits(
        self, x: Float64[np.ndarray, "batch seq embed"]
    ) -> Float64[np.ndarray, "batch seq vocab"]:
        """What the head makes of hidden states."""
        config = self.config
        if config.head == "masked_lm":
            activation = ACTIVATION_FUNCTIONS[config.activation]
            x = self.norm(activation(self.linear(x, "head_transform")), "head_norm")
        head = "token_embedding" if config.tie_embeddings else "lm_head"
        logits = self.linear(x, head, has_bias=False) * config.logit_scale
        if config.head == "masked_lm":
            logits = logits + self.weight("head_bias")
        if config.adaptive_cutoffs is not None:
            clusters = self.linear(x, "cluster_head", has_bias=False) * config.logit_scale
            logits = adaptive_log_probabilities(logits, clusters, config.adaptive_cutoffs)
        self.trace["logits"] = logits
        return logits

    def attention(
        self, x: Float64[np.ndarray, "batch seq embed"], index: int
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """The residual branch of attention."""
        config, trace, layer = self.config, self.trace, f"layers.{index}"
        module = f"{self._prefix}{layer}.attn"
        for name in ("query", "key", "value"):
            trace[f"{layer}.{name}"] = self._projection(x, module, name)
        if self.cache is not None:
            before = {"key": self.cache.keys[index], "value": self.cache.values[index]}
            for name, array in before.items():
                trace[f"{layer}.{name}"] = np.concatenate([array, trace[f"{layer}.{name}"]], 2)
        query, key = trace[f"{layer}.query"], trace[f"{layer}.key"]
        trace[f"{layer}.biased_logits"] = self.biased_logits(query, key, index)
        trace[f"{layer}.probabilities"] = masked_softmax(trace[f"{layer}.biased_logits"])
        value = shared_heads(trace[f"{layer}.value"], config.num_heads)
        probabilities = self.factor(trace[f"{layer}.probabilities"], "attention")
        attended = probabilities @ self.factor(value, "attention")
        attended = attended.swapaxes(1, 2).reshape(x.shape)
        if config.output_projection:
            attended = self.linear(attended, f"{module}.output", config.attention_bias)
        trace[f"{layer}.attn"] = attended
        if config.attention_output_norm:
            return self.norm(x + attended, f"{self._prefix}{layer}.attn_output_norm")
        return attended

    def feed_forward(
        self, x: Float64[np.ndarray, "batch seq embed"], index: int
    ) -> Float64[np.ndarray, "batch seq embed"]:
        """The residual branch of the feed-forward layers."""
        config, layer = self.config, f"layers.{index}"
        module = f"{self._prefix}{layer}.ffn"
        activation = ACTIVATION_FUNCTIONS[config.activation]
        hidden = self.linear(x, f"{module}.fc1", config.ffn_bias)
        if config.gated_ffn:
            hidden = hidden * activation(self.linear(x, f"{module}.gate", config.ffn_bias))
        else:
            hidden = activation(hidden)
        self.trace[f"{layer}.ffn"] = self.linear(hidden, f"{module}.fc2", config.ffn_bias)
        return self.trace[f"{layer}.ffn"]

    def biased_logits(
        self,
        query: Float64[np.ndarray, "batch heads seq head_dim"],
        key: Float64[np.ndarray, "batch kv_heads key_len head_dim"],
        index: int,
    ) -> Float64[np.ndarray, "batch heads seq key_len"]:
        """The logits of attention in one block."""
        return biased_logits(
            self.factor(query, "attention"),
            self.factor(key, "attention"),
            self.slopes(index),
            causal=self.config.causal,
            scale=self.config.scale,
            attention_mask=self.attention_mask,
            segment_ids=self.segment_ids,
            distance=self.config.distance,
        )

    def slopes(self, index: int) -> Float[np.ndarray, " heads"]:
        """The slopes of one block."""
        if self.config.slopes == "learned":
            slopes = self.weight(f"{self._prefix}layers.{index}.attn.slopes")
            return slopes * self.slope_factor
        return (model_slopes(self.config) * np.float32(self.slope_factor))[index]

    def norm(
        self, x: Float64[np.ndarray, "*batch width"], module: str
    ) -> Float64[np.ndarray, "*batch width"]:
        """A norm of the kind of the model."""
        weight = self.weight(f"{module}.weight")
        if self.config.norm == "rms":
            return rms_norm(x, weight, self.config.norm_eps)
        shift = self.weight(f"{module}.bias") if self.config.norm_bias else 0.0
        return layer_norm(x, weight, shift, self.config.norm_eps)

    def linear(
        self, x: Float64[np.ndarray, "*batch width"], module: str, has_bias: bool = True
    ) -> Float64[np.ndarray, "*batch features"]:
        """A linear map."""
        weight = self.factor(self.weight(f"{module}.weight"), "linear")
        y = self.factor(x, "linear") @ weight.T
        return y + self.weight(f"{module}.bias") if has_bias else y

    def factor(
        self,
        x: Float64[np.ndarray, "*axes"],
        product: str,  # noqa: ARG002
    ) -> Float64[np.ndarray, "*axes"]:
        """What enters a product of matrices, "linear" or "attention": here, as it is."""
        return x

    def weight(
        self, name: str, rows: Integer[np.ndarray, "batch seq"] | None = None
    ) -> Float64[np.ndarray, "..."]:
        """A parameter, or some rows of it."""
        array = self.parameters[name]
        return (array if rows is None else array[rows]).astype(np.float64)

    def _projection(
        self, x: Float64[np.ndarray, "batch seq embed"], module: str, name: str
    ) -> Float64[np.ndarray, "batch any_heads seq head_dim"]:
        config = self.config
        projected = self.linear(x, f"{module}.{name}", config.attention_bias)
        if config.qkv_clip is not None:
            projected = projected.clip(-config.qkv_clip, config.qkv_clip)
        if config.qk_norm and name != "value":
            projected = self.norm(projected, f"{module}.{name}_norm")
        *batch_seq, width = projected.shape
        heads = width // config.head_dim  # NumPy infers no axis of an empty batch
        return projected.reshape(*batch_seq, heads, config.head_dim).swapaxes(1, 2)

    def _residual(
        self,
        x: Float64[np.ndarray, "batch seq embed"],
        index: int,
        name: str,
        branch: Callable[..., Any],
    ) -> Float64[np.ndarray, "batch seq embed"]:
        placement = self.config.norm_placement
        module = f"{self._prefix}layers.{index}.{name}_norm"
        if placement == "post":
            return self.norm(x + branch(x, index), module)
        normed = self.norm(x, module)
        return (normed if placement == "pre_residual" else x) + branch(normed, index)

    @property
    def _prefix(self) -> str:
        return "" if self.config.vocab_size is None else "transformer."
