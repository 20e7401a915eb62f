"""Jina v2 folders compute what their published code computes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.families import Source, jina
from alibi_convert.families.family import Family
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise
from parity_tests.exports import assert_exported
from parity_tests.families import export, read_config
from parity_tests.peers import published
from parity_tests.peers.encoders import (
    SMALL,
    TOKENS,
    TYPES,
    Shapes,
    head_shapes,
    pooler_shapes,
)
from parity_tests.peers.jina import forward, shapes

JINA_BASE_EN = """{"_name_or_path": "jinaai/jina-bert-implementation",
"architectures": ["JinaBertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "auto_map": {},
"attn_implementation": null, "classifier_dropout": null, "emb_pooler": "mean",
"feed_forward_type": "geglu", "gradient_checkpointing": false, "hidden_act": "gelu",
"hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
"intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 8192,
"model_max_length": 8192, "model_type": "bert", "num_attention_heads": 12,
"num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "alibi",
"torch_dtype": "float16", "transformers_version": "4.26.0", "type_vocab_size": 2,
"use_cache": true, "vocab_size": 30528}"""

ALIBI = SMALL | {"position_embedding_type": "alibi"}
GATED, PLAIN, QK_NORM = jina.FAMILIES
FAMILIES = {family.name: family for family in jina.FAMILIES}
SCRATCH = ALiBiConfig(
    num_layers=2,
    d_model=30,
    num_heads=5,
    vocab_size=53,
    max_len=64,
    feed_forward_dim=23,
    causal=False,
    gated_ffn=True,
    norm_placement="post",
    norm_eps=1e-12,
    final_norm=False,
    embedding_norm=True,
    embedding_dropout=0.1,
    type_vocab_size=2,
    head="none",
)
TWICE_NORMALISED: dict[str, Any] = {"qk_norm": True, "attention_output_norm": True}


@pytest.mark.parametrize(
    ("kind", "extra", "family"),
    [
        ("geglu", head_shapes("bias"), "jina"),
        ("reglu", pooler_shapes(), "jina"),
        ("original", {}, "jina-original"),
        ("qk-norm", pooler_shapes(), "jina-qk-norm"),
    ],
)
def test_jina(tmp_path: Path, kind: str, extra: Shapes, family: str) -> None:
    config = ALIBI | ({} if kind == "qk-norm" else {"feed_forward_type": kind})

    def write(dtype: Any) -> Path:
        arrays = published.draw(shapes(kind) | extra, dtype)
        if kind == "geglu":
            arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
        return published.write_folder(tmp_path / np.dtype(dtype).name, config, arrays)

    arrays = published.draw(shapes(kind) | extra)
    published.assert_same(write, partial(forward, kind, arrays), TOKENS, TYPES)
    checkpoint = open_checkpoint(tmp_path / "float32")
    assert checkpoint.family == family
    back = export(FAMILIES[family], checkpoint.config, checkpoint.tensors, tmp_path / "back")
    original = published.draw(shapes(kind) | extra, np.float32)
    returned = read_tensors(back)
    assert set(returned) == {name for name in original if "pooler" not in name}
    for name, array in returned.items():
        assert_bitwise(array, original[name], name)
    values = read_config(back)
    assert values | config == values
    has_head = kind == "geglu"
    assert values["architectures"] == ["JinaBertForMaskedLM" if has_head else "JinaBertModel"]
    again = open_checkpoint(back)
    assert (again.family, again.config) == (family, checkpoint.config)


@pytest.mark.parametrize(
    ("kind", "fields", "family"),
    [
        ("geglu", {"head": "masked_lm"}, "jina"),
        ("reglu", {"head": "none", "activation": "relu"}, "jina"),
        ("original", {"head": "masked_lm", "gated_ffn": False}, "jina-original"),
        ("qk-norm", {"head": "masked_lm", **TWICE_NORMALISED}, "jina-qk-norm"),
    ],
)
def test_export(tmp_path: Path, kind: str, fields: dict[str, Any], family: str) -> None:
    """From scratch: the published formula reads what we write, with a head and without."""
    config = replace(SCRATCH, **fields)
    foreign = assert_exported(
        *(tmp_path, FAMILIES[family], config),
        lambda _, arrays: partial(forward, kind, arrays),
        *(TOKENS[:, :40], TYPES[:, :40]),
    )
    has_head = fields["head"] == "masked_lm"
    assert foreign == ALIBI | {
        "architectures": ["JinaBertForMaskedLM" if has_head else "JinaBertModel"],
        "attention_probs_dropout_prob": 0.1,
        "dtype": "float32",
        "feed_forward_type": "geglu" if kind == "qk-norm" else kind,
        "hidden_act": config.activation,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "is_decoder": False,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("jina", {"gated_ffn": False}, "gated_ffn=False; it has True always"),
        ("jina", TWICE_NORMALISED, "qk_norm=True; it has False always"),
        ("jina", {"activation": "silu"}, "activation='silu' together with gated_ffn=True"),
        ("jina", {"head": "linear"}, "head='linear'; expected 'masked_lm' or 'none'"),
        ("jina", {"causal": True}, "causal=True"),
        ("jina", {"type_vocab_size": None}, "type_vocab_size=None"),
        ("jina", {"slopes": "learned"}, "slopes='learned'"),
        ("jina-original", {}, "gated_ffn=True; it has False always"),
        ("jina-original", {"gated_ffn": False, "ffn_bias": False}, "ffn_bias=False"),
        ("jina-qk-norm", {}, "qk_norm=False; it has True always"),
        ("jina-qk-norm", {"qk_norm": True}, "attention_output_norm=False"),
    ],
)
def test_what_it_cannot_express(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{family} cannot express {message}"):
        FAMILIES[family].write_config(replace(SCRATCH, **fields))


def test_biases_that_have_no_place(tmp_path: Path) -> None:
    config = replace(SCRATCH, **TWICE_NORMALISED)
    ours = write(tmp_path / "ours", config=config)
    message = (
        r"express transformer\.layers\.0\.ffn\.(gate|fc1)\.bias: .* up_gated_layer has no bias"
    )
    with pytest.raises(CheckpointError, match=f"jina-qk-norm cannot {message}"):
        convert(ours, tmp_path / "theirs", to="jina-qk-norm", verify="none")


def read(config: dict[str, Any], *names: str, family: Family = GATED) -> ALiBiConfig:
    kind = "intermediate.dense" if family is PLAIN else "mlp.gated_layers"
    layer = "bert.encoder.layer.0"
    found = (f"{layer}.attention.self.query.weight", f"{layer}.{kind}.weight", *names)
    source = Source(config, Tensors.of({name: np.ones(3) for name in found}))
    assert family.recognises(source)
    return family.read_config(source)


def test_published_configuration() -> None:
    values = json.loads(JINA_BASE_EN)
    assert read(values) == ALiBiConfig(
        num_layers=12,
        d_model=768,
        num_heads=12,
        max_len=8192,
        causal=False,
        vocab_size=30528,
        feed_forward_dim=3072,
        gated_ffn=True,
        norm_placement="post",
        norm_eps=1e-12,
        final_norm=False,
        embedding_norm=True,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        type_vocab_size=2,
        head="none",
    )
    assert read(values, "cls.predictions.transform.dense.weight").head == "masked_lm"


def test_plain_layers_have_the_activation_of_the_configuration() -> None:
    config = read(ALIBI | {"hidden_act": "gelu_new"}, family=PLAIN)
    assert (config.activation, config.gated_ffn) == ("gelu_tanh", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type='absolute'"),
        ({"feed_forward_type": "swiglu"}, "feed_forward_type='swiglu'.*'geglu' or 'reglu' or"),
        ({"feed_forward_type": "original"}, "feed_forward_type='original' contradicts"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"feed_forward_type": "reglu"}, "hidden_act='gelu' of the masked-language head"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"use_flash_attn": True}, "not known: use_flash_attn"),
    ],
)
def test_what_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    config = ALIBI | {"feed_forward_type": "geglu"} | change
    with pytest.raises(CheckpointError, match=message):
        read(config, "cls.predictions.transform.dense.weight")


def test_tensors_that_contradict_the_configuration() -> None:
    with pytest.raises(CheckpointError, match="feed_forward_type='geglu' contradicts"):
        read(ALIBI | {"feed_forward_type": "geglu"}, family=PLAIN)
