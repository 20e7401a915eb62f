"""Our models as models of Hugging Face's transformers: `import alibi_torch.transformers`.

From then on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoModelForMaskedLM` open our
folders. What transformers saves is a folder of ours again. Generation, training and adapters are
theirs; nothing of them is written here. The model inside is `ALiBiLM`, with its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)

from alibi_spec import ALiBiConfig
from alibi_spec.biases import interpolation
from alibi_torch.dispatch import attention
from alibi_torch.model import ALiBiLM, AttentionMask

_OPTIONS = [option.name for option in fields(ALiBiConfig)]
_FORMAT = {"format": "alibi-duo", "format_version": 1}  # of our config.json


class ALiBiDuoConfig(PreTrainedConfig):
    """The options of `ALiBiConfig`, and what transformers keeps beside a model's own.

    Raises:
        ValueError: what `ALiBiConfig` refuses, or a model without a vocabulary.
    """

    model_type = "alibi-duo"
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_len",
    }
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    use_cache: bool = True
    tie_word_embeddings: bool = False  # the model has one parameter for both where they are tied

    def __post_init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        own |= {name: kwargs.pop(key) for key, name in self.attribute_map.items() if key in kwargs}
        for name, value in (_FORMAT | ALiBiConfig.from_dict(own).to_dict()).items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def options(self) -> ALiBiConfig:
        """The configuration of the model itself."""
        return ALiBiConfig.from_dict({name: getattr(self, name) for name in _OPTIONS})


class ALiBiDuoPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config: ALiBiDuoConfig
    config_class = ALiBiDuoConfig
    base_model_prefix = "lm"  # our folders have the names of its parameters
    supports_gradient_checkpointing = True

    def __init__(self, config: ALiBiDuoConfig) -> None:
        super().__init__(config)
        self._no_split_modules = {"Block"}
        self.lm = ALiBiLM(config.options)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            ValueError: the folder lacks parameters; transformers would go on with random ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{args[0]} lacks {len(missing)} of the model's parameters, {missing[0]} first; "
                "expected a folder of alibi-duo: `alibi convert` makes one of other checkpoints"
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers' own, with the names of our folders."""
        state = self.state_dict() if state_dict is None else state_dict
        named = {name.removeprefix("lm."): array for name, array in state.items()}
        super().save_pretrained(save_directory, is_main_process, named, *args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens."""
        return self.lm.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Not possible: NotImplementedError."""
        raise NotImplementedError(_OF_ONE_SIZE)

    def get_output_embeddings(self) -> Any:
        """The head, where it has weights of its own."""
        return getattr(self.lm, "lm_head", None)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Not possible: NotImplementedError."""
        raise NotImplementedError(_OF_ONE_SIZE)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.lm.transformer.recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.lm.transformer.recompute = value

    def _init_weights(self, module: Any) -> None:
        pass  # `ALiBiLM` has drawn them, or they are read

    def _loss(self, logits: Tensor, labels: Tensor | None, options: dict[str, Any]) -> Any:
        """By transformers' own function for this kind of model."""
        if labels is None:
            return None
        counted = {name: options[name] for name in _OF_THE_LOSS if name in options}
        counted["vocab_size"] = self.config.vocab_size
        return self.loss_function(logits=logits, labels=labels, **counted)

    def _hidden(
        self,
        input_ids: Integer[Tensor, "batch seq"] | None,
        attention_mask: AttentionMask | None,
        token_type_ids: Integer[Tensor, "batch seq"] | None,
        position_ids: Integer[Tensor, "batch seq"] | None,
        past: Cache | None,
        output_hidden_states: bool | None,
        options: dict[str, Any],
    ) -> BaseModelOutputWithPast:
        """What all heads start from: the results of the last block, after the final norm."""
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError("the model embeds tokens by itself; pass input_ids, no inputs_embeds")
        if options.get("output_attentions"):
            raise ValueError(
                "attention weights are never computed as a whole; leave output_attentions out "
                "(alibi_torch.trace gives biased logits)"
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} axes; expected [batch, keys], with 0 "
                "for padding"
            )
        seq, cache, segments = input_ids.shape[1], None, None
        if past is not None:
            read = past.get_seq_length()
            cache = _Kept(self.lm.transformer.config, past, attention_mask, read + seq)
            attention_mask = None if attention_mask is None else attention_mask[:, -seq:]
        elif attention_mask is None and position_ids is not None:
            segments = _segments(position_ids)
        wants_all = output_hidden_states or (
            output_hidden_states is None and self.config.output_hidden_states
        )
        with _inputs_of(self.lm.transformer.layers if wants_all else ()) as states:
            x = self.lm.embed(input_ids, token_type_ids)
            kept: Any = {"segment_ids": segments, "cache": cache}
            x = self.lm.transformer(x, attention_mask, **kept)
        x = x if cache is None else x[0]
        every: Any = (*states, x) if wants_all else None
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past, hidden_states=every
        )


