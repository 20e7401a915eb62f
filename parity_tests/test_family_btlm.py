"""BTLM and JAIS folders compute what their published code computes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_cli.main import main
from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import Family, Source, btlm
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, model_slopes
from parity_tests.compare import assert_bitwise
from parity_tests.exports import assert_exported
from parity_tests.families import export, read_config
from parity_tests.peers import published
from parity_tests.peers.btlm import forward, shapes
from parity_tests.peers.published import Arrays

BTLM_3B = """{"_name_or_path": "cerebras/btlm-3b-8k-base", "activation_function": "swiglu",
"architectures": ["BTLMLMHeadModel"], "attn_pdrop": 0.0, "auto_map": {}, "bos_token_id": 50256,
"embd_pdrop": 0.0, "eos_token_id": 50256, "initializer_range": 0.073, "layer_norm_epsilon": 1e-05,
"model_type": "btlm", "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.2200000000000003,
"mup_scale_qk_dot_by_d": true, "mup_width_scale": 0.1, "n_embd": 2560, "n_head": 32,
"n_inner": 6826, "n_layer": 32, "n_positions": 8192, "pad_token_id": 50256,
"position_embedding_type": "alibi", "reorder_and_upcast_attn": false, "resid_pdrop": 0.0,
"scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true, "torch_dtype": "bfloat16",
"transformers_version": "4.30.0", "use_cache": true, "vocab_size": 50257}"""

JAIS_13B = """{"activation_function": "swiglu", "architectures": ["JAISLMHeadModel"],
"attn_pdrop": 0.0, "auto_map": {}, "bos_token_id": 0, "embd_pdrop": 0.0, "embeddings_scale": 14.6,
"eos_token_id": 0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "jais",
"n_embd": 5120, "n_head": 40, "n_inner": 13653, "n_layer": 40, "n_positions": 2048,
"pad_token_id": 0, "position_embedding_type": "alibi", "reorder_and_upcast_attn": false,
"resid_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true,
"scale_qk_dot_by_d": true, "torch_dtype": "float32", "use_cache": true, "vocab_size": 84992,
"width_scale": 0.11100000000000002}"""

SMALL: dict[str, Any] = {
    "model_type": "btlm",
    "position_embedding_type": "alibi",
    "vocab_size": 53,
    "n_positions": 64,
    "n_embd": 30,
    "n_layer": 2,
    "n_head": 5,
    "n_inner": 44,
    "activation_function": "swiglu",
    "mup_embeddings_scale": 3.5,
    "mup_output_alpha": 2.2,
    "mup_width_scale": 0.3,
    "mup_scale_qk_dot_by_d": True,
}
TOKENS = np.random.default_rng(1).integers(0, 53, (3, published.SEQ))


SLOPES = "transformer.relative_pe.slopes"
SCRATCH = ALiBiConfig(
    num_layers=2,
    d_model=30,
    num_heads=5,
    vocab_size=53,
    expansion_factor=4,
    activation="silu",
    gated_ffn=True,
    embedding_scale=3.5,
    logit_scale=0.66,
)


def check(
    tmp_path: Path,
    config: dict[str, Any],
    slopes: np.ndarray,
    extra: Arrays | None = None,
    is_padded: bool = True,
) -> None:
    def write(dtype: Any) -> Path:
        arrays = published.draw(shapes(config), dtype) | (extra or {})
        return published.write_folder(tmp_path / np.dtype(dtype).name, config, arrays)

    arrays = published.draw(shapes(config))
    published.assert_same(
        write, partial(forward, config, slopes, arrays), TOKENS, is_padded=is_padded
    )


def test_btlm(tmp_path: Path) -> None:
    """With the buffers of its files, which are not carried over."""
    buffers = {
        "transformer.relative_pe.slopes": published.slopes(5).astype(np.float32)[:, None],
        "transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.uint8)),
        "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    check(tmp_path, SMALL, published.slopes(5), buffers)
    checkpoint = open_checkpoint(tmp_path / "float32")
    assert checkpoint.family == "btlm"
    assert set(checkpoint.derived) == set(buffers)
    assert checkpoint.config.slopes == "paper"
    back = export(btlm.BTLM, checkpoint.config, checkpoint.tensors, tmp_path / "back")
    original, returned = read_tensors(tmp_path / "float32"), read_tensors(back)
    assert set(original) - set(returned) == set(buffers) - {SLOPES}  # the masks
    for name, array in returned.items():
        assert_bitwise(array, original[name], name)
    values = read_config(back)
    factor = values["mup_output_alpha"] * values["mup_width_scale"]
    assert factor == SMALL["mup_output_alpha"] * SMALL["mup_width_scale"]
    for name in SMALL.keys() - {"mup_output_alpha", "mup_width_scale"}:
        assert values[name] == SMALL[name], name


def test_jais(tmp_path: Path) -> None:
    """The older names, an untied head, no SwiGLU, and slopes divided by a factor."""
    config = {
        **{name: value for name, value in SMALL.items() if not name.startswith("mup_")},
        "model_type": "jais",
        "n_embd": 24,
        "n_head": 3,
        "n_inner": None,
        "activation_function": "gelu_new",
        "embeddings_scale": 4.5,
        "width_scale": 0.7,
        "tie_word_embeddings": False,
        "alibi_scaling": {"type": "linear", "factor": 2.5},
    }
    slopes = published.slopes(3).astype(np.float32) / np.float32(2.5)
    check(tmp_path, config, slopes.astype(np.float64))
    checkpoint = open_checkpoint(tmp_path / "float32")
    assert checkpoint.family == "jais"
    back = export(btlm.JAIS, checkpoint.config, checkpoint.tensors, tmp_path / "back")
    original, returned = read_tensors(tmp_path / "float32"), read_tensors(back)
    assert_bitwise(returned[SLOPES], slopes[:, None], "slopes")  # divided already
    assert set(returned) == {*original, SLOPES}
    for name, array in original.items():
        assert_bitwise(returned[name], array, name)
    values = read_config(back)
    assert "alibi_scaling" not in values
    for name in config.keys() - {"alibi_scaling", "n_inner"}:
        assert values[name] == config[name], name
    assert values["n_inner"] == 4 * config["n_embd"]


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        (
            btlm.BTLM,
            {"attention_scale": 1 / 6, "slopes": "geometric", "tie_embeddings": False},
            {"mup_scale_qk_dot_by_d": True, "activation_function": "swiglu", "n_inner": 120},
        ),
        (
            btlm.BTLM,
            {"activation": "gelu_tanh", "gated_ffn": False, "bias_max": 4.0, "dropout": 0.2},
            {"mup_scale_qk_dot_by_d": False, "activation_function": "gelu_new"},
        ),
        (
            btlm.JAIS,
            {"attention_scale": 1 / 6, "slopes": (0.5, 0.25, 0.1, 0.3, 0.7), "logit_scale": 0.3},
            {"scale_qk_dot_by_d": True, "embeddings_scale": 3.5, "width_scale": 0.3},
        ),
    ],
)
def test_export(
    tmp_path: Path, family: Family, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """From scratch: the published formula, with the slopes of the file, reads what we write."""
    config = replace(SCRATCH, **fields)
    exact = replace(config, slopes=tuple(model_slopes(config)[0].tolist()), bias_max=8.0)

    def formula(foreign: dict[str, Any], arrays: Arrays) -> partial[np.ndarray]:
        return partial(forward, foreign, arrays[SLOPES][:, 0], arrays)

    foreign = assert_exported(tmp_path, family, exact, formula, TOKENS[:, :40])
    assert foreign | expected == foreign
    assert foreign == json.loads(json.dumps(family.write_config(config))) | {"dtype": "float32"}
    assert foreign["position_embedding_type"] == "alibi"
    assert "alibi_scaling" not in foreign
    assert (
        ("mup_width_scale" in foreign) == ("mup_output_alpha" in foreign) == (family is btlm.BTLM)
    )


def test_export_of_interpolated_slopes() -> None:
    """The published code takes a mapping of two keys."""
    config = replace(SCRATCH, slope_interpolation=96)
    for family in btlm.FAMILIES:
        foreign = family.write_config(config)
        assert foreign["alibi_scaling"] == {"type": "linear", "train_seq_len": 96}
        assert family.read_config(Source(foreign, Tensors({}))) == config


def test_unscaled_attention_is_written() -> None:
    foreign = btlm.BTLM.write_config(replace(SCRATCH, attention_scale=1.0))
    assert foreign["scale_attn_weights"] is False
    assert read(foreign).attention_scale == 1.0


@pytest.mark.parametrize("family", btlm.FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_scale": 0.3}, "attention_scale=0.3 together"),
        ({"slopes": "learned"}, "slopes='learned'; it has"),
        ({"slopes": ((0.5,) * 5, (0.25,) * 5)}, "slopes="),
        ({"activation": "relu"}, r"activation=\('relu', True\): expected"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"norm_bias": False}, "norm_bias=False"),
        ({"num_kv_heads": 1}, "num_kv_heads=1"),
        ({"embedding_norm": True}, "embedding_norm=True"),
        ({"causal": False}, "causal=False"),
        ({"distance": "signed"}, "distance='signed'"),
        ({"vocab_size": None}, "vocab_size=None"),
    ],
)
def test_what_it_cannot_express(family: Family, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{family.name} cannot express {message}"):
        family.write_config(replace(SCRATCH, **fields))


def test_there_and_back_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both backends run what is written; ids of special tokens return, old factors do not."""
    config = SMALL | {"model_type": "jais", "eos_token_id": 2}
    arrays = published.draw(shapes(config), np.float32)
    source = published.write_folder(tmp_path / "source", config, arrays)
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(source), ours, "--verify", "bits"]) == 0
    assert main(["convert", ours, back, "--to", "jais"]) == 0
    assert "outputs against alibi_torch: alibi_flax " in capsys.readouterr().out
    assert main(["inspect", back]) == 0
    assert "ALiBiLM, jais (folder)" in capsys.readouterr().out
    values = read_config(tmp_path / "back")
    assert (values["eos_token_id"], values["model_type"]) == (2, "jais")
    assert not [name for name in values if name.startswith("mup_")]
    assert main(["plan", ours, "--to", "bloom"]) == 3
    assert "bloom cannot express" in capsys.readouterr().out


