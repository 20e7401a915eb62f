"""MPT checkpoints, both ways, against transformers' own model and llm-foundry's equations."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MptConfig, MptForCausalLM

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Source
from alibi_convert.families.mpt import FAMILY
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from parity_tests.families import (
    SEQ,
    VOCAB,
    Float64Inside,
    arrays_of,
    assert_peer_loads,
    assert_round_trip,
    assert_same_gradients,
    assert_same_logits,
    assert_same_tensors,
    batch,
    export,
    our_logits,
    peer_logits,
    redraw,
    write_folder,
)
from parity_tests.peers.mpt import (
    MPT_1B,
    MPT_7B,
    MPT_30B,
    REPLIT,
    STORYWRITER,
    PlainMPT,
    draw_arrays,
    with_attention,
)

LIMIT = BUDGETS["float32", "cpu"].forward
FLOAT64_LIMIT = BUDGETS["float64", "cpu"].forward


def peer(num_heads: int, head_dim: int = 6, **options: Any) -> MptForCausalLM:
    config = MptConfig(
        vocab_size=VOCAB,
        d_model=num_heads * head_dim,
        n_layers=2,
        n_heads=num_heads,
        max_seq_len=SEQ,  # it cannot go further
        **options,
    )
    model = MptForCausalLM(config)
    redraw(model)
    return model


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "8": (8, {}),
    "12": (12, {"attn_config": {"clip_qkv": 0.5}}),
    "16": (16, {"attn_config": {"softmax_scale": 0.7}, "tie_word_embeddings": False}),
    "71": (71, {"head_dim": 2, "layer_norm_epsilon": 1e-3}),
}


def saved(case: str, folder: Path) -> MptForCausalLM:
    num_heads, options = CASES[case]
    model = peer(num_heads, **copy.deepcopy(options))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "mpt")
    expected = peer_logits(model)
    assert_same_logits(our_logits(tmp_path / "mpt"), expected, LIMIT)
    exported = assert_round_trip(FAMILY, tmp_path / "mpt", tmp_path / "again")
    assert_peer_loads(MptForCausalLM, exported, expected)


def test_float64(tmp_path: Path) -> None:
    """8 heads, whose slopes the peer's float32 powers hit exactly."""
    model = saved("8", tmp_path / "mpt").double()
    with Float64Inside():
        expected = peer_logits(model)
    assert expected.dtype == np.float64
    assert_same_logits(our_logits(tmp_path / "mpt", "float64"), expected, FLOAT64_LIMIT)


def test_gradients(tmp_path: Path) -> None:
    assert_same_gradients(FAMILY, tmp_path / "mpt", saved("12", tmp_path / "mpt"))


def read(config: dict[str, Any]) -> ALiBiConfig:
    source = Source(config, Tensors({}))
    assert FAMILY.recognises(source)
    return FAMILY.read_config(source)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (MPT_7B, {}),
        (STORYWRITER, {"max_len": 65536, "bias_max": 16.0, "qkv_clip": 6.0}),
        (MPT_30B, {"max_len": 8192, "d_model": 7168, "num_heads": 64, "num_layers": 48}),
        (REPLIT, {"d_model": 2560, "vocab_size": 32768}),
        (
            MPT_1B,
            {
                "d_model": 2048,
                "num_heads": 16,
                "num_layers": 24,
                "vocab_size": 50368,
                "qk_norm": True,
            },
        ),
    ],
    ids=["7b", "storywriter", "30b", "replit", "1b"],
)
def test_published_configurations(config: dict[str, Any], fields: dict[str, Any]) -> None:
    common: dict[str, Any] = {
        "num_layers": 32,
        "d_model": 4096,
        "num_heads": 32,
        "max_len": 2048,
        "dropout": 0,
        "attention_dropout": 0,
        "expansion_factor": 4,
        "vocab_size": 50432,
        "attention_bias": False,
        "ffn_bias": False,
        "norm_bias": False,
        "embedding_dropout": 0,
    }
    assert read(config) == ALiBiConfig(**(common | fields))