class ALiBiDuoModel(ALiBiDuoPreTrainedModel):
    """Hidden states of any model, as `AutoModel` gives them."""

    def forward(
        self,
        input_ids: Integer[Tensor, "batch seq"] | None = None,
        attention_mask: AttentionMask | None = None,
        token_type_ids: Integer[Tensor, "batch seq"] | None = None,
        position_ids: Integer[Tensor, "batch seq"] | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Hidden states [batch, seq, d_model]; `attention_mask` has 0 for padding.

        Raises:
            ValueError: `inputs_embeds`, `output_attentions`, or what `ALiBiLM` refuses.
        """
        result = self._hidden(
            *(input_ids, attention_mask, token_type_ids, position_ids),
            *(past_key_values, output_hidden_states, options),
        )
        return result if _as_dict(self.config, return_dict) else result.to_tuple()


class ALiBiDuoForCausalLM(ALiBiDuoPreTrainedModel, GenerationMixin):
    """A decoder, as `AutoModelForCausalLM` gives it.

    Raises:
        ValueError: the configuration is not that of a decoder with a head.
    """

    def __init__(self, config: ALiBiDuoConfig) -> None:
        if not config.causal or config.head != "linear":
            raise ValueError(_of_another_kind(config, "a decoder with head='linear'"))
        super().__init__(config)

    def forward(
        self,
        input_ids: Integer[Tensor, "batch seq"] | None = None,
        attention_mask: AttentionMask | None = None,
        position_ids: Integer[Tensor, "batch seq"] | None = None,
        past_key_values: Cache | None = None,
        labels: Integer[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        """Logits of the next tokens, and the loss of labels, which are shifted here.

        Args:
            attention_mask: 0 for padding, of all keys, those of the cache too.
            position_ids: without a mask, a position that does not rise begins another packed
                document, which does not see those before. Otherwise ALiBi needs none.
            labels: -100 is left out.
            logits_to_keep: of this many last positions; 0 is all.

        Raises:
            ValueError: `inputs_embeds`, `output_attentions`, a cache of fixed size, or what
                `ALiBiLM` refuses.
        """
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and not self.training:
            past_key_values = DynamicCache()
        types = options.pop("token_type_ids", None)
        found = self._hidden(
            *(input_ids, attention_mask, types, position_ids),
            *(past_key_values, output_hidden_states, options),
        )
        x: Any = found.last_hidden_state
        logits = self.lm.head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = self._loss(logits, labels, options)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )
        return result if _as_dict(self.config, return_dict) else result.to_tuple()


class ALiBiDuoForMaskedLM(ALiBiDuoPreTrainedModel):
    """An encoder with a masked-LM head, as `AutoModelForMaskedLM` gives it.

    Raises:
        ValueError: the configuration is not that of a masked language model.
    """

    def __init__(self, config: ALiBiDuoConfig) -> None:
        if config.causal or config.head != "masked_lm":
            raise ValueError(_of_another_kind(config, "an encoder with head='masked_lm'"))
        super().__init__(config)

    def forward(
        self,
        input_ids: Integer[Tensor, "batch seq"] | None = None,
        attention_mask: AttentionMask | None = None,
        token_type_ids: Integer[Tensor, "batch seq"] | None = None,
        position_ids: Integer[Tensor, "batch seq"] | None = None,
        labels: Integer[Tensor, "batch seq"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Logits of these tokens, and the loss of labels that are not -100.

        Raises:
            ValueError: `inputs_embeds`, `output_attentions`, or what `ALiBiLM` refuses.
        """
        found = self._hidden(
            *(input_ids, attention_mask, token_type_ids, position_ids),
            *(None, output_hidden_states, options),
        )
        x: Any = found.last_hidden_state
        logits = self.lm.head(x)
        loss = self._loss(logits, labels, options)
        result = MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return result if _as_dict(self.config, return_dict) else result.to_tuple()


@dataclass(frozen=True)
class _Kept:
    """A cache of transformers, where a model asks for a `KVCache`.

    Attributes:
        config: of the model.
        cache: keeps keys and values.
        mask: of all keys, the newest too; None shows all.
        length: of all keys.
    """

    config: ALiBiConfig
    cache: Cache
    mask: AttentionMask | None
    length: int

    def grown(self, *_: Any) -> Self:
        return self

    @property
    def slope_factor(self) -> float:
        return interpolation(self.config, self.length)

    def attend(
        self, layer: int, inputs: Any, implementation: str
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        key, value = self.cache.update(inputs["key"], inputs["value"], layer)
        if key.shape[2] != self.length:
            raise ValueError(
                f"{type(self.cache).__name__} gives {key.shape[2]} keys where {self.length} were "
                "read; use a DynamicCache"
            )
        inputs = inputs | {"key": key, "value": value, "attention_mask": self.mask}
        return attention(**inputs, implementation=implementation)


def _segments(position_ids: Integer[Tensor, "#batch seq"]) -> Integer[Tensor, "batch seq"] | None:
    """A number for each packed document, which begins where positions do not rise; None for one."""
    begins: Bool[Tensor, "batch rest"] = position_ids[:, 1:] <= position_ids[:, :-1]
    if not begins.any():
        return None
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(dim=1)


@contextmanager
def _inputs_of(layers: Any) -> Iterator[list[Tensor]]:
    """Within the block, a list that the inputs of these layers are added to."""
    states: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _as_dict(config: ALiBiDuoConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _of_another_kind(config: ALiBiDuoConfig, expected: str) -> str:
    kind = "a decoder" if config.causal else "an encoder"
    return f"this is {kind} with head={config.head!r}; expected {expected}, or use AutoModel"


_OF_ONE_SIZE = (
    "the vocabulary of this model has one size; make another configuration with the new vocab_size "
    "and copy the rows"
)
_OF_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")  # for transformers' losses

AutoConfig.register(ALiBiDuoConfig.model_type, ALiBiDuoConfig)
AutoModel.register(ALiBiDuoConfig, ALiBiDuoModel)
AutoModelForCausalLM.register(ALiBiDuoConfig, ALiBiDuoForCausalLM)
AutoModelForMaskedLM.register(ALiBiDuoConfig, ALiBiDuoForMaskedLM)
