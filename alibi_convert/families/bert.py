"""What MosaicBERT and Jina's encoders keep of BERT: embeddings, the masked-language head, keys."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Derived, Fold, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

LAYER, OURS = "bert.encoder.layer.{i}", "transformer.layers.{i}"
GATED_LAYERS = f"{LAYER}.mlp.gated_layers"


EMBEDDING_ROWS = (
    Row("bert.embeddings.word_embeddings.weight", "token_embedding.weight"),
    Row("bert.embeddings.token_type_embeddings.weight", "token_type_embedding.weight"),
    *both("bert.embeddings.LayerNorm", "embedding_norm"),
)
ATTENTION_OUTPUT_ROWS = (
    *both(f"{LAYER}.attention.output.dense", f"{OURS}.attn.output"),
    *both(f"{LAYER}.attention.output.LayerNorm", f"{OURS}.attn_norm"),
)
GATED_ROWS = (
    Row(f"{GATED_LAYERS}.weight", f"{OURS}.ffn.{{gate,fc1}}.weight"),
    *both(f"{LAYER}.mlp.wo", f"{OURS}.ffn.fc2"),
    *both(f"{LAYER}.mlp.layernorm", f"{OURS}.ffn_norm"),
)
HEAD_ROWS = (
    *both("cls.predictions.transform.dense", "head_transform"),
    *both("cls.predictions.transform.LayerNorm", "head_norm"),
)
ALIASES = ((r"((?:embeddings|encoder|pooler)\..*)", r"bert.\1"),)  # saved without a head
DERIVED = (
    Derived(r"bert\.pooler\.dense\.(weight|bias)", "pooler: it follows the hidden states"),
    Derived(r"bert\.embeddings\.(position_ids|token_type_ids)", "default arguments"),
    Derived(r"cls\.seq_relationship\.(weight|bias)", "head of next sentence prediction"),
    Derived(
        r"cls\.predictions\.decoder\.weight",
        "the head is the token embedding",
        same_as="bert.embeddings.word_embeddings.weight",
    ),
)

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}

LINES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("intermediate_size", "feed_forward_dim", default=3072),
    Key("max_position_embeddings", "max_len", default=512),
    Key("type_vocab_size", "type_vocab_size", default=2),
    Key("hidden_dropout_prob", "dropout", default=0.1),
    Key("initializer_range", "init_std", default=0.02),
    Key("layer_norm_eps", "norm_eps", default=1e-12),
    Only("is_decoder", (False,), "the bias is symmetric and nothing is masked"),
    Only("tie_word_embeddings", (True,), "the head ends in the token embedding"),
    Neutral(("classifier_dropout", "num_labels"), "a classifier that is not read"),
)
IMPLIED: dict[str, Any] = {
    "causal": False,
    "norm_placement": "post",
    "final_norm": False,
    "embedding_norm": True,
    "head": "none",
}


def is_bert(source: Source) -> bool:
    """Whether the configuration says BERT, as those of its descendants with ALiBi do too."""
    return source.model_type == "bert"


def has_layer_tensor(source: Source, *names: str) -> bool:
    """Whether the first layer has one of these tensors, e.g. "mlp.wo.weight"."""
    listed = "|".join(map(re.escape, names))
    pattern = rf"(bert\.)?encoder\.layer\.0\.({listed})"
    return any(re.fullmatch(pattern, name) for name in source.tensors)


def with_head(config: ALiBiConfig, source: Source, hidden_act: str) -> ALiBiConfig:
    """The configuration with the head of masked language modelling, if the file has one.

    Raises:
        CheckpointError: the head has another activation than the layers.
    """
    if "cls.predictions.transform.dense.weight" not in source.tensors:
        return config
    if ACTIVATIONS.get(hidden_act) != config.activation:
        raise CheckpointError(
            f"hidden_act={hidden_act!r} of the masked-language head cannot be honoured: the layers "
            f"have {config.activation!r}; remove the tensors cls.* to read only the encoder"
        )
    return replace(config, head="masked_lm")


def without_embedding_dropout(fields: dict[str, Any], _: ALiBiConfig) -> dict[str, Any]:
    """`unrefine` of families whose embedding has the dropout of the layers."""
    return {name: value for name, value in fields.items() if name != "embedding_dropout"}


def write_config(keys: KeyTable, config: ALiBiConfig) -> dict[str, Any]:
    """The foreign configuration; only the tensors and the name of the class tell of the head.

    Raises:
        CheckpointError: as for `KeyTable.write`; or the head is none of BERT's.
    """
    if config.head == "linear":
        raise CheckpointError(
            f"{keys.family} cannot express head='linear'; expected 'masked_lm' or 'none'"
        )
    foreign = keys.write(replace(config, head="none"))
    if config.head == "none":
        names = [name.replace("ForMaskedLM", "Model") for name in keys.architectures]
        foreign["architectures"] = names
    return foreign


def zero_biases(config: ALiBiConfig, gated_layers: str = GATED_LAYERS) -> tuple[Fold, ...]:
    """Biases that the first linear maps lack while the last has one."""
    shape = (2 * config.ffn_dim, config.d_model)
    return tuple(
        Fold(
            f"transformer.layers.{index}.ffn.{name}.bias",
            {f"{gated_layers.replace('{i}', str(index))}.weight": shape},  # lends its dtype
            lambda _: np.zeros(()),
            f"zeros: {gated_layers.rpartition('.')[2]} has no bias",
        )
        for index in range(config.num_layers)
        for name in ("gate", "fc1")
    )
