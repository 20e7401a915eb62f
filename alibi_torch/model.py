"""ALiBiTransformer and ALiBiLM as ordinary PyTorch modules (SPEC.md §5).

Read top to bottom: attention, feed-forward, block, transformer, language model. Names and shapes of
parameters are those of `alibi_spec.parameter_table`; `alibi_flax/model.py` is the mirror image.
Checkpoints and training live elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from alibi_spec import ALiBiConfig, model_slopes, parameter_table
from alibi_spec.checks import (
    check_array,
    check_embeddings,
    check_mask,
    check_token_range,
    check_tokens,
    forbid_vocabulary,
    require_vocabulary,
)
from alibi_torch.attention import attention, biased_logits
from alibi_torch.checkpoint import PretrainedModule

AttentionMask = Integer[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]


class Attention(nn.Module):
    """Multi-head attention with linear biases: projections around `alibi_torch.attention`."""

    def __init__(self, config: ALiBiConfig) -> None:
        super().__init__()
        self.config = config
        width, has_bias = config.d_model, config.attention_bias
        self.query = nn.Linear(width, width, bias=has_bias)
        self.key = nn.Linear(width, width, bias=has_bias)
        self.value = nn.Linear(width, width, bias=has_bias)
        if config.output_projection:
            self.output = nn.Linear(width, width, bias=has_bias)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        slopes: Float[Tensor, " heads"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        attended = attention(
            self._split_heads(self.query(x)),
            self._split_heads(self.key(x)),
            self._split_heads(self.value(x)),
            slopes,
            causal=self.config.causal,
            scale=self.config.scale,
            attention_mask=attention_mask,
            distance=self.config.distance,
            dropout=self.config.probability_dropout if self.training else 0.0,
        )
        attended = rearrange(attended, "batch heads seq head_dim -> batch seq (heads head_dim)")
        return self.output(attended) if self.config.output_projection else attended

    def biased_logits(
        self,
        x: Float[Tensor, "batch seq embed"],
        slopes: Float[Tensor, " heads"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Tensor, "batch heads seq seq"]:
        """The logits that `forward` takes the softmax of."""
        return biased_logits(
            self._split_heads(self.query(x)),
            self._split_heads(self.key(x)),
            slopes,
            causal=self.config.causal,
            scale=self.config.scale,
            attention_mask=attention_mask,
            distance=self.config.distance,
        )

    def _split_heads(
        self, x: Float[Tensor, "batch seq embed"]
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        return rearrange(
            x,
            "batch seq (heads head_dim) -> batch heads seq head_dim",
            heads=self.config.num_heads,
        )


class FeedForward(nn.Module):
    """Two linear maps around an exact (erf) GELU."""

    def __init__(self, config: ALiBiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq embed"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ALiBiConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        slopes: Float[Tensor, " heads"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        x = x + self.dropout(self.attn(self.attn_norm(x), slopes, attention_mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class ALiBiTransformer(PretrainedModule):
    """Blocks of ALiBi attention over embeddings: a decoder, or an encoder with `causal=False`.

    Press et al. 2021; with `ALiBiConfig.jaketae()` the model of jaketae/alibi.

    Raises:
        ValueError: the configuration has a vocabulary, which is `ALiBiLM`'s.
    """

    def __init__(self, config: ALiBiConfig) -> None:
        forbid_vocabulary(config.vocab_size)
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.final_norm:
            self.final_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        slopes = torch.tensor(model_slopes(config).tolist(), dtype=torch.float32)
        self.register_buffer("slopes", slopes, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as `alibi_spec.parameter_table` says."""
        _initialise(self, self.config)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        """Hidden states after the last block (and final norm), in the dtype of the parameters.

        Args:
            x: embeddings; sequences longer than `max_len` are welcome.
            attention_mask: 0 for padding on either side, 1 elsewhere.

        Raises:
            ValueError: wrong shape or dtype of `x` or `attention_mask`.
        """
        check_array("embeddings", x, (Tensor,), "a torch.Tensor")
        check_embeddings(x.shape, x.is_floating_point(), self.config.d_model)
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"embeddings are {x.dtype} and the model is {dtype}; use x.to({dtype})"
            )
        if attention_mask is not None:
            check_array("attention_mask", attention_mask, (Tensor,), "a torch.Tensor")
            is_integer = not attention_mask.is_floating_point()
            check_mask("attention_mask", attention_mask.shape, is_integer, x.shape[0], x.shape[1])
        for layer in self.layers:
            x = layer(x, self.slopes, attention_mask)
        return self.final_norm(x) if self.config.final_norm else x

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The slopes follow the module to its device but stay float32: `.to(bfloat16)` would round
        # them, and `.to_empty()` would leave them undefined.
        super()._apply(fn, recurse)
        slopes, device = model_slopes(self.config).tolist(), self.slopes.device
        self.slopes = torch.tensor(slopes, dtype=torch.float32, device=device)
        return self


class ALiBiLM(PretrainedModule):
    """Token embedding, `ALiBiTransformer`, and a head that is tied to the embedding or its own.

    Raises:
        ValueError: the configuration has no vocabulary.
    """

    def __init__(self, config: ALiBiConfig) -> None:
        vocab_size = require_vocabulary(config.vocab_size)
        super().__init__(config)
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.transformer = ALiBiTransformer(dataclasses.replace(config, vocab_size=None))
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as `alibi_spec.parameter_table` says."""
        _initialise(self, self.config)

    def forward(
        self,
        tokens: Integer[Tensor, "batch seq"],
        attention_mask: AttentionMask | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Next-token logits.

        Args:
            tokens: ids below `vocab_size`; checked where that needs no device synchronisation:
                on the CPU, outside `torch.compile`.
            attention_mask: 0 for padding on either side, 1 elsewhere.

        Raises:
            ValueError: wrong shape, dtype or range of `tokens`, or wrong `attention_mask`.
        """
        tokens = checked_tokens(tokens, self.token_embedding.num_embeddings)
        return self.head(self.transformer(self.token_embedding(tokens), attention_mask))

    def head(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of hidden states."""
        if self.config.tie_embeddings:
            return F.linear(x, self.token_embedding.weight)
        return self.lm_head(x)


def checked_tokens(
    tokens: Integer[Tensor, "batch seq"], vocab_size: int
) -> Integer[Tensor, "batch seq"]:
    """The tokens as int64, or ValueError; their range is checked where they can be looked at."""
    check_array("tokens", tokens, (Tensor,), "a torch.Tensor of token ids")
    check_tokens(tokens.shape, not tokens.is_floating_point() and tokens.dtype != torch.bool)
    tokens = tokens.long()
    if _has_values_on_host(tokens) and tokens.numel():
        check_token_range(int(tokens.min()), int(tokens.max()), vocab_size)
    return tokens


def _has_values_on_host(tokens: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(tokens) is not Tensor:  # fake tensors, for one
        return False
    return tokens.device.type == "cpu" and not is_functorch_wrapped_tensor(tokens)  # under vmap


def _initialise(model: nn.Module, config: ALiBiConfig) -> None:
    for row in parameter_table(config):
        parameter = model.get_parameter(row.name)
        if isinstance(row.init, str):
            nn.init.constant_(parameter, {"zeros": 0.0, "ones": 1.0}[row.init])
        else:
            nn.init.normal_(parameter, std=row.init)
