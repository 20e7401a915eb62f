"""Baichuan-13B folders compute what their published code computes; the rotary 7B are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.families import Source, baichuan
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.exports import assert_exported, draw, written
from parity_tests.families import export
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
    back = export(baichuan.FAMILY, checkpoint.config, checkpoint.tensors, tmp_path / "back")
    assert not open_checkpoint(back).folded  # an export is a Baichuan of the first generation
    original, written = dict(read_tensors(tmp_path / "float32")), read_tensors(back)
    if generation == 2:
        original["lm_head.weight"] = checkpoint.tensors["lm_head.weight"]
    assert set(written) == set(original)
    for name, array in original.items():
        assert_bitwise(written[name], array, name)


def test_export(tmp_path: Path) -> None:
    """From scratch: the published formula, without Baichuan2's head, reads what we write."""
    config = replace(read(SMALL), init_std=0.01)
    foreign = assert_exported(
        *(tmp_path, baichuan.FAMILY, config),
        lambda _, arrays: partial(forward, False, arrays),
        TOKENS[:, :40],
    )
    assert foreign == SMALL | {
        "architectures": ["BaichuanForCausalLM"],
        "hidden_act": "silu",
        "initializer_range": 0.01,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def large(rows: str) -> tuple[ALiBiConfig, dict[str, np.ndarray]]:
    """A vocabulary that is read as Baichuan2's, with rows of any length or of length one."""
    config = replace(read(SMALL), num_layers=1, vocab_size=125696)
    arrays = draw(config)
    if rows == "unit":
        source = Source(baichuan.FAMILY.write_config(config), Tensors({}))
        (fold,) = baichuan.FAMILY.folds(config, source)
        arrays["lm_head.weight"] = fold.compute(arrays["lm_head.weight"])
    return config, arrays


@pytest.mark.parametrize("rows", ["unit", "any"])
def test_export_with_the_vocabulary_of_baichuan2(tmp_path: Path, rows: str) -> None:
    """Every reader scales the rows of its head: only those of length one say what they are."""
    config, arrays = large(rows)
    ours = written(tmp_path / "ours", config, arrays)
    if rows == "any":
        message = r"baichuan cannot express lm_head\.weight: .* rows scaled to length 1"
        with pytest.raises(CheckpointError, match=message):
            convert(ours, tmp_path / "theirs", to="baichuan", verify="none")
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]
        return
    convert(ours, tmp_path / "theirs", to="baichuan", verify="bits")
    found = open_checkpoint(tmp_path / "theirs")
    assert list(found.folded) == ["lm_head.weight"]
    assert_bitwise(found.tensors["lm_head.weight"], arrays["lm_head.weight"], "lm_head.weight")


def test_what_returns_has_no_z_loss(tmp_path: Path) -> None:
    """It would make the export a Baichuan2, whose head is scaled when it is read."""
    source = write(tmp_path, SMALL | {"z_loss_weight": 0, "eos_token_id": 2}, np.float32)
    convert(source, tmp_path / "ours", verify="none")
    convert(tmp_path / "ours", tmp_path / "back", to="baichuan", verify="bits")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert ("z_loss_weight" in values, values["eos_token_id"]) == (False, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_embeddings": True}, "tie_embeddings=True; it has False always"),
        ({"attention_bias": True}, "attention_bias=True; it has False always"),
        ({"ffn_bias": True}, "ffn_bias=True"),
        ({"gated_ffn": False}, "gated_ffn=False"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"num_kv_heads": 5}, "num_kv_heads=5"),
        ({"slopes": (0.5,) * 10}, "slopes="),
        ({"bias_max": 16.0}, "bias_max=16.0"),
        ({"causal": False}, "causal=False"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"logit_scale": 2.0}, "logit_scale=2.0"),
    ],
)
def test_what_it_cannot_express(fields: dict[str, Any], message: str) -> None:
    config = replace(read(SMALL), **fields)
    with pytest.raises(CheckpointError, match=f"baichuan cannot express {message}"):
        baichuan.FAMILY.write_config(config)


def test_widths_and_dropouts() -> None:
    """A width that divides evenly is written as a number; dropout has no place in the file."""
    config = replace(read(SMALL), expansion_factor=3, feed_forward_dim=None)
    values = baichuan.FAMILY.write_config(replace(config, dropout=0.2, embedding_dropout=0.1))
    assert values["intermediate_size"] == 120
    assert read(values) == config


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