def test_slopes_of_long_sequences(tmp_path: Path) -> None:
    """Sequences of twice the trained length halve the slopes, padding counted."""
    config = SMALL | {"alibi_scaling": {"type": "linear", "train_seq_len": published.SEQ // 2}}
    check(tmp_path, config, published.slopes(5) / 2, is_padded=False)


def test_stored_slopes(tmp_path: Path) -> None:
    """A file of 16 bits holds rounded slopes, and the published code computes with those."""
    stored = published.slopes(10).astype(np.float16)  # 2^-½ among them, no number of 16 bits
    assert (stored != published.slopes(10)).any()
    extra = {"transformer.relative_pe.slopes": stored[:, None]}
    check(tmp_path, SMALL | {"n_head": 10}, stored.astype(np.float64), extra)


def test_bare_names_and_a_copy_of_the_head(tmp_path: Path) -> None:
    arrays = published.draw(shapes(SMALL), np.float32)
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    head = {"lm_head.weight": arrays["transformer.wte.weight"]}
    folder = published.write_folder(tmp_path / "bare", SMALL, bare | head)
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" in checkpoint.derived
    value = arrays["transformer.h.1.attn.c_attn.weight"][:, 60:].T
    assert_bitwise(checkpoint.tensors["transformer.layers.1.attn.value.weight"], value, "value")


def read(config: dict[str, Any], **arrays: np.ndarray) -> ALiBiConfig:
    named = {name.replace("__", "."): array for name, array in arrays.items()}
    return btlm.BTLM.read_config(Source(config, Tensors.of(named)))


def test_published_configurations() -> None:
    base = ALiBiConfig(
        dropout=0.0, attention_dropout=0.0, gated_ffn=True, activation="silu", expansion_factor=4
    )
    assert read(json.loads(BTLM_3B)) == replace(
        base,
        num_layers=32,
        d_model=2560,
        num_heads=32,
        max_len=8192,
        vocab_size=50257,
        feed_forward_dim=6826,
        init_std=0.073,
        attention_scale=1 / 80,
        embedding_scale=14.6,
        logit_scale=0.1 * 2.2200000000000003,
    )
    assert read(json.loads(JAIS_13B)) == replace(
        base,
        num_layers=40,
        d_model=5120,
        num_heads=40,
        max_len=2048,
        vocab_size=84992,
        feed_forward_dim=13653,
        attention_scale=1 / 128,
        embedding_scale=14.6,
        logit_scale=0.11100000000000002,
    )


def test_defaults() -> None:
    """Absent keys take the family's defaults, which are GPT-2's; sizes have none."""
    sizes = {"vocab_size": 53, "n_embd": 30, "n_layer": 2, "n_head": 5}
    required = sizes | {"position_embedding_type": "alibi"}
    assert read(required) == ALiBiConfig(
        num_layers=2,
        d_model=30,
        num_heads=5,
        max_len=1024,
        vocab_size=53,
        expansion_factor=4,
        activation="gelu_tanh",
        embedding_dropout=0.1,
        attention_dropout=0.1,
    )
    for size in sizes:
        with pytest.raises(CheckpointError, match=f"has no {size}"):
            read({name: value for name, value in required.items() if name != size})


def test_unscaled_attention() -> None:
    assert read(SMALL | {"scale_attn_weights": False}).attention_scale == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"activation_function": "tanh"}, "activation_function='tanh'.*swiglu"),
        ({"alibi_scaling": {"type": "ntk", "factor": 2.0}}, "alibi_scaling.type='ntk'"),
        ({"alibi_scaling": {"type": "linear", "factor": 0}}, "alibi_scaling.factor=0"),
        (
            {"alibi_scaling": {"type": "linear", "factor": 2.0, "train_seq_len": 9}},
            "both factor and train_seq_len",
        ),
        ({"alibi_scaling": 2}, "alibi_scaling in config.json is a int"),
        ({"rope_theta": 1e4}, "not known: rope_theta"),
        ({"n_head": 7}, "num_heads=7 does not divide"),
        ({"n_head": 0}, "num_heads=0 is not valid"),
    ],
)
def test_what_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(SMALL | change)


def test_slopes_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"holds 3 slopes.*5 heads"):
        read(SMALL, transformer__relative_pe__slopes=np.ones((3, 1), np.float32))
    with pytest.raises(CheckpointError, match=r"relative_pe\.slopes: slopes="):
        read(SMALL, transformer__relative_pe__slopes=np.full((5, 1), -1, np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"mup_scale_qk_dot_by_d": "false"},
        {"scale_attn_weights": 0},
        {"mup_width_scale": True},
        {"alibi_scaling": {"type": "linear", "factor": True}},
        {"alibi_scaling": {"type": "linear", "factor": 1.0, "train_seq_len": 64}},
    ],
)
def test_values_of_another_type(change: dict) -> None:
    """A string is not false, true is not one, and a factor of one is a factor."""
    with pytest.raises(CheckpointError, match=r"expected|true or false"):
        read(SMALL | change)
