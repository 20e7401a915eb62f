"""Jina v2 folders compute what their published code computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Source, jina
from alibi_convert.families.family import Family
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
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
        ({"feed_forward_type": "swiglu"}, "feed_forward_type='swiglu'.*geglu, reglu, original"),
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
