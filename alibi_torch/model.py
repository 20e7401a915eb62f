"""ALiBiTransformer and ALiBiLM as ordinary PyTorch modules (SPEC.md §5).

Read top to bottom: attention, feed-forward, block, transformer, language model. Names and shapes of
parameters are those of `alibi_spec.parameter_table`; `alibi_flax/model.py` is the mirror image.
Checkpoints and training live elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer, Num
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from alibi_spec import ALiBiConfig, model_slopes, parameter_table, slopes
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
from alibi_torch.cache import KVCache
from alibi_torch.checkpoint import PretrainedModule
from alibi_torch.dispatch import (
    attention_implementations,
    attention_within,
    biased_logits,
)
from alibi_torch.divided import own, placed_like, whole
from alibi_torch.kernels.finite import has_values_on_host
from alibi_torch.linear import (
    Activation,
    Packed,
    by_onednn,
    gelu_tanh,
    in_common_dtype,
    is_fused,
    linear,
)
from alibi_torch.positions import Positions

AttentionMask = Integer[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
SegmentIds = Integer[Tensor, "batch seq"]
Windows = tuple[tuple[int, ...], ...]  # of layers and heads; -1 is all keys


ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


class Linear(nn.Linear):
    """A linear map in the common dtype of its input and its parameters (SPEC.md §5.1)."""

    packed: Packed | None = None  # of `packed_weights`

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch features"]:
        return linear(input, self.weight, self.bias, self.packed)


def has_observers(module: nn.Module) -> bool:
    """Whether hooks, or a `forward` of its own, see what a module computes."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return bool(has_hooks) or "forward" in vars(module)


class TokenEmbedding(nn.Embedding):
    """A vector for every token; also the other way round, as the head of tied embeddings."""

    packed: Packed | None = None  # of `packed_weights`

    def forward(self, input: Num[Tensor, "batch seq *width"]) -> Float[Tensor, "batch seq any"]:
        """The vectors of tokens, or the products of hidden states with the vectors of all."""
        if input.is_floating_point():
            return linear(input, self.weight, packed=self.packed)
        return super().forward(input)


