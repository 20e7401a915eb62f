"""BLOOM checkpoints, both ways, against transformers' own model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom import modeling_bloom

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Source
from alibi_convert.families.bloom import FAMILY
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, slopes
from alibi_spec.budgets import BUDGETS
from parity_tests.families import (
    VOCAB,
    Float64Inside,
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
FLOAT64_LIMIT = 10 * BUDGETS["float64", "cpu"].forward  # its GELU has a constant of 8 digits


def peer(num_heads: int, head_dim: int = 6, **options: Any) -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=VOCAB,
        hidden_size=num_heads * head_dim,
        n_layer=2,
        n_head=num_heads,
        seq_length=128,  # the tests go past it
        **options,
    )
    model = BloomForCausalLM(config)
    redraw(model)
    return model


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "8": (8, {}),
    "12": (12, {}),
    "16": (16, {"apply_residual_connection_post_layernorm": True}),
    "71": (71, {"head_dim": 2, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
}
each_case = pytest.mark.parametrize("case", CASES)


def saved(case: str, folder: Path) -> BloomForCausalLM:
    num_heads, options = CASES[case]
    model = peer(num_heads, **options)
    model.save_pretrained(folder)
    return model


@each_case
def test_logits_and_round_trip(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "bloom")
    expected = peer_logits(model)
    assert_same_logits(our_logits(tmp_path / "bloom"), expected, LIMIT)
    exported = assert_round_trip(FAMILY, tmp_path / "bloom", tmp_path / "again")
    assert_peer_loads(BloomForCausalLM, exported, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    peer(12).to(dtype).save_pretrained(tmp_path / "bloom")
    assert_round_trip(FAMILY, tmp_path / "bloom", tmp_path / "again")


@pytest.mark.parametrize("case", ["8", "12"])
def test_float64(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding in the way; 12 heads with the slopes of the specification.

    The peer's are powers taken in float32, exact for 8 heads and a few ulp off for 12.
    """
    model = saved(case, tmp_path / "bloom").double()
    if case == "12":
        exact = torch.from_numpy(slopes(12)).double()
        monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", lambda *_: exact)
    with Float64Inside():
        expected = peer_logits(model)
    assert expected.dtype == np.float64
    assert_same_logits(our_logits(tmp_path / "bloom", "float64"), expected, FLOAT64_LIMIT)


def test_gradients(tmp_path: Path) -> None:
    assert_same_gradients(FAMILY, tmp_path / "bloom", saved("12", tmp_path / "bloom"))


def old_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("transformer."): array for name, array in arrays.items()}


def test_older_files(tmp_path: Path) -> None:
    """No prefix, older keys, and the tied head a second time."""
    model = peer(8)
    arrays = old_names(arrays_of(model))
    arrays["lm_head.weight"] = arrays["word_embeddings.weight"]
    config = BLOOM_560M | {"n_embed": 48, "n_layer": 2, "num_attention_heads": 8}
    write_folder(tmp_path / "old", config | {"vocab_size": VOCAB}, arrays)
    checkpoint = open_checkpoint(tmp_path / "old")
    assert list(checkpoint.derived) == ["lm_head.weight"]
    assert_same_logits(our_logits(tmp_path / "old"), peer_logits(model), LIMIT)

    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    write_folder(tmp_path / "untied", config | {"vocab_size": VOCAB}, arrays)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and .* must be the same tensor"):
        open_checkpoint(tmp_path / "untied")


# As published with bigscience/bloom-560m and bigscience/bloom-7b1.
BLOOM_560M: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "transformers_version": "4.20.0",
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
BLOOM_7B1 = BLOOM_560M | {
    "n_layer": 30,
    "num_attention_heads": 32,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "slow_but_exact": False,
    "torch_dtype": "float16",
}
BLOOM_7B1["hidden_size"] = 4096
del BLOOM_7B1["n_embed"]


def read(config: dict[str, Any]) -> ALiBiConfig:
    return FAMILY.read_config(Source(config, Tensors({})))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (BLOOM_560M, {"num_layers": 24, "d_model": 1024, "num_heads": 16}),
        (BLOOM_7B1, {"num_layers": 30, "d_model": 4096, "num_heads": 32}),
    ],
)
def test_published_configurations(config: dict[str, Any], sizes: dict[str, int]) -> None:
    assert read(config) == ALiBiConfig(
        **sizes,
        max_len=2048,
        dropout=0.0,
        attention_dropout=0.0,
        expansion_factor=4,
        vocab_size=250880,
        activation="gelu_tanh",
        embedding_norm=True,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_bias_add_qkv": True}, "skip_bias_add_qkv=True .* cannot be honoured"),
        ({"quantization_config": {}}, "the weights are quantised; save them dequantised"),
        ({"n_embed": None}, "has no hidden_size"),
        ({"hidden_size": 2048}, "hidden_size=2048, n_embed=1024; keep the one"),
        ({"layer_norm_epsilon": None}, "norm_eps=None is not valid"),
        ({"n_embed": 1000}, "num_heads=16 does not divide d_model=1000"),
        ({"apply_residual_connection_post_layernorm": 1}, "expected False or True"),
        ({"tie_word_embeddings": "no"}, "tie_embeddings='no' is not valid"),
    ],
)
def test_what_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(BLOOM_560M | changes)


@pytest.mark.parametrize("name", ["vocab_size", "n_embed", "n_layer", "num_attention_heads"])
def test_sizes_have_no_defaults(name: str) -> None:
    config = {key: value for key, value in BLOOM_560M.items() if key != name}
    with pytest.raises(CheckpointError, match="it may be truncated"):
        read(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "gelu"),
        ("attention_bias", False),
        ("attention_scale", 0.5),
        ("bias_max", 16.0),
        ("causal", False),
        ("embedding_norm", False),
        ("embedding_scale", 2.0),
        ("expansion_factor", 2),
        ("gated_ffn", True),
        ("logit_scale", 0.5),
        ("num_kv_heads", 4),
        ("qk_norm", True),
        ("qkv_clip", 6.0),
        ("slopes", "geometric"),
    ],
)
def test_what_it_cannot_express(field: str, value: Any) -> None:
    config = dataclasses.replace(read(BLOOM_560M), **{field: value})
    with pytest.raises(CheckpointError, match=f"bloom cannot express {field}={value!r}; it has"):
        FAMILY.write_config(config)


def test_it_has_a_vocabulary() -> None:
    config = dataclasses.replace(read(BLOOM_560M), vocab_size=None)
    with pytest.raises(CheckpointError, match="bloom cannot express vocab_size=None"):
        FAMILY.write_config(config)
