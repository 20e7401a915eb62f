"""Baichuan-13B and Baichuan2-13B, which share their model_type with the rotary 7B models.

No key says which is which. The 7B models have max_position_embeddings (and rotary buffers), the
13B ones have only model_max_length. Baichuan2 has z_loss_weight or its larger vocabulary; its
logits are products with the rows of lm_head scaled to length one, which is done on import. An
export has no z_loss_weight: it is a Baichuan-13B, unless its vocabulary is as large as that of
Baichuan2. Then every reader scales the rows, and a model is refused that this would change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Derived, Family, Fold, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only
from alibi_convert.rules import Row
from alibi_spec import ALiBiConfig

_LAYER, _OURS = "model.layers.{i}", "transformer.layers.{i}"
_BAICHUAN2_VOCAB_SIZE = 125696
_Z_LOSS = "z_loss_weight"
_BLOCK = 2**14  # rows of lm_head in float64 at a time

_ROWS = (
    Row("model.embed_tokens.weight", "token_embedding.weight"),
    Row(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.attn_norm.weight"),
    Row(f"{_LAYER}.self_attn.W_pack.weight", f"{_OURS}.attn.{{query,key,value}}.weight"),
    Row(f"{_LAYER}.self_attn.o_proj.weight", f"{_OURS}.attn.output.weight"),
    Row(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.ffn_norm.weight"),
    Row(f"{_LAYER}.mlp.gate_proj.weight", f"{_OURS}.ffn.gate.weight"),
    Row(f"{_LAYER}.mlp.up_proj.weight", f"{_OURS}.ffn.fc1.weight"),
    Row(f"{_LAYER}.mlp.down_proj.weight", f"{_OURS}.ffn.fc2.weight"),
    Row("model.norm.weight", "transformer.final_norm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)

_TABLE = KeyTable(
    family="baichuan",
    model_type="baichuan",
    architectures=("BaichuanForCausalLM",),
    lines=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("intermediate_size", "feed_forward_dim", default=13696),
        Key("num_hidden_layers", "num_layers"),
        Key("num_attention_heads", "num_heads"),
        Key("model_max_length", "max_len", default=4096),
        Key("initializer_range", "init_std", default=0.02),
        Key("rms_norm_eps", "norm_eps", default=1e-6),
        Only("hidden_act", ("silu",), "the gate is SwiGLU's"),
        Only("tie_word_embeddings", (False,), "the head is a matrix of its own"),
        Neutral((_Z_LOSS,), "a term of the training loss"),
        Neutral(("_from_model_config",), "how a generation_config.json came to be"),
    ),
    implied={
        "dropout": 0.0,
        "tie_embeddings": False,
        "attention_bias": False,
        "ffn_bias": False,
        "gated_ffn": True,
        "activation": "silu",
        "norm": "rms",
        "norm_bias": False,
    },
    unsaid=("dropout", "attention_dropout", "embedding_dropout"),
)


def _recognises(source: Source) -> bool:
    return source.model_type == "baichuan"


def _config(source: Source) -> ALiBiConfig:
    foreign = source.config or {}
    rotary = [name for name in source.tensors if re.search(r"\.rotary_emb\.inv_freq$", name)]
    if rotary or "max_position_embeddings" in foreign:
        raise CheckpointError(
            "this is a Baichuan 7B model, which has rotary positions "
            f"({rotary[0] if rotary else 'max_position_embeddings in config.json'}) instead of "
            "ALiBi; only Baichuan-13B and Baichuan2-13B can be read"
        )
    return _TABLE.read(foreign, source.ignored)


def _is_baichuan2(foreign: Mapping[str, Any], config: ALiBiConfig) -> bool:
    return _Z_LOSS in foreign or (config.vocab_size or 0) >= _BAICHUAN2_VOCAB_SIZE


def _folds(config: ALiBiConfig, source: Source) -> tuple[Fold, ...]:
    if not _is_baichuan2(source.config or {}, config):
        return ()
    head, shape = "lm_head.weight", (config.vocab_size or 0, config.d_model)
    return (Fold(head, {head: shape}, _unit_rows, "rows scaled to length 1, as Baichuan2 does"),)


def _unit_rows(weight: np.ndarray) -> np.ndarray:
    scaled = np.empty_like(weight)
    for first in range(0, len(weight), _BLOCK):
        rows = weight[first : first + _BLOCK].astype(np.float64)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        scaled[first : first + _BLOCK] = rows / np.maximum(length, 1e-12)
    return scaled


def _derived(_: ALiBiConfig) -> tuple[Derived, ...]:
    return (Derived(r"model\.(future_mask|alibi_mask)", "mask and bias: they follow from slopes"),)


FAMILY = Family(
    "baichuan",
    _recognises,
    _config,
    _ROWS,
    derived=_derived,
    folds=_folds,
    write_config=_TABLE.write,
    label="folder, as Baichuan-13B",
    neutral_keys=_TABLE.neutral_keys - {_Z_LOSS},  # it would make a Baichuan2 of an export
)
