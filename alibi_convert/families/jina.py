"""Jina's v2 encoders: BERT with ALiBi and gated feed-forward layers.

The code has three layouts: gated ("geglu", "reglu") and plain ("original") feed-forward layers,
and that of jina-embeddings-v2-base-code (jina-bert-v2-qk-post-norm), which normalises queries and
keys, normalises the output of attention twice, adding its input each time, and has the halves of
its gated layer the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.families import bert
from alibi_convert.families.family import Derived, Family, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only, one_of
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

_PLAIN_ROWS = (
    *both(f"{bert.LAYER}.intermediate.dense", f"{bert.OURS}.ffn.fc1"),
    *both(f"{bert.LAYER}.output.dense", f"{bert.OURS}.ffn.fc2"),
    *both(f"{bert.LAYER}.output.LayerNorm", f"{bert.OURS}.ffn_norm"),
)


_TWICE_NORMALISED_ROWS = (
    *both(f"{bert.LAYER}.attention.self.layer_norm_q", f"{bert.OURS}.attn.query_norm"),
    *both(f"{bert.LAYER}.attention.self.layer_norm_k", f"{bert.OURS}.attn.key_norm"),
    *both(f"{bert.LAYER}.attention.output.dense", f"{bert.OURS}.attn.output"),
    *both(f"{bert.LAYER}.attention.output.LayerNorm", f"{bert.OURS}.attn_output_norm"),
    *both(f"{bert.LAYER}.layer_norm_1", f"{bert.OURS}.attn_norm"),
    Row(f"{bert.LAYER}.mlp.up_gated_layer.weight", f"{bert.OURS}.ffn.{{fc1,gate}}.weight"),
    *both(f"{bert.LAYER}.mlp.down_layer", f"{bert.OURS}.ffn.fc2"),
    *both(f"{bert.LAYER}.layer_norm_2", f"{bert.OURS}.ffn_norm"),
)


def _rows(*layers: Row) -> tuple[Row, ...]:
    projections = (
        row
        for name in ("query", "key", "value")
        for row in both(f"{bert.LAYER}.attention.self.{name}", f"{bert.OURS}.attn.{name}")
    )
    return (
        *bert.EMBEDDING_ROWS,
        *projections,
        *layers,
        *bert.HEAD_ROWS,
        Row("cls.predictions.bias", "head_bias"),
    )


# The gate's activation, or that of hidden_act.
_GATES = {"geglu": "gelu", "reglu": "relu", "original": None}


def _refine(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    gate = fields.pop("gate")
    fields["gated_ffn"] = gate is not None
    fields["activation"] = gate or fields["activation"]
    return fields | {"embedding_dropout": fields["dropout"]}


def _unrefine(fields: dict[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    gate = config.activation if config.gated_ffn else None
    return bert.without_embedding_dropout(fields, config) | {"gate": gate}


_LINES = (
    *bert.LINES,
    Key("attention_probs_dropout_prob", "attention_dropout", default=0.1),
    Key("hidden_act", "activation", default="gelu", **one_of(*bert.ACTIVATIONS.items())),
    Key("feed_forward_type", "gate", default="original", **one_of(*_GATES.items())),
    Only(
        "position_embedding_type",
        ("alibi",),
        "position embeddings are not ALiBi",
        default="absolute",
    ),
    Neutral(("emb_pooler",), "how the hidden states of a sentence become one vector"),
    Neutral(("model_max_length",), "of the tokenizer"),
)

_GATED, _PLAIN, _TWICE_NORMALISED = (
    "mlp.gated_layers.weight",
    "intermediate.dense.weight",
    "mlp.up_gated_layer.weight",
)


def is_jina(source: Source) -> bool:
    """Whether a BERT is one of Jina's with ALiBi."""
    return any(family.recognises(source) for family in FAMILIES)


def _has(source: Source, layer_tensor: str) -> bool:
    is_separate = bert.has_layer_tensor(source, "attention.self.query.weight")  # not MosaicBERT
    return bert.is_bert(source) and is_separate and bert.has_layer_tensor(source, layer_tensor)


