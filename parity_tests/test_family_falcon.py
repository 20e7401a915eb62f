"""Falcon-RW checkpoints, both ways, against transformers' own model.

Its "sdpa" attention is the peer: "eager" adds the bias twice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import FalconConfig, FalconForCausalLM

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Source
from alibi_convert.families.falcon import FAMILY
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from parity_tests.families import (
    VOCAB,
    arrays_of,
    assert_peer_loads,
    assert_round_trip,
    assert_same_gradients,
    assert_same_logits,
    our_logits,
    peer_logits,
    redraw,
    write_folder,
)

LIMIT = BUDGETS["float32", "cpu"].forward
FLOAT64_LIMIT = BUDGETS["float64", "cpu"].forward


def peer(num_heads: int, head_dim: int = 6, **options: Any) -> FalconForCausalLM:
    config = FalconConfig(
        vocab_size=VOCAB,
        hidden_size=num_heads * head_dim,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        max_position_embeddings=128,  # the tests go past it
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        **({"bias": True} | options),
    )
    model = FalconForCausalLM._from_config(config, attn_implementation="sdpa")
    redraw(model)
    return model


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "8": (8, {}),
    "12": (12, {"bias": False}),
    "16": (16, {"tie_word_embeddings": False, "ffn_hidden_size": 50, "activation": "relu"}),
    "71": (71, {"head_dim": 2, "layer_norm_epsilon": 1e-3, "activation": "gelu_pytorch_tanh"}),
}


def saved(case: str, folder: Path) -> FalconForCausalLM:
    num_heads, options = CASES[case]
    model = peer(num_heads, **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "falcon")
    expected = peer_logits(model)
    assert_same_logits(our_logits(tmp_path / "falcon"), expected, LIMIT)
    exported = assert_round_trip(FAMILY, tmp_path / "falcon", tmp_path / "again")
    assert_peer_loads(FalconForCausalLM, exported, expected, attn_implementation="sdpa")


@pytest.mark.parametrize("case", ["8", "12", pytest.param("71", marks=pytest.mark.slow)])
def test_float64(case: str, tmp_path: Path) -> None:
    """Slopes and bias are those of bfloat16 in any dtype, so all head counts agree."""
    model = saved(case, tmp_path / "falcon").double()
    expected = peer_logits(model)
    assert expected.dtype == np.float64
    assert_same_logits(our_logits(tmp_path / "falcon", "float64"), expected, FLOAT64_LIMIT)


def test_gradients(tmp_path: Path) -> None:
    assert_same_gradients(FAMILY, tmp_path / "falcon", saved("8", tmp_path / "falcon"))


# As published with tiiuae/falcon-rw-1b, today and at first.
FALCON_RW_1B: dict[str, Any] = {
    "alibi": True,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": False,
    "new_decoder_architecture": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 50304,
}
_RENAMED = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
FIRST_RW_1B = {_RENAMED.get(name, name): value for name, value in FALCON_RW_1B.items()} | {
    "architectures": ["RWForCausalLM"],
    "model_type": "RefinedWebModel",
    "n_head_kv": 32,
}
del FIRST_RW_1B["new_decoder_architecture"]


def read(config: dict[str, Any]) -> ALiBiConfig:
    source = Source(config, Tensors({}))
    assert FAMILY.recognises(source)
    return FAMILY.read_config(source)


@pytest.mark.parametrize("config", [FALCON_RW_1B, FIRST_RW_1B], ids=["falcon", "RefinedWeb"])
def test_published_configurations(config: dict[str, Any]) -> None:
    assert read(config) == ALiBiConfig(
        num_layers=24,
        d_model=2048,
        num_heads=32,
        max_len=2048,
        dropout=0.0,
        attention_dropout=0.0,
        expansion_factor=4,
        vocab_size=50304,
        distance="bfloat16",
    )


def test_older_files(tmp_path: Path) -> None:
    """Older keys, and the tied head a second time."""
    model = peer(8)
    arrays = arrays_of(model)
    arrays["lm_head.weight"] = arrays["transformer.word_embeddings.weight"]
    sizes = {"hidden_size": 48, "n_head": 8, "n_layer": 2, "n_head_kv": 8, "vocab_size": VOCAB}
    write_folder(tmp_path / "old", FIRST_RW_1B | sizes, arrays)
    assert list(open_checkpoint(tmp_path / "old").derived) == ["lm_head.weight"]
    assert_same_logits(our_logits(tmp_path / "old"), peer_logits(model), LIMIT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": False}, "alibi=False .* other models are rotary"),
        ({"multi_query": True}, "multi_query=True .* other models are rotary"),
        ({"parallel_attn": True}, "parallel_attn=True .* other models are rotary"),
        ({"new_decoder_architecture": True}, "new_decoder_architecture=True .* are rotary"),
        ({"apply_residual_connection_post_layernorm": True}, "readers disagree"),
        ({"num_kv_heads": 8}, "num_kv_heads=8, but multi_query=False"),
        ({"activation": "quick_gelu"}, "activation='quick_gelu'"),
        ({"ffn_hidden_size": "wide"}, "feed_forward_dim='wide' is not valid"),
        ({"hidden_size": 0}, "falcon configuration: "),
        ({"quantization_config": {}}, "the weights are quantised; save them dequantised"),
    ],
)
def test_what_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(FALCON_RW_1B | changes)


@pytest.mark.parametrize("name", ["alibi", "multi_query", "parallel_attn"])
def test_the_defaults_are_of_the_rotary_models(name: str) -> None:
    config = {key: value for key, value in FALCON_RW_1B.items() if key != name}
    with pytest.raises(CheckpointError, match="other models are rotary"):
        read(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distance": "absolute"}, "distance='absolute'"),
        ({"attention_bias": False}, "attention_bias=False together"),
        ({"attention_scale": 0.5}, "attention_scale=0.5"),
        ({"bias_max": 16.0}, "bias_max=16.0"),
        ({"embedding_norm": True}, "embedding_norm=True"),
        ({"gated_ffn": True}, "gated_ffn=True"),
        ({"num_kv_heads": 8}, "num_kv_heads"),
        ({"vocab_size": None}, "vocab_size=None"),
    ],
)
def test_what_it_cannot_express(fields: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(read(FALCON_RW_1B), **fields)
    with pytest.raises(CheckpointError, match=message):
        FAMILY.write_config(config)


@pytest.mark.parametrize("fields", [{"expansion_factor": 2}, {"feed_forward_dim": 1000}])
def test_any_width(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(read(FALCON_RW_1B), **fields)
    assert FAMILY.write_config(config)["ffn_hidden_size"] == config.ffn_dim
    assert read(FAMILY.write_config(config)).ffn_dim == config.ffn_dim