class LayerNorm(nn.LayerNorm):
    """A norm in the common dtype of its input and its parameters, rounded to that of its input."""

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide, weight, bias = in_common_dtype(input, self.weight, self.bias)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """As `LayerNorm`, without mean and bias."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide, weight = in_common_dtype(x, self.weight)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)


class AttentionInputs(TypedDict):
    """Arguments of `alibi_torch.attention`, which documents them."""

    query: Float[Tensor, "batch heads seq head_dim"]
    key: Float[Tensor, "batch kv_heads seq head_dim"]
    value: Float[Tensor, "batch kv_heads seq head_dim"]
    slopes: Float[Tensor, " heads"]
    causal: bool
    scale: float
    attention_mask: AttentionMask | None
    segment_ids: SegmentIds | None
    distance: str


class Attention(nn.Module):
    """Multi-head attention with linear biases: projections around `alibi_torch.attention`."""

    slopes: Float[nn.Parameter, " heads"] | None

    def __init__(self, config: ALiBiConfig, layer: int, implementation: str = "auto") -> None:
        super().__init__()
        self.config, self.layer, self.implementation = config, layer, implementation
        self.heads = slice(None)  # that are computed here: `parallelize` leaves the others out
        self.positions: Positions | None = None  # likewise; None is all
        self.windows: tuple[int, ...] | None = None  # of all heads
        width, has_bias = config.d_model, config.attention_bias
        kv_width = config.kv_heads * config.head_dim
        is_learned = config.slopes == "learned"
        empty = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.register_parameter("slopes", empty if is_learned else None)
        # No buffer: `.to(bfloat16)` would round it, and neither `to_empty` nor a checkpoint would
        # fill one that was created on the meta device.
        self._fixed_slopes = None if is_learned else self._slopes_of_the_configuration()
        self.query = Linear(width, width, bias=has_bias)
        self.key = Linear(width, kv_width, bias=has_bias)
        self.value = Linear(width, kv_width, bias=has_bias)
        if config.qk_norm:
            self.query_norm = _norm(config, width)
            self.key_norm = _norm(config, kv_width)
        if config.output_projection:
            self.output = Linear(width, width, bias=has_bias)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        slope_factor: float = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        inputs = self.attention_inputs(x, slope_factor, attention_mask, segment_ids)
        if cache is None:
            dropout = self.config.probability_dropout if self.training else 0.0
            windows = None if self.windows is None else self.windows[self.heads]
            attended = attention_within(
                *(windows, self.positions),
                **inputs,
                implementation=self.implementation,
                dropout=dropout,
            )
        else:
            attended = cache.attend(self.layer, inputs, self.implementation)
        attended = attended.transpose(1, 2).flatten(2)
        return self.output(attended) if self.config.output_projection else attended

    def attention_inputs(
        self,
        x: Float[Tensor, "batch seq embed"],
        slope_factor: float = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> AttentionInputs:
        """The arguments of `alibi_torch.attention` in `forward`."""
        query, key, value = self._query_key_value(x)
        return {
            "query": query,
            "key": key,
            "value": value,
            "slopes": self._slopes(x.device) * slope_factor,
            "causal": self.config.causal,
            "scale": self.config.scale,
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "distance": self.config.distance,
        }

    def biased_logits(
        self,
        x: Float[Tensor, "batch seq embed"],
        slope_factor: float = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Float[Tensor, "batch heads seq seq"]:
        """The logits that `forward` takes the softmax of."""
        inputs: Any = self.attention_inputs(x, slope_factor, attention_mask, segment_ids)
        del inputs["value"]
        return biased_logits(**inputs)

    def _query_key_value(
        self, x: Float[Tensor, "batch seq embed"]
    ) -> tuple[
        Float[Tensor, "batch heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
    ]:
        query, key, value = (self._clip(map_(x)) for map_ in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = map(self._split_heads, in_common_dtype(query, key, value))
        return query, key, value

    def _slopes(self, device: torch.device) -> Float[Tensor, " heads"]:
        if self.slopes is not None:
            return own(self.slopes)
        fixed = self._fixed_slopes
        if fixed is None or fixed.device != device:
            fixed = self._slopes_of_the_configuration(device)
            if type(fixed) is Tensor and not torch.compiler.is_compiling():
                self._fixed_slopes = fixed
        return fixed

    def _slopes_of_the_configuration(
        self, device: torch.device | None = None
    ) -> Float[Tensor, " heads"]:
        values = model_slopes(self.config)[self.layer][self.heads].tolist()
        if torch.compiler.is_compiling():
            return torch.tensor(values, dtype=torch.float32, device=device)
        with torch.inference_mode(mode=False):  # training can follow
            return torch.tensor(values, dtype=torch.float32, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Slopes follow the module to its device, and never become narrower than float32.
        learned = () if self.slopes is None else (self.slopes, self.slopes.grad)

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.itemsize < 4 and any(tensor is each for each in learned):
                return tensor.to(result.device)
            return result

        super()._apply(moved, recurse)
        self.reset_slopes()
        return self

    def reset_slopes(self) -> None:
        """Compute fixed slopes anew, for `heads` and where the weights are."""
        if self.slopes is None:
            self._fixed_slopes = self._slopes_of_the_configuration(self.query.weight.device)

    def _clip(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        limit = self.config.qkv_clip
        return x if limit is None else x.clamp(-limit, limit)

    def _split_heads(
        self, x: Float[Tensor, "batch seq width"]
    ) -> Float[Tensor, "batch any_heads seq head_dim"]:
        return x.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps around an activation, optionally gated by a third."""

    def __init__(self, config: ALiBiConfig) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.is_gated = config.gated_ffn
        if config.gated_ffn:
            self.gate = Linear(config.d_model, config.ffn_dim, bias=config.ffn_bias)
        self.fc1 = Linear(config.d_model, config.ffn_dim, bias=config.ffn_bias)
        self.fc2 = Linear(config.ffn_dim, config.d_model, bias=config.ffn_bias)

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq embed"]:
        if self.is_gated:
            return self.fc2(self.fc1(x) * self.activation(self.gate(x)))
        return self.fc2(self._activated(x))

    def _activated(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq ffn"]:
        fc1, activation = self.fc1, self.activation
        # Others, who replace or observe the map, expect to be asked for its own results.
        is_plain = type(fc1) is Linear and not has_observers(fc1)
        if is_plain and is_fused(x, fc1.weight, fc1.bias, activation):
            return by_onednn(x, fc1.weight, fc1.bias, fc1.packed, activation)
        return activation(fc1(x))


class Block(nn.Module):
    """Residual block: attention, then feed-forward, with norms where `norm_placement` says."""

    def __init__(self, config: ALiBiConfig, layer: int, implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attn_norm = _norm(config, config.d_model)
        self.attn = Attention(config, layer, implementation)
        if config.attention_output_norm:
            self.attn_output_norm = _norm(config, config.d_model)
        self.ffn_norm = _norm(config, config.d_model)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        slope_factor: float = 1.0,
        attention_mask: AttentionMask | None = None,
        segment_ids: SegmentIds | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        def attn(y: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq embed"]:
            attended = self.attn(y, slope_factor, attention_mask, segment_ids, cache=cache)
            if self.config.attention_output_norm:
                return self.attn_output_norm(y + attended)
            return attended

        x = self._residual(x, self.attn_norm, attn)
        return self._residual(x, self.ffn_norm, self.ffn)

    def _residual(
        self,
        x: Float[Tensor, "batch seq embed"],
        norm: nn.Module,
        branch: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "batch seq embed"]:
        if self.config.norm_placement == "post":
            return norm(x + self.dropout(branch(x)))
        normed = norm(x)
        kept = normed if self.config.norm_placement == "pre_residual" else x
        return kept + self.dropout(branch(normed))


class ALiBiTransformer(PretrainedModule):
    """Blocks of ALiBi attention over embeddings: a decoder, or an encoder with `causal=False`.

    Press et al. 2021; with `ALiBiConfig.jaketae()` the model of jaketae/alibi.

    Args:
        config: without a vocabulary.
        implementation: of attention: "auto" or one of `attention_implementations()`.
        recompute: compute each block again in the backward pass instead of keeping what it needs.
        windows: of each layer and head, those of `alibi_spec.bounds.model_windows` as tuples:
            devices that divide the positions send each other no more keys than these, and the
            results are NaN where an input needs more (SPEC.md §19). It is an attribute, too.

    Raises:
        ValueError: the configuration has a vocabulary, which is `ALiBiLM`'s, the implementation
            is not known, or the windows are not the model's.
    """

    positions: Positions | None = None  # of the inputs: `parallelize` leaves the others out

    def __init__(
        self,
        config: ALiBiConfig,
        *,
        implementation: str = "auto",
        recompute: bool = False,
        windows: Windows | None = None,
    ) -> None:
        forbid_vocabulary(config.vocab_size)
        check_implementation(implementation, attention_implementations())
        super().__init__(config, implementation=implementation)
        self.recompute = recompute
        self.layers = nn.ModuleList(
            Block(config, layer, implementation) for layer in range(config.num_layers)
        )
        if config.final_norm:
            self.final_norm = _norm(config, config.d_model)
        self.windows = windows
        self.reset_parameters()

    @property
    def windows(self) -> Windows | None:
        """How many keys the heads of each layer are known to need."""
        return self._windows

    @windows.setter
    def windows(self, windows: Windows | None) -> None:
        _check_windows(self.config, windows)
        self._windows = windows
        layers: Any = self.layers
        for number, layer in enumerate(layers):
            layer.attn.windows = None if windows is None else windows[number]

    def reset_parameters(self) -> None:
        """Draw fresh weights as `alibi_spec.parameter_table` says."""
        _initialise(self, self.config)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        attention_mask: AttentionMask | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Hidden states after the last block (and final norm), in the dtype of SPEC.md §5.1.

        Args:
            x: embeddings; sequences longer than `max_len` are welcome.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            segment_ids: of packed documents, which do not see one another (SPEC.md §4.3).
            cache: of the positions before these (SPEC.md §10).

        Returns:
            [batch, seq, d_model]; with a cache, also the cache for the next call.

        Raises:
            ValueError: wrong shape or dtype of `x`, `attention_mask` or `segment_ids`, segments
                that would not be as if alone, or a cache that is full, used, or another model's.
        """
        check_array("embeddings", x, (Tensor,), "a torch.Tensor")
        check_embeddings(x.shape, x.is_floating_point(), self.config.d_model)
        batch, key_len = x.shape[:2]
        for name, mask in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
            if mask is not None:
                check_array(name, mask, (Tensor,), "a torch.Tensor")
                check_mask(name, mask.shape, not mask.is_floating_point(), batch, key_len)
        if cache is None and self.positions is not None:
            key_len *= self.positions.count
        # Without a cache these are all the keys there are.
        if segment_ids is not None:
            check_segments(self.config, key_len, cache is not None)
        slope_factor = interpolation(self.config, key_len)
        if cache is not None:
            if self.training:
                raise ValueError("the model is in training mode, with dropout; call model.eval()")
            cache = cache.grown(self.config, (batch, key_len), attention_mask)
            slope_factor = cache.slope_factor
        for layer in self.layers:
            arguments = (x, slope_factor, attention_mask, segment_ids, cache)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        x = self.final_norm(x) if self.config.final_norm else x
        return x if cache is None else (x, cache)


class ALiBiLM(PretrainedModule):
    """Token embedding, `ALiBiTransformer`, and the head that `config.head` names.

    Args:
        config: with a vocabulary.
        implementation: of attention: "auto" or one of `attention_implementations()`.
        recompute: compute each block again in the backward pass instead of keeping what it needs.
        windows: those of `ALiBiTransformer`.

    Raises:
        ValueError: the configuration has no vocabulary, or as for `ALiBiTransformer`.
    """

    def __init__(
        self,
        config: ALiBiConfig,
        *,
        implementation: str = "auto",
        recompute: bool = False,
        windows: Windows | None = None,
    ) -> None:
        vocab_size, width = require_vocabulary(config.vocab_size), config.d_model
        super().__init__(config, implementation=implementation)
        self.token_embedding = TokenEmbedding(vocab_size, width)
        if config.type_vocab_size is not None:
            self.token_type_embedding = nn.Embedding(config.type_vocab_size, width)
        if config.embedding_norm:
            self.embedding_norm = _norm(config, width)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.transformer = ALiBiTransformer(
            dataclasses.replace(config, vocab_size=None),
            implementation=implementation,
            recompute=recompute,
            windows=windows,
        )
        if config.head == "masked_lm":
            self.head_transform = Linear(width, width)
            self.head_norm = _norm(config, width)
            self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        if config.head != "none" and not config.tie_embeddings:
            self.lm_head = Linear(width, vocab_size, bias=False)
        if config.adaptive_cutoffs is not None:
            self.cluster_head = Linear(width, len(config.adaptive_cutoffs), bias=False)
        self.reset_parameters()

    @property
    def windows(self) -> Windows | None:
        """Those of the transformer."""
        return self.transformer.windows

    @windows.setter
    def windows(self, windows: Windows | None) -> None:
        self.transformer.windows = windows

    def reset_parameters(self) -> None:
        """Draw fresh weights as `alibi_spec.parameter_table` says."""
        _initialise(self, self.config)

    def forward(
        self,
        tokens: Integer[Tensor, "batch seq"],
        attention_mask: AttentionMask | None = None,
        *,
        token_type_ids: Integer[Tensor, "batch seq"] | None = None,
        segment_ids: SegmentIds | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | None = None,
    ) -> Any:
        """Logits over the vocabulary: of the next token, or of this one for a masked LM.

        Args:
            tokens: ids below `vocab_size`; checked where that needs no device synchronisation:
                on the CPU, outside `torch.compile`.
            attention_mask: 0 for padding on either side, 1 elsewhere.
            token_type_ids: ids below `type_vocab_size`; None is 0 everywhere.
            segment_ids: of packed documents, which do not see one another (SPEC.md §4.3).
            cache: of the positions before these (SPEC.md §10).
            logits_to_keep: return logits of only this many last positions; None is all.

        Returns:
            [batch, seq, vocab]; log-probabilities with `adaptive_cutoffs`; hidden states
            [batch, seq, d_model] with `head="none"`. With a cache, also the cache for the next
            call.

        Raises:
            ValueError: wrong shape, dtype or range of `tokens` or `token_type_ids`, wrong
                `attention_mask` or `segment_ids`, or a cache that is full, used, or another
                model's.
        """
        x = self.embed(tokens, token_type_ids)
        x = self.transformer(x, attention_mask, segment_ids=segment_ids, cache=cache)
        x, cache = (x, None) if cache is None else x
        logits = self.head(x if logits_to_keep is None else x[:, -logits_to_keep:])
        return logits if cache is None else (logits, cache)

    def embed(
        self,
        tokens: Integer[Tensor, "batch seq"],
        token_type_ids: Integer[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        """The input of the first block. Arguments and errors are those of `forward`."""
        config = self.config
        tokens = checked_tokens(tokens, self.token_embedding.num_embeddings)
        check_token_types(config.type_vocab_size, token_type_ids is not None)
        x = self.token_embedding(tokens) * config.embedding_scale
        if config.type_vocab_size is not None:
            types = torch.zeros_like(tokens) if token_type_ids is None else token_type_ids
            types = checked_tokens(types, config.type_vocab_size, "token type")
            x = x + self.token_type_embedding(types)
        return self.dropout(self.embedding_norm(x) if config.embedding_norm else x)

    def head(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch seq output"]:
        """The result of `forward`, from hidden states."""
        config = self.config
        if config.head == "none":
            return x
        if config.head == "masked_lm":
            activation = ACTIVATION_FUNCTIONS[config.activation]
            x = self.head_norm(activation(self.head_transform(x)))
        x = x * config.logit_scale  # cheaper than on the logits
        logits = self.token_embedding(x) if config.tie_embeddings else self.lm_head(x)
        if config.head == "masked_lm":
            logits = logits + whole(self.head_bias)
        if config.adaptive_cutoffs is not None:
            clusters = self.cluster_head(x)
            return _adaptive_log_probabilities(logits, clusters, config.adaptive_cutoffs)
        return logits


def _adaptive_log_probabilities(
    logits: Float[Tensor, "batch seq vocab"],
    cluster_logits: Float[Tensor, "batch seq clusters"],
    cutoffs: tuple[int, ...],
) -> Float[Tensor, "batch seq vocab"]:
    first, ends = cutoffs[0], (*cutoffs, logits.shape[-1])
    head = torch.cat([logits[..., :first], cluster_logits], dim=-1).log_softmax(dim=-1)
    parts = [head[..., :first]]
    for cluster, (start, end) in enumerate(itertools.pairwise(ends)):
        chosen = head[..., first + cluster, None]
        parts.append(chosen + logits[..., start:end].log_softmax(dim=-1))
    return torch.cat(parts, dim=-1)


def _check_windows(config: ALiBiConfig, windows: Windows | None) -> None:
    if windows is not None:
        shape = (len(windows), *{len(of_layer) for of_layer in windows})
        check_windows(shape, any(each >= 0 for of_layer in windows for each in of_layer), config)


def _norm(config: ALiBiConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(width, eps=config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


def checked_tokens(
    tokens: Integer[Tensor, "batch seq"], vocab_size: int, what: str = "token"
) -> Integer[Tensor, "batch seq"]:
    """The tokens as int64, or ValueError; their range is checked where they can be read."""
    check_array("tokens", tokens, (Tensor,), "a torch.Tensor of token ids")
    check_tokens(tokens.shape, not tokens.is_floating_point() and tokens.dtype != torch.bool)
    tokens = tokens.long()
    if has_values_on_host(tokens) and tokens.numel():
        check_token_range(int(tokens.min()), int(tokens.max()), vocab_size, what)
    return tokens


def _initialise(model: nn.Module, config: ALiBiConfig) -> None:
    for row in parameter_table(config):
        parameter = model.get_parameter(row.name)
        if row.init == "slopes":
            start = torch.from_numpy(slopes(config.num_heads, config.bias_max))
            with torch.no_grad():
                parameter.copy_(placed_like(parameter, start, parameter.device))
        elif isinstance(row.init, str):
            nn.init.constant_(parameter, {"zeros": 0.0, "ones": 1.0}[row.init])
        else:
            nn.init.normal_(parameter, std=row.init)