def _has_plain_layers(source: Source) -> bool:
    says_alibi = (source.config or {}).get("position_embedding_type") == "alibi"
    return says_alibi and _has(source, _PLAIN)


def _keys(family: str, **implied: Any) -> KeyTable:
    """The table of one layout, which implies these fields."""
    return KeyTable(
        family=family,
        model_type="bert",
        architectures=("JinaBertForMaskedLM",),
        lines=_LINES,
        implied=bert.IMPLIED | implied,
        refine=_refine,
        unrefine=_unrefine,
    )


def _read_config(keys: KeyTable, source: Source) -> ALiBiConfig:
    foreign = source.config or {}
    is_gated = not _has(source, _PLAIN)
    config = keys.read(foreign, source.ignored)
    if config.gated_ffn != is_gated:
        raise CheckpointError(
            f"feed_forward_type={foreign.get('feed_forward_type', 'original')!r} contradicts the "
            f"tensors, which are those of {'gated' if is_gated else 'plain'} layers"
        )
    return bert.with_head(config, source, foreign.get("hidden_act", "gelu"))


def _read_twice_normalised_config(keys: KeyTable, source: Source) -> ALiBiConfig:
    foreign = {"feed_forward_type": "geglu", **(source.config or {})}  # its own default
    return _read_config(keys, Source(foreign, source.tensors, source.ignored))


def _write_config(keys: KeyTable, config: ALiBiConfig) -> dict[str, Any]:
    if config.gated_ffn and config.activation not in _GATES.values():
        raise CheckpointError(
            f"{keys.family} cannot express activation={config.activation!r} together with "
            "gated_ffn=True; expected 'gelu' or 'relu'"
        )
    return bert.write_config(keys, config)


def _derived(_: ALiBiConfig) -> tuple[Derived, ...]:
    bias = Derived(
        r"cls\.predictions\.decoder\.bias", "a second name", same_as="cls.predictions.bias"
    )
    return (*bert.DERIVED, bias)


_GATED_KEYS = _keys("jina", gated_ffn=True)
_PLAIN_KEYS = _keys("jina-original", gated_ffn=False)
_TWICE_NORMALISED_KEYS = _keys(
    "jina-qk-norm", gated_ffn=True, qk_norm=True, attention_output_norm=True
)
FAMILIES = (
    Family(
        "jina",
        lambda source: _has(source, _GATED),
        partial(_read_config, _GATED_KEYS),
        _rows(*bert.ATTENTION_OUTPUT_ROWS, *bert.GATED_ROWS),
        aliases=bert.ALIASES,
        derived=_derived,
        folds=lambda config, _: bert.zero_biases(config),
        write_config=partial(_write_config, _GATED_KEYS),
        label="folder, as Jina v2 with gated layers",
        neutral_keys=_GATED_KEYS.neutral_keys,
    ),
    Family(
        "jina-original",
        _has_plain_layers,
        partial(_read_config, _PLAIN_KEYS),
        _rows(*bert.ATTENTION_OUTPUT_ROWS, *_PLAIN_ROWS),
        aliases=bert.ALIASES,
        derived=_derived,
        write_config=partial(_write_config, _PLAIN_KEYS),
        label="folder, as Jina v2 with plain layers",
        neutral_keys=_PLAIN_KEYS.neutral_keys,
    ),
    Family(
        "jina-qk-norm",
        lambda source: _has(source, _TWICE_NORMALISED),
        partial(_read_twice_normalised_config, _TWICE_NORMALISED_KEYS),
        _rows(*_TWICE_NORMALISED_ROWS),
        aliases=bert.ALIASES,
        derived=_derived,
        folds=lambda config, _: bert.zero_biases(config, f"{bert.LAYER}.mlp.up_gated_layer"),
        write_config=partial(_write_config, _TWICE_NORMALISED_KEYS),
        label="folder, as Jina v2's code model",
        neutral_keys=_TWICE_NORMALISED_KEYS.neutral_keys,
    ),
)
