"""ALiBiTransformer and ALiBiLM as ordinary Flax linen modules (SPEC.md §5).

Read top to bottom: attention, feed-forward, block, transformer, language model. Paths and shapes of
parameters are those of `alibi_spec.parameter_table`; `alibi_torch/model.py` is the mirror image.
Checkpoints and training live elsewhere.

Every module takes linen's `dtype` (of the computation; None follows inputs and parameters) and
`param_dtype`. Calling with `deterministic=False` turns dropout on, drawn from the rng "dropout".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Integer

from alibi_flax.attention import attention, biased_logits
from alibi_spec import ALiBiConfig, model_slopes
from alibi_spec.checks import (
    check_array,
    check_embeddings,
    check_mask,
    check_token_range,
    check_tokens,
    forbid_vocabulary,
    require_vocabulary,
)

AttentionMask = Integer[Array, "batch seq"] | Bool[Array, "batch seq"]


class Attention(nn.Module):
    """Multi-head attention with linear biases: projections around `alibi_flax.attention`."""

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        options = {
            "use_bias": config.attention_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        heads = (config.num_heads, config.head_dim)
        init = nn.initializers.normal(config.init_std)
        self.query = nn.DenseGeneral(heads, kernel_init=init, **options)
        self.key = nn.DenseGeneral(heads, kernel_init=init, **options)
        self.value = nn.DenseGeneral(heads, kernel_init=init, **options)
        if config.output_projection:
            init = nn.initializers.normal(config.residual_init_std)
            self.output = nn.DenseGeneral(
                config.d_model, axis=(-2, -1), kernel_init=init, **options
            )

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        slopes: Float[Array, " heads"],
        attention_mask: AttentionMask | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq embed"]:
        dropout = 0.0 if deterministic else self.config.probability_dropout
        attended = attention(
            self.query(x),
            self.key(x),
            self.value(x),
            slopes,
            causal=self.config.causal,
            scale=self.config.scale,
            attention_mask=attention_mask,
            distance=self.config.distance,
            dropout=dropout,
            dropout_rng=self.make_rng("dropout") if dropout > 0 else None,
        )
        if self.config.output_projection:
            return self.output(attended)
        return rearrange(attended, "batch seq heads head_dim -> batch seq (heads head_dim)")

    def biased_logits(
        self,
        x: Float[Array, "batch seq embed"],
        slopes: Float[Array, " heads"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Array, "batch heads seq seq"]:
        """The logits that `__call__` takes the softmax of."""
        return biased_logits(
            self.query(x),
            self.key(x),
            slopes,
            causal=self.config.causal,
            scale=self.config.scale,
            attention_mask=attention_mask,
            distance=self.config.distance,
        )


class FeedForward(nn.Module):
    """Two linear maps around an exact (erf) GELU."""

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(config.init_std)
        self.fc1 = nn.Dense(config.ffn_dim, kernel_init=init, **options)
        init = nn.initializers.normal(config.residual_init_std)
        self.fc2 = nn.Dense(config.d_model, kernel_init=init, **options)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.fc2(nn.gelu(self.fc1(x), approximate=False))


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config, dtype, param_dtype = self.config, self.dtype, self.param_dtype
        self.attn_norm = _layer_norm(config, dtype, param_dtype)
        self.attn = Attention(config, dtype, param_dtype)
        self.ffn_norm = _layer_norm(config, dtype, param_dtype)
        self.ffn = FeedForward(config, dtype, param_dtype)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        slopes: Float[Array, " heads"],
        attention_mask: AttentionMask | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq embed"]:
        attended = self.attn(self.attn_norm(x), slopes, attention_mask, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        return x + self.dropout(self.ffn(self.ffn_norm(x)), deterministic=deterministic)


class ALiBiTransformer(nn.Module):
    """Blocks of ALiBi attention over embeddings: a decoder, or an encoder with `causal=False`.

    Press et al. 2021; with `ALiBiConfig.jaketae()` the model of jaketae/alibi. With `remat` each
    block is recomputed in the backward pass instead of kept.

    Raises:
        ValueError: the configuration has a vocabulary, which is `ALiBiLM`'s.
    """

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        forbid_vocabulary(self.config.vocab_size)
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        self.layers = [
            block(config, self.dtype, self.param_dtype) for _ in range(config.num_layers)
        ]
        if config.final_norm:
            self.final_norm = _layer_norm(config, self.dtype, self.param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        attention_mask: AttentionMask | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq embed"]:
        """Hidden states after the last block (and final norm), in the dtype of the computation.

        Args:
            x: embeddings; sequences longer than `max_len` are welcome.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            deterministic: False applies dropout, drawn from the rng "dropout".

        Raises:
            ValueError: wrong shape or dtype of `x` or `attention_mask`.
        """
        check_array("embeddings", x, (Array, np.ndarray), "a JAX or NumPy array")
        check_embeddings(x.shape, jnp.issubdtype(x.dtype, jnp.floating), self.config.d_model)
        if attention_mask is not None:
            kinds = (Array, np.ndarray)
            check_array("attention_mask", attention_mask, kinds, "a JAX or NumPy array")
            is_integer = not jnp.issubdtype(attention_mask.dtype, jnp.floating)
            check_mask("attention_mask", attention_mask.shape, is_integer, x.shape[0], x.shape[1])
        slopes = jnp.asarray(model_slopes(self.config))
        for layer in self.layers:
            x = layer(x, slopes, attention_mask, deterministic)
        return self.final_norm(x) if self.config.final_norm else x


class ALiBiLM(nn.Module):
    """Token embedding, `ALiBiTransformer`, and a head that is tied to the embedding or its own.

    Raises:
        ValueError: the configuration has no vocabulary.
    """

    config: ALiBiConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        require_vocabulary(self.config.vocab_size)
        super().__post_init__()

    def setup(self) -> None:
        config, vocab_size = self.config, require_vocabulary(self.config.vocab_size)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(config.init_std)
        self.token_embedding = nn.Embed(vocab_size, config.d_model, embedding_init=init, **options)
        self.transformer = ALiBiTransformer(
            dataclasses.replace(config, vocab_size=None), remat=self.remat, **options
        )
        if not config.tie_embeddings:
            self.lm_head = nn.Dense(vocab_size, use_bias=False, kernel_init=init, **options)

    def __call__(
        self,
        tokens: Integer[Array, "batch seq"],
        attention_mask: AttentionMask | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq vocab"]:
        """Next-token logits.

        Args:
            tokens: ids below `vocab_size`; checked where that needs no device synchronisation:
                on the CPU, outside `jit`.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            deterministic: False applies dropout, drawn from the rng "dropout".

        Raises:
            ValueError: wrong shape, dtype or range of `tokens`, or wrong `attention_mask`.
        """
        tokens = checked_tokens(tokens, self.token_embedding.num_embeddings)
        hidden = self.transformer(self.token_embedding(tokens), attention_mask, deterministic)
        return self.head(hidden)

    def head(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        """Logits of hidden states."""
        if self.config.tie_embeddings:
            return self.token_embedding.attend(x)
        return self.lm_head(x)


def _layer_norm(config: ALiBiConfig, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    # Linen's fast variance loses everything when the mean is far from zero.
    return nn.LayerNorm(
        epsilon=config.norm_eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype
    )


def checked_tokens(
    tokens: Integer[Array, "batch seq"], vocab_size: int
) -> Integer[Array, "batch seq"]:
    """The tokens, or ValueError; their range is checked where they can be looked at."""
    check_array("tokens", tokens, (Array, np.ndarray), "a JAX or NumPy array of token ids")
    check_tokens(tokens.shape, jnp.issubdtype(tokens.dtype, jnp.integer))
    if _has_values_on_host(tokens) and tokens.size:
        values = np.asarray(tokens)  # jnp.min would be traced, constant tokens or not
        check_token_range(int(values.min()), int(values.max()), vocab_size)
    return tokens


def _has_values_on_host(tokens: Any) -> bool:
    if isinstance(tokens, np.ndarray):
        return True
    if isinstance(tokens, Tracer):
        return False
    return all(device.platform == "cpu" for device in tokens.devices())