PLAIN: dict[str, tuple[dict[str, Any], int]] = {  # keys, and the hidden width that they imply
    "grouped": (
        {
            "n_heads": 6,
            "expansion_ratio": 2.5,
            "norm_type": "LOW_PRECISION_RMSNORM",
            "no_bias": False,
            "tie_word_embeddings": False,
            "logit_scale": 0.25,
            "attn_config": {
                "attn_type": "grouped_query_attention",
                "kv_n_heads": 2,
                "qk_ln": True,
                "alibi_bias_max": 16,
            },
            "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
        },
        60,
    ),
    "multiquery": (
        {
            "n_heads": 8,
            "no_bias": False,
            "logit_scale": "inv_sqrt_d_model",
            "norm_type": "layernorm",
            "norm_eps": 1e-3,
            "attn_config": {
                "attn_type": "multiquery_attention",
                "qk_ln": True,
                "clip_qkv": 0.5,
                "softmax_scale": 0.7,
            },
            "ffn_config": {
                "ffn_type": "mptmlp",
                "ffn_act_fn": {"name": "gelu", "approximate": "tanh"},
                "ffn_hidden_size": 50,
            },
        },
        50,
    ),
    "odd": (
        {
            "n_heads": 12,
            "attn_config": {"attn_type": "multihead_attention", "alibi_bias_max": 4},
            "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "relu"}},
        },
        96,
    ),
}


def plain_folder(case: str, folder: Path) -> PlainMPT:
    changes, hidden = PLAIN[case]
    config = MPT_7B | {"d_model": 24, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 128}
    config = config | {"tie_word_embeddings": True} | changes
    config = with_attention(config, alibi=True, attn_impl="torch")
    arrays = draw_arrays(config | {"norm_type": config["norm_type"].lower()}, hidden)
    write_folder(folder, config, arrays)
    return PlainMPT(config | {"norm_type": config["norm_type"].lower()}, arrays)


@pytest.mark.parametrize("case", PLAIN)
def test_what_only_llm_foundry_reads(case: str, tmp_path: Path) -> None:
    """The keys that transformers ignores, in float64 and past the configured length."""
    plain = plain_folder(case, tmp_path / "mpt")
    expected = plain.logits(*batch())
    assert_same_logits(our_logits(tmp_path / "mpt", "float64"), expected, FLOAT64_LIMIT)


@pytest.mark.parametrize("case", PLAIN)
def test_its_round_trip(case: str, tmp_path: Path) -> None:
    plain_folder(case, tmp_path / "mpt")
    checkpoint = open_checkpoint(tmp_path / "mpt")
    written = FAMILY.write_config(checkpoint.config)
    assert read(written) == checkpoint.config
    is_grouped = written["attn_config"]["attn_type"] == "grouped_query_attention"
    assert ("kv_n_heads" in written["attn_config"]) == is_grouped
    exported = export(FAMILY, checkpoint.config, checkpoint.tensors, tmp_path / "again")
    assert_same_tensors(tmp_path / "mpt", exported)


def old_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    changes = {
        "norm_": "ln_",
        "ffn.up_proj": "mlp.mlp_up",
        "ffn.down_proj": "mlp.mlp_down",
    }
    renamed = {}
    for name, array in arrays.items():
        for new, old in changes.items():
            name = name.replace(new, old)
        renamed[name] = array
    return renamed


@pytest.mark.parametrize("config", [REPLIT, MPT_1B | {"attn_qk_ln": False}], ids=["replit", "1b"])
def test_older_files(config: dict[str, Any], tmp_path: Path) -> None:
    """Flat keys and the names of before llm-foundry."""
    model = peer(8)
    arrays = old_names(arrays_of(model))
    assert "transformer.blocks.1.mlp.mlp_down.weight" in arrays
    assert "transformer.ln_f.weight" in arrays
    sizes = {"d_model": 48, "n_heads": 8, "n_layers": 2, "vocab_size": VOCAB}
    write_folder(tmp_path / "old", config | sizes, arrays)
    assert_same_logits(our_logits(tmp_path / "old"), peer_logits(model), LIMIT)


