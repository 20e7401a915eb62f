"""Baichuan-13B folders compute what their published code computes; the rotary 7B are refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Source, baichuan
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.peers import published
from parity_tests.peers.baichuan import SMALL, forward, shapes

BAICHUAN_13B = """{"_from_model_config": true, "architectures": ["BaichuanForCausalLM"],
"auto_map": {}, "bos_token_id": 1, "eos_token_id": 2, "gradient_checkpointing": false,
"hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13696,
"model_max_length": 4096, "model_type": "baichuan", "num_attention_heads": 40,
"num_hidden_layers": 40, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": true,
"vocab_size": 64000}"""
BAICHUAN2_13B = BAICHUAN_13B.replace("64000", "125696")
BAICHUAN2_7B = """{"architectures": ["BaichuanForCausalLM"], "auto_map": {}, "bos_token_id": 1,
"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 11008, "max_position_embeddings": 4096, "model_max_length": 4096,
"model_type": "baichuan", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
"rms_norm_eps": 1e-06, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"use_cache": true, "vocab_size": 125696, "z_loss_weight": 0}"""

TOKENS = np.random.default_rng(1).integers(0, 53, (3, published.SEQ))


def write(folder: Path, config: dict[str, Any], dtype: Any) -> Path:
    arrays = published.draw(shapes(), dtype)
    return published.write_folder(folder / np.dtype(dtype).name, config, arrays)


@pytest.mark.parametrize("generation", [1, 2])
def test_baichuan(tmp_path: Path, generation: int) -> None:
    config = SMALL | ({"z_loss_weight": 0} if generation == 2 else {})
    arrays = published.draw(shapes())
    published.assert_same(
        partial(write, tmp_path, config), partial(forward, generation == 2, arrays), TOKENS
    )
    checkpoint = open_checkpoint(tmp_path / "float32")
    assert checkpoint.family == "baichuan"
    assert list(checkpoint.folded) == (["lm_head.weight"] if generation == 2 else [])


def test_rows_of_the_head() -> None:
    """Of length one, more rows than fit one block, rounded once; a row of zeros stays."""
    source = Source(json.loads(BAICHUAN2_13B), Tensors({}))
    (fold,) = baichuan.FAMILY.folds(baichuan.FAMILY.read_config(source), source)
    assert fold.foreign == {"lm_head.weight": (125696, 5120)}
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weight = np.random.default_rng(0).standard_normal((2**14 + 5, 3)).astype(dtype)
        weight[7] = 0
        exact = weight.astype(np.float64)
        length = np.sqrt((exact**2).sum(axis=1, keepdims=True))
        expected = np.divide(exact, length, where=length > 0, out=np.zeros_like(exact))
        assert_bitwise(fold.compute(weight), expected.astype(dtype), str(dtype))


def read(config: dict[str, Any], *names: str) -> ALiBiConfig:
    tensors = Tensors.of({name: np.ones(3) for name in names})
    return baichuan.FAMILY.read_config(Source(config, tensors))


@pytest.mark.parametrize(("text", "vocab_size"), [(BAICHUAN_13B, 64000), (BAICHUAN2_13B, 125696)])
def test_published_configurations(text: str, vocab_size: int) -> None:
    config = ALiBiConfig(
        num_layers=40,
        d_model=5120,
        num_heads=40,
        max_len=4096,
        dropout=0.0,
        vocab_size=vocab_size,
        tie_embeddings=False,
        attention_bias=False,
        ffn_bias=False,
        feed_forward_dim=13696,
        gated_ffn=True,
        activation="silu",
        norm="rms",
        norm_bias=False,
        norm_eps=1e-6,
    )
    values = json.loads(text)
    assert read(values) == config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    assert read({name: values[name] for name in sizes}) == config  # the rest are defaults
    for size in sizes:
        with pytest.raises(CheckpointError, match=f"has no {size}"):
            read({name: values[name] for name in sizes if name != size})
    has_norm_head = vocab_size == 125696
    source = Source(json.loads(text), Tensors({}))
    assert len(baichuan.FAMILY.folds(config, source)) == has_norm_head


def test_the_rotary_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Baichuan 7B.*max_position_embeddings"):
        read(json.loads(BAICHUAN2_7B))
    with pytest.raises(CheckpointError, match=r"Baichuan 7B.*rotary_emb\.inv_freq"):
        read(SMALL, "model.layers.0.self_attn.rotary_emb.inv_freq")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"quantization_config": {}}, "the weights are quantised; save them dequantised"),
    ],
)
def test_what_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(SMALL | change)
