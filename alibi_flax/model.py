"""ALiBiTransformer and ALiBiLM as ordinary Flax linen modules (SPEC.md §5).

Read top to bottom: attention, feed-forward, block, transformer, language model. Paths and shapes of
parameters are those of `alibi_spec.parameter_table`; `alibi_torch/model.py` is the mirror image.
Checkpoints and training live elsewhere.

Every module takes linen's `dtype` (of the computation; None follows inputs and parameters as
SPEC.md §5.1 says) and `param_dtype`. Calling with `deterministic=False` turns dropout on, drawn
from the rng "dropout".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypedDict, TypeVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.linen.dtypes import promote_dtype
from jax import Array
from jax.export import is_symbolic_dim
from jaxtyping import Bool, Float, Integer

from alibi_flax.cache import KVCache
from alibi_flax.dispatch import (
    attention_implementations,
    attention_within,
    biased_logits,
)
from alibi_flax.kernels.call import has_values_on_host
from alibi_flax.sharding import constrained
from alibi_spec import ALiBiConfig, Parameter, model_slopes, parameter_table, slopes
from alibi_spec.biases import interpolation
from alibi_spec.checks import (
    check_array,
    check_embeddings,
    check_implementation,
    check_mask,
    check_segments,
    check_token_range,
    check_token_types,
    check_tokens,
    check_windows,
    forbid_vocabulary,
    require_vocabulary,
)

AttentionMask = Integer[Array, "batch seq"] | Bool[Array, "batch seq"]
SegmentIds = Integer[Array, "batch seq"]
_Tokens = TypeVar("_Tokens", Array, np.ndarray)
Windows = tuple[tuple[int, ...], ...]  # of layers and heads; -1 is all keys
SlopeFactor = float | Float[Array, ""]  # `alibi_spec.biases.interpolation`


SCANNED_CACHE = (
    "a model with scan_layers has no cache; call it with scan_layers=False and the params of "
    "alibi_flax.unstacked"
)
ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class LayerNorm(nn.LayerNorm):
    """Linen's; without a `dtype`, rounded to the dtype of its input."""

    def __call__(
        self, x: Float[Array, "*batch width"], *, mask: Bool[Array, "*batch width"] | None = None
    ) -> Float[Array, "*batch width"]:
        normed = super().__call__(x, mask=mask)
        return normed if self.dtype is not None else normed.astype(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Linen's; without a `dtype`, rounded to the dtype of its input."""

    def __call__(
        self, x: Float[Array, "*batch width"], *, mask: Bool[Array, "*batch width"] | None = None
    ) -> Float[Array, "*batch width"]:
        normed = super().__call__(x, mask=mask)
        return normed if self.dtype is not None else normed.astype(x.dtype)


class Embed(nn.Embed):
    """Linen's; on a mesh, every device looks up vectors of the whole width."""

    def __call__(self, inputs: Integer[Array, "*batch"]) -> Float[Array, "*batch width"]:
        (embedding,) = promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return jnp.take(constrained(embedding, "vocab", "features"), inputs, axis=0)


class AttentionInputs(TypedDict):
    """Arguments of `alibi_flax.attention`, which documents them."""

    query: Float[Array, "batch seq heads head_dim"]
    key: Float[Array, "batch seq kv_heads head_dim"]
    value: Float[Array, "batch seq kv_heads head_dim"]
    slopes: Float[Array, " heads"]
    causal: bool
    scale: float
    attention_mask: AttentionMask | None
    segment_ids: SegmentIds | None
    distance: str


class Attention(nn.Module):
    """Multi-head attention with linear biases: projections around `alibi_flax.attention`."""

    config: ALiBiConfig
    layer: int
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    windows: tuple[int, ...] | None = None

    def setup(self) -> None:
        config = self.config
        options = {
            "use_bias": config.attention_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        heads, kv_heads = (config.num_heads, config.head_dim), (config.kv_heads, config.head_dim)
        module = (f"layers_{self.layer}", "attn")
        self.query = nn.DenseGeneral(heads, **_initialisers(config, *module, "query"), **options)
        self.key = nn.DenseGeneral(kv_heads, **_initialisers(config, *module, "key"), **options)
        self.value = nn.DenseGeneral(kv_heads, **_initialisers(config, *module, "value"), **options)
        if config.slopes == "learned":
            init = _initialisers(config, *module)["slopes_init"]
            wide = jnp.promote_types(self.param_dtype, jnp.float32)  # never narrower
            self.slopes = self.param("slopes", init, (config.num_heads,), wide)
        else:
            self.slopes = model_slopes(config)[self.layer]
        if config.qk_norm:
            dtypes, axes = (self.dtype, self.param_dtype), (-2, -1)
            self.query_norm = _norm(config, *dtypes, *module, "query_norm", axes=axes)
            self.key_norm = _norm(config, *dtypes, *module, "key_norm", axes=axes)
        if config.output_projection:
            options |= _initialisers(config, *module, "output")
            self.output = nn.DenseGeneral(config.d_model, axis=(-2, -1), **options)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        slope_factor: SlopeFactor = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Any:
        inputs = self.attention_inputs(x, slope_factor, attention_mask, segment_ids)
        if cache is None:
            dropout = 0.0 if deterministic else self.config.probability_dropout
            attended = attention_within(
                self.windows,
                **inputs,
                implementation=self.implementation,
                dropout=dropout,
                dropout_rng=self.make_rng("dropout") if dropout > 0 else None,
            )
        else:
            attended, cache = cache.attend(self.layer, inputs, self.implementation)
        if self.config.output_projection:
            attended = self.output(attended)
        else:
            attended = rearrange(attended, "batch seq heads head_dim -> batch seq (heads head_dim)")
        return attended if cache is None else (attended, cache)

    def attention_inputs(
        self,
        x: Float[Array, "batch seq embed"],
        slope_factor: SlopeFactor = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> AttentionInputs:
        """The arguments of `alibi_flax.attention` in `__call__`."""
        query, key, value = self._query_key_value(x)
        return {
            "query": query,
            "key": key,
            "value": value,
            "slopes": self._slopes(slope_factor),
            "causal": self.config.causal,
            "scale": self.config.scale,
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "distance": self.config.distance,
        }

    def biased_logits(
        self,
        x: Float[Array, "batch seq embed"],
        slope_factor: SlopeFactor = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Float[Array, "batch heads seq seq"]:
        """The logits that `__call__` takes the softmax of."""
        inputs: Any = self.attention_inputs(x, slope_factor, attention_mask, segment_ids)
        del inputs["value"]
        return biased_logits(**inputs)

    def _query_key_value(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[
        Float[Array, "batch seq heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
    ]:
        query, key, value = (self._clip(map_(x)) for map_ in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        axes = ("batch", "seq", "kv_heads", "head_dim")
        key, value = constrained(key, *axes), constrained(value, *axes)
        return constrained(query, "batch", "seq", "heads", "head_dim"), key, value

    def _slopes(self, slope_factor: SlopeFactor) -> Float[Array, " heads"]:
        slopes = jnp.asarray(self.slopes)
        return slopes * jnp.asarray(slope_factor, slopes.dtype)

    def _clip(
        self, x: Float[Array, "batch seq any_heads head_dim"]
    ) -> Float[Array, "batch seq any_heads head_dim"]:
        limit = self.config.qkv_clip
        return x if limit is None else x.clip(-limit, limit)


class FeedForward(nn.Module):
    """Two linear maps around an activation, optionally gated by a third."""

    config: ALiBiConfig
    layer: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config, module = self.config, (f"layers_{self.layer}", "ffn")
        options = {
            "use_bias": config.ffn_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        if config.gated_ffn:
            init = _initialisers(config, *module, "gate")
            self.gate = nn.Dense(config.ffn_dim, **init, **options)
        self.fc1 = nn.Dense(config.ffn_dim, **_initialisers(config, *module, "fc1"), **options)
        self.fc2 = nn.Dense(config.d_model, **_initialisers(config, *module, "fc2"), **options)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        activation = ACTIVATION_FUNCTIONS[self.config.activation]
        if self.config.gated_ffn:
            return self.fc2(self.fc1(x) * activation(self.gate(x)))
        return self.fc2(activation(self.fc1(x)))


class Block(nn.Module):
    """Residual block: attention, then feed-forward, with norms where `norm_placement` says."""

    config: ALiBiConfig
    layer: int
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    windows: tuple[int, ...] | None = None

    def setup(self) -> None:
        config, module = self.config, f"layers_{self.layer}"
        dtypes = (self.dtype, self.param_dtype)
        self.attn_norm = _norm(config, *dtypes, module, "attn_norm")
        self.attn = Attention(config, self.layer, self.implementation, *dtypes, self.windows)
        if config.attention_output_norm:
            self.attn_output_norm = _norm(config, *dtypes, module, "attn_output_norm")
        self.ffn_norm = _norm(config, *dtypes, module, "ffn_norm")
        self.ffn = FeedForward(config, self.layer, *dtypes)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        slope_factor: SlopeFactor = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Any:
        def attn(y: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
            nonlocal cache
            arguments = (slope_factor, attention_mask, segment_ids, deterministic, cache)
            attended = self.attn(y, *arguments)
            attended, cache = (attended, None) if cache is None else attended
            if self.config.attention_output_norm:
                return self.attn_output_norm(y + attended)
            return attended

        x = self._residual(x, self.attn_norm, attn, deterministic)
        x = self._residual(x, self.ffn_norm, self.ffn, deterministic)
        return x if cache is None else (x, cache)

    def _residual(
        self,
        x: Float[Array, "batch seq embed"],
        norm: nn.Module,
        branch: Callable[[Array], Array],
        deterministic: bool,
    ) -> Float[Array, "batch seq embed"]:
        if self.config.norm_placement == "post":
            return norm(x + self.dropout(branch(x), deterministic=deterministic))
        normed = norm(x)
        kept = normed if self.config.norm_placement == "pre_residual" else x
        return kept + self.dropout(branch(normed), deterministic=deterministic)


class ALiBiTransformer(nn.Module):
    """Blocks of ALiBi attention over embeddings: a decoder, or an encoder with `causal=False`.

    Press et al. 2021; with `ALiBiConfig.jaketae()` the model of jaketae/alibi. With `recompute`
    each block is computed again in the backward pass instead of keeping what it needs;
    `implementation`, of attention, is "auto" or one of `attention_implementations()`. With
    `scan_layers` one block is compiled for all layers, whose params are stacked
    (`alibi_flax.stacked`). `windows`, of each layer and head, are those of
    `alibi_spec.bounds.model_windows` as tuples: devices that divide the positions send each other
    no more keys than these, and the results are NaN where an input needs more (SPEC.md §19).

    Raises:
        ValueError: the configuration has a vocabulary, which is `ALiBiLM`'s, the implementation is
            not known, or the windows are not the model's.
    """

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    recompute: bool = False
    implementation: str = "auto"
    scan_layers: bool = False
    windows: Windows | None = None
    # The checkpoint that it was loaded from; two models are the same wherever they come from.
    origin: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        forbid_vocabulary(self.config.vocab_size)
        _check_windows(self.config, self.windows)
        check_implementation(self.implementation, attention_implementations())
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        block = nn.remat(Block, static_argnums=(5,)) if self.recompute else Block
        options = (self.implementation, self.dtype, self.param_dtype)
        windows = [None] * config.num_layers if self.windows is None else self.windows
        self.layers: Any
        if self.scan_layers:  # layers differ only in their parameters
            self.layers = block(config, 0, *options, _largest(windows))
        else:
            every = enumerate(windows)
            self.layers = [block(config, layer, *options, of_layer) for layer, of_layer in every]
        if config.final_norm:
            self.final_norm = _norm(config, self.dtype, self.param_dtype, "final_norm")

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        attention_mask: AttentionMask | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Any:
        """Hidden states after the last block (and final norm), in the dtype of the computation.

        Args:
            x: embeddings; sequences longer than `max_len` are welcome.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            segment_ids: of packed documents, which do not see one another (SPEC.md §4.3).
            deterministic: False applies dropout, drawn from the rng "dropout".
            cache: of the positions before these (SPEC.md §10).

        Returns:
            [batch, seq, d_model]; with a cache, also the cache for the next call.

        Raises:
            ValueError: wrong shape or dtype of `x`, `attention_mask` or `segment_ids`, segments
                that would not be as if alone, or a cache that is full, donated, or another model's.
        """
        check_array("embeddings", x, (Array, np.ndarray), "a JAX or NumPy array")
        check_embeddings(x.shape, jnp.issubdtype(x.dtype, jnp.floating), self.config.d_model)
        batch, key_len = x.shape[:2]  # these inputs are all the keys there are
        for name, mask in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
            if mask is not None:
                check_array(name, mask, (Array, np.ndarray), "a JAX or NumPy array")
                is_integer = not jnp.issubdtype(mask.dtype, jnp.floating)
                check_mask(name, mask.shape, is_integer, batch, key_len)
        if segment_ids is not None:
            check_segments(self.config, key_len, cache is not None)
        slope_factor = _slope_factor(self.config, key_len)
        if cache is not None:
            if self.scan_layers:
                raise ValueError(SCANNED_CACHE)
            if not deterministic:
                raise ValueError("a cache is for inference; call the model with deterministic=True")
            cache = cache.grown(self.config, (batch, key_len), attention_mask)
            slope_factor = cache.slope_factor

        def read(layer: Block, x: Array, cache: KVCache | None) -> tuple[Array, KVCache | None]:
            x = layer(x, slope_factor, attention_mask, segment_ids, deterministic, cache)
            x, cache = (x, None) if cache is None else x
            return constrained(x, "batch", "seq", "features"), cache

        x = constrained(x, "batch", "seq", "features")
        if self.scan_layers:
            x, _ = self._scanned(read)(self.layers, x, None)
        else:
            for layer in self.layers:
                x, cache = read(layer, x, cache)
        x = self.final_norm(x) if self.config.final_norm else x
        return x if cache is None else cache.finished(x)

    def _scanned(self, read: Callable[..., Any]) -> Any:
        """`read` of every layer in turn, each with its own parameters and its own dropout."""
        rngs: Any = {"params": True, "dropout": True}
        return nn.scan(
            read, variable_axes={"params": 0}, split_rngs=rngs, length=self.config.num_layers
        )


class ALiBiLM(nn.Module):
    """Token embedding, `ALiBiTransformer`, and the head that `config.head` names.

    `recompute`, `implementation`, `scan_layers` and `windows` are those of `ALiBiTransformer`.

    Raises:
        ValueError: the configuration has no vocabulary, or as for `ALiBiTransformer`.
    """

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    recompute: bool = False
    implementation: str = "auto"
    scan_layers: bool = False
    windows: Windows | None = None
    # The checkpoint that it was loaded from; two models are the same wherever they come from.
    origin: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_vocabulary(self.config.vocab_size)
        _check_windows(self.config, self.windows)
        check_implementation(self.implementation, attention_implementations())
        super().__post_init__()

    def setup(self) -> None:
        config, vocab_size = self.config, require_vocabulary(self.config.vocab_size)
        width, dtypes = config.d_model, (self.dtype, self.param_dtype)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = _initialisers(config, "token_embedding")
        self.token_embedding = Embed(vocab_size, width, **init, **options)
        if config.type_vocab_size is not None:
            types, init = config.type_vocab_size, _initialisers(config, "token_type_embedding")
            self.token_type_embedding = Embed(types, width, **init, **options)
        if config.embedding_norm:
            self.embedding_norm = _norm(config, *dtypes, "embedding_norm")
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.transformer = ALiBiTransformer(
            dataclasses.replace(config, vocab_size=None),
            recompute=self.recompute,
            implementation=self.implementation,
            scan_layers=self.scan_layers,
            windows=self.windows,
            **options,
        )
        if config.head == "masked_lm":
            init = _initialisers(config, "head_transform")
            self.head_transform = nn.Dense(width, **init, **options)
            self.head_norm = _norm(config, *dtypes, "head_norm")
            init = _initialisers(config)["head_bias_init"]
            self.head_bias = self.param("head_bias", init, (vocab_size,), self.param_dtype)
        options |= {"use_bias": False}
        if config.head != "none" and not config.tie_embeddings:
            self.lm_head = nn.Dense(vocab_size, **_initialisers(config, "lm_head"), **options)
        if config.adaptive_cutoffs is not None:
            clusters, init = len(config.adaptive_cutoffs), _initialisers(config, "cluster_head")
            self.cluster_head = nn.Dense(clusters, **init, **options)

    def __call__(
        self,
        tokens: Integer[Array, "batch seq"],
        attention_mask: AttentionMask | None = None,
        *,
        token_type_ids: Integer[Array, "batch seq"] | None = None,
        segment_ids: SegmentIds | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
        logits_to_keep: int | None = None,
    ) -> Any:
        """Logits over the vocabulary: of the next token, or of this one for a masked LM.

        Args:
            tokens: ids below `vocab_size`; checked where that needs no device synchronisation:
                on the CPU, outside `jit`.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            token_type_ids: ids below `type_vocab_size`; None is 0 everywhere.
            segment_ids: of packed documents, which do not see one another (SPEC.md §4.3).
            deterministic: False applies dropout, drawn from the rng "dropout".
            cache: of the positions before these (SPEC.md §10).
            logits_to_keep: return logits of only this many last positions; None is all.

        Returns:
            [batch, seq, vocab]; log-probabilities with `adaptive_cutoffs`; hidden states
            [batch, seq, d_model] with `head="none"`. With a cache, also the cache for the next
            call.

        Raises:
            ValueError: wrong shape, dtype or range of `tokens` or `token_type_ids`, wrong
                `attention_mask` or `segment_ids`, or a cache that is full, donated, or another
                model's.
        """
        x = self.embed(tokens, token_type_ids, deterministic)
        options = {"segment_ids": segment_ids, "deterministic": deterministic, "cache": cache}
        x = self.transformer(x, attention_mask, **options)
        x, cache = (x, None) if cache is None else x
        logits = self.head(x if logits_to_keep is None else x[:, -logits_to_keep:])
        return logits if cache is None else (logits, cache)

    def embed(
        self,
        tokens: Integer[Array, "batch seq"],
        token_type_ids: Integer[Array, "batch seq"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq embed"]:
        """The input of the first block. Arguments and errors are those of the call."""
        config = self.config
        tokens = checked_tokens(tokens, self.token_embedding.num_embeddings)
        check_token_types(config.type_vocab_size, token_type_ids is not None)
        x = self.token_embedding(tokens) * config.embedding_scale
        if config.type_vocab_size is not None:
            types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
            types = checked_tokens(types, config.type_vocab_size, "token type")
            x = x + self.token_type_embedding(types)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        return self.dropout(x, deterministic=deterministic)

    def head(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq output"]:
        """The result of the call, from hidden states."""
        config = self.config
        if config.head == "none":
            return x
        if config.head == "masked_lm":
            activation = ACTIVATION_FUNCTIONS[config.activation]
            x = self.head_norm(activation(self.head_transform(x)))
        x = x * config.logit_scale  # cheaper than on the logits
        logits = self.token_embedding.attend(x) if config.tie_embeddings else self.lm_head(x)
        if config.head == "masked_lm":
            logits, bias = promote_dtype(logits, self.head_bias, dtype=self.dtype)
            logits = logits + bias[None, None, :]
        if config.adaptive_cutoffs is not None:
            clusters = self.cluster_head(x)
            return _adaptive_log_probabilities(logits, clusters, config.adaptive_cutoffs)
        return logits


def _adaptive_log_probabilities(
    logits: Float[Array, "batch seq vocab"],
    cluster_logits: Float[Array, "batch seq clusters"],
    cutoffs: tuple[int, ...],
) -> Float[Array, "batch seq vocab"]:
    first, ends = cutoffs[0], (*cutoffs, logits.shape[-1])
    head = nn.log_softmax(jnp.concatenate([logits[..., :first], cluster_logits], axis=-1))
    parts = [head[..., :first]]
    for cluster, (start, end) in enumerate(itertools.pairwise(ends)):
        chosen = head[..., first + cluster, None]
        parts.append(chosen + nn.log_softmax(logits[..., start:end]))
    return jnp.concatenate(parts, axis=-1)


def _check_windows(config: ALiBiConfig, windows: Windows | None) -> None:
    if windows is not None:
        shape = (len(windows), *{len(of_layer) for of_layer in windows})
        check_windows(shape, any(each >= 0 for of_layer in windows for each in of_layer), config)


def _largest(windows: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Those of a head of any layer; -1 where one has no window."""
    every = [of_layer for of_layer in windows if of_layer is not None]
    if not every:
        return None
    return tuple(-1 if min(of_head) < 0 else max(of_head) for of_head in zip(*every, strict=True))


@cache
def _initialisers(config: ALiBiConfig, *module: str) -> dict[str, Any]:
    """The initialisers of one module, as arguments of linen's modules: "kernel_init", …

    Args:
        config: of the module at the root of the path, `ALiBiLM` or `ALiBiTransformer`.
        module: the keys of its parameters in the Flax tree, without the last.
    """
    rows = [row for row in parameter_table(config) if row.flax_path[:-1] == module]
    return {f"{row.flax_path[-1]}_init": _initialiser(config, row) for row in rows}


def _initialiser(config: ALiBiConfig, row: Parameter) -> nn.initializers.Initializer:
    if row.init == "slopes":
        start = slopes(config.num_heads, config.bias_max)
        return lambda _, __, dtype: jnp.asarray(start, dtype)
    if isinstance(row.init, str):
        return {"zeros": nn.initializers.zeros, "ones": nn.initializers.ones}[row.init]
    return nn.initializers.normal(row.init)


def _norm(
    config: ALiBiConfig,
    dtype: Any,
    param_dtype: Any,
    *module: str,
    axes: int | tuple[int, ...] = -1,
) -> nn.Module:
    options = {"reduction_axes": axes, "feature_axes": axes, "epsilon": config.norm_eps}
    options |= {"dtype": dtype, "param_dtype": param_dtype, "use_fast_variance": False}
    options |= _initialisers(config, *module)
    if config.norm == "rms":
        return RMSNorm(**options)
    # Linen's fast variance loses all precision when the mean is far from zero.
    return LayerNorm(use_bias=config.norm_bias, **options)


def _slope_factor(config: ALiBiConfig, key_len: Any) -> SlopeFactor:
    """`interpolation`, also for symbolic lengths of `jax.export`, which cannot be compared."""
    limit = config.slope_interpolation
    if limit is not None and is_symbolic_dim(key_len):
        return limit / jnp.maximum(limit, jnp.asarray(key_len))
    return interpolation(config, key_len)


def checked_tokens(
    tokens: Integer[_Tokens, "batch seq"], vocab_size: int, what: str = "token"
) -> Integer[_Tokens, "batch seq"]:
    """The tokens, or ValueError; their range is checked where they can be read."""
    check_array("tokens", tokens, (Array, np.ndarray), "a JAX or NumPy array of token ids")
    check_tokens(tokens.shape, jnp.issubdtype(tokens.dtype, jnp.integer))
    if has_values_on_host(tokens) and tokens.size:
        values = np.asarray(tokens)  # jnp.min would be traced, constant tokens or not
        check_token_range(int(values.min()), int(values.max()), vocab_size, what)
    return tokens