def test_flat_multiquery() -> None:
    assert read(REPLIT | {"multiquery_attention": True}).num_kv_heads == 1
    assert read(REPLIT | {"multiquery_attention": False}).num_kv_heads is None


def attention(**changes: Any) -> dict[str, Any]:
    return {"attn_config": MPT_7B["attn_config"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (attention(alibi=False), r"attn_config\.alibi=False .* no ALiBi"),
        (attention(rope=True), "rotated"),
        (attention(prefix_lm=True), "sees ahead"),
        (attention(qk_gn=True), r"attn_config\.qk_gn=True"),
        (attention(fused_qkv=False), "in three tensors"),
        (attention(sliding_window_size=128), "has a window"),
        (attention(attn_logit_softcapping=30.0), "capped"),
        (attention(flex_attn_mod_list=[{"mod_name": "x"}]), "flex_attn_mod_list"),
        (attention(reuse_kv_layer_idx=-1), "share keys"),
        (attention(attn_impl="mystery"), r"attn_config\.attn_impl='mystery'"),
        (attention(attn_type="linear_attention"), "attn_type='linear_attention'"),
        (attention(attn_type="grouped_query_attention"), "kv_n_heads=None"),
        (attention(kv_n_heads=4), "attn_type='multihead_attention' with kv_n_heads=4"),
        (attention(mystery=1), r"not known: attn_config\.mystery"),
        ({"attn_config": [1]}, "attn_config in config.json is a list"),
        ({"alibi": True}, "not known: alibi"),
        ({"block_overrides": {"overrides": {}}}, "layers differ"),
        ({"expansion_ratio": 1.00001}, "is not an integer"),
        ({"expansion_ratio": float("inf")}, "is not an integer"),
        ({"expansion_ratio": "4"}, "expansion_factor='4' is not valid"),
        (attention(clip_qkv=10**400), "too large"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, "expected 'mptmlp' or 'mptglu'"),
        ({"ffn_config": {"ffn_type": "te_ln_mlp"}}, "expected 'mptmlp' or 'mptglu'"),
        ({"ffn_config": {"ffn_act_fn": {"name": "mish"}}}, r"ffn_config\.ffn_act_fn=.*'mish'"),
        ({"final_logit_softcapping": 30.0}, "capped"),
        ({"logit_scale": "sqrt"}, "logit_scale='sqrt' is not valid"),
        ({"no_bias": None}, "expected true or false"),
        ({"norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "keep the one that is meant"),
        ({"norm_type": "triton_rmsnorm"}, "norm_type='triton_rmsnorm'"),
        ({"residual_modification": "layer"}, "branches are scaled"),
    ],
)
def test_what_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(MPT_7B | changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "silu", "head": "none"}, "head='none'"),
        ({"attention_bias": True}, "attention_bias=True together"),
        ({"ffn_bias": True}, "attention_bias=False together"),
        ({"causal": False}, "causal=False"),
        ({"distance": "bfloat16"}, "distance='bfloat16'"),
        ({"embedding_norm": True}, "embedding_norm=True"),
        ({"norm_placement": "post", "final_norm": False}, "final_norm=False"),
        ({"slopes": "geometric"}, "slopes='geometric'"),
        ({"vocab_size": None}, "vocab_size=None"),
    ],
)
def test_what_it_cannot_express(fields: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(read(MPT_7B), **fields)
    with pytest.raises(CheckpointError, match=f"mpt cannot express {message}"):
        FAMILY.write_config(config)


def test_transformers_types() -> None:
    """Its configuration refuses an integer for a float and a float for an integer."""
    ours = read(STORYWRITER | {"logit_scale": 2})
    ours = dataclasses.replace(ours, bias_max=16.0, dropout=0.1, attention_dropout=0.0, qkv_clip=6)
    written = FAMILY.write_config(ours)
    assert None not in written["attn_config"].values()  # llm-foundry knows no kv_n_heads here
    config = MptConfig(**written)
    assert config.attn_config.clip_qkv == 6.0
    assert config.attn_config.alibi_bias_max == 16
    assert config.logit_scale == 2.0
