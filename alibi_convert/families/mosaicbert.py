"""MosaicBERT and DNABERT-2: BERT with ALiBi, gated feed-forward layers and one fused projection.

Their model_type is "bert" as well; the tensor Wqkv tells them apart. A masked key gets a large
negative number in the published code, which at real positions makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.families import bert, jina
from alibi_convert.families.family import Derived, Family, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

_WQKV = "attention.self.Wqkv"
_HEAD_EPS = 1e-12  # of the norm in the head, which ignores layer_norm_eps

_ROWS = (
    *bert.EMBEDDING_ROWS,
    *both(f"{bert.LAYER}.{_WQKV}", f"{bert.OURS}.attn.{{query,key,value}}"),
    *bert.ATTENTION_OUTPUT_ROWS,
    *bert.GATED_ROWS,
    *bert.HEAD_ROWS,
    Row("cls.predictions.decoder.bias", "head_bias"),
)


def _refine(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    return fields | {"embedding_dropout": fields["dropout"]}


_TABLE = KeyTable(
    family="mosaicbert",
    model_type="bert",
    architectures=("BertForMaskedLM",),
    lines=(
        *bert.LINES,
        Key("attention_probs_dropout_prob", "attention_dropout", default=0.0),
        Only("hidden_act", ("gelu",), "the gate is GELU, and the head has the same activation"),
        Neutral(("alibi_starting_size",), "how much of the bias is made in advance"),
        Neutral(("position_embedding_type",), "there are no position embeddings"),
    ),
    implied={**bert.IMPLIED, "gated_ffn": True, "activation": "gelu"},
    refine=_refine,
    unrefine=bert.without_embedding_dropout,
)


def _recognises(source: Source) -> bool:
    return bert.is_bert(source) and not jina.is_jina(source)


def _config(source: Source) -> ALiBiConfig:
    if not bert.has_layer_tensor(source, f"{_WQKV}.weight"):
        raise CheckpointError(
            f"a BERT without {_WQKV}.weight in its layers has position embeddings instead of "
            "ALiBi; of BERT's descendants MosaicBERT, DNABERT-2 and Jina v2 can be read"
        )
    config = bert.with_head(_TABLE.read(source.config or {}, source.ignored), source, "gelu")
    if config.head == "masked_lm" and config.norm_eps != _HEAD_EPS:
        raise CheckpointError(
            f"layer_norm_eps={config.norm_eps} cannot be honoured: the head has {_HEAD_EPS} "
            "always; remove the tensors cls.* to read only the encoder"
        )
    return config


def _write_config(config: ALiBiConfig) -> dict[str, Any]:
    if config.head == "masked_lm" and config.norm_eps != _HEAD_EPS:
        raise CheckpointError(
            f"mosaicbert cannot express norm_eps={config.norm_eps} together with "
            f"head='masked_lm', which has {_HEAD_EPS} always"
        )
    return bert.write_config(_TABLE, config)


def _derived(_: ALiBiConfig) -> tuple[Derived, ...]:
    bias = Derived(
        r"cls\.predictions\.bias", "a second name", same_as="cls.predictions.decoder.bias"
    )
    return (*bert.DERIVED, bias)


FAMILY = Family(
    "mosaicbert",
    _recognises,
    _config,
    _ROWS,
    aliases=bert.ALIASES,
    derived=_derived,
    folds=lambda config, _: bert.zero_biases(config),
    write_config=_write_config,
    label="folder, as MosaicBERT",
    neutral_keys=_TABLE.neutral_keys,
)
