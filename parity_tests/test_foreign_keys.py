"""Keys of foreign configurations: what changes nothing is read past, the rest refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, open_checkpoint, plan
from alibi_convert.families import FAMILIES, Source
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.checkpoints import edit
from parity_tests.compare import assert_bitwise
from parity_tests.families import redraw
from parity_tests.test_family_baichuan import BAICHUAN_13B
from parity_tests.test_family_bloom import BLOOM_560M
from parity_tests.test_family_btlm import BTLM_3B
from parity_tests.test_family_conversion import IDS, SIZES, published
from parity_tests.test_family_falcon import FALCON_RW_1B
from parity_tests.test_family_jina import JINA_BASE_EN
from parity_tests.test_family_mosaicbert import MOSAIC_BERT_BASE
from parity_tests.test_family_mpt import MPT_7B, REPLIT

PUBLISHED: dict[str, dict[str, Any]] = {
    "baichuan": json.loads(BAICHUAN_13B),
    "bloom": BLOOM_560M,
    "btlm": json.loads(BTLM_3B),
    "falcon": FALCON_RW_1B,
    "jina": json.loads(JINA_BASE_EN),
    "mosaicbert": json.loads(MOSAIC_BERT_BASE),
    "mpt": MPT_7B,
}
_LAYER = "bert.encoder.layer.0"
_TELLING = {  # names by which the families of BERTs are told apart
    "jina": (f"{_LAYER}.attention.self.query.weight", f"{_LAYER}.mlp.gated_layers.weight"),
    "mosaicbert": (f"{_LAYER}.attention.self.Wqkv.weight",),
}
# What `PretrainedConfig().to_dict()` of transformers 4 says of every model.
TRANSFORMERS_4: dict[str, Any] = {
    "_attn_implementation_autoset": False,
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "model_type": "",
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.46.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# What MptForCausalLM.save_pretrained of transformers 4.32 and later writes for mosaicml/mpt-7b.
NATIVE_MPT: dict[str, Any] = {
    "architectures": ["MptForCausalLM"],
    "attn_config": {"model_type": ""},
    "d_model": 4096,
    "emb_pdrop": 0.0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_device": "cpu",
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
LLM_FOUNDRY_2025: dict[str, Any] = {
    "attention_bias": False,
    "final_logit_softcapping": None,
    "head_dim": None,
    "residual_coeff": None,
    "residual_modification": None,
}


def read(family: str, config: dict[str, Any], *ignored: str) -> ALiBiConfig:
    tensors = Tensors.of({name: np.zeros(1) for name in _TELLING.get(family, ())})
    source = Source(config, tensors, frozenset(ignored))
    found = next(each for each in FAMILIES if each.recognises(source))
    assert found.name == family
    return found.read_config(source)


def attention(**changes: Any) -> dict[str, Any]:
    return {"attn_config": MPT_7B["attn_config"] | changes}


@pytest.mark.parametrize("family", PUBLISHED)
def test_all_keys_of_transformers_4(family: str) -> None:
    config = PUBLISHED[family]
    assert read(family, TRANSFORMERS_4 | config) == read(family, config)
    if family == "mpt":
        nested = attention(**TRANSFORMERS_4)
        assert read(family, TRANSFORMERS_4 | config | nested) == read(family, config)


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_tools_add(family: str) -> None:
    """Trainers, converters and loaders leave their marks in published configurations."""
    config = PUBLISHED[family]
    added = {
        "_attn_implementation": "sdpa",
        "_attn_implementation_internal": None,
        "activation_dropout": 0.0,
        "dropout": 0.0,  # DeepSpeed-Chat
        "end_token_id": 2,
        "quantization_config": None,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_fixed": True,
        "unsloth_version": "2024.9",
    }
    assert read(family, config | added) == read(family, config)


@pytest.mark.parametrize(
    "config",
    [
        NATIVE_MPT,
        NATIVE_MPT | {"attn_config": None},
        {name: value for name, value in NATIVE_MPT.items() if name != "attn_config"},
        NATIVE_MPT | {"attn_config": {**TRANSFORMERS_4, "attn_type": "multihead_attention"}},
        MPT_7B | LLM_FOUNDRY_2025 | attention(nope=False, head_dim=None),
        MPT_7B | LLM_FOUNDRY_2025 | {"head_dim": 128} | attention(head_dim=128),
        MPT_7B | attention(attn_temperature_tuning={"floor_scale": 8192, "attn_scale": 0.0}),
        MPT_7B | attention(attn_temperature_tuning=None),
    ],
)
def test_mpt_by_other_hands(config: dict[str, Any]) -> None:
    """transformers' MPT has ALiBi where nothing is said; llm-foundry names what is off."""
    assert read("mpt", config) == read("mpt", MPT_7B)


def test_replit_by_its_own_name() -> None:
    assert read("mpt", REPLIT | {"model_type": "replit_lm"}) == read("mpt", REPLIT)


def test_attention_biases_are_there_anyway() -> None:
    config = MPT_7B | {"no_bias": False}
    assert read("mpt", config | {"attention_bias": True}) == read("mpt", config)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bloom", {"add_cross_attention": True}, "add_cross_attention=True .* no encoder"),
        ("bloom", {"pruned_heads": {"0": [1]}}, "pruned_heads=.* different heads"),
        ("bloom", {"quantization_config": {"bits": 4}}, "the weights are quantised; save them deq"),
        ("falcon", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("mosaicbert", {"is_decoder": True}, "is_decoder=True"),
        ("mpt", {"attention_bias": True}, "attention_bias=True together with no_bias=True"),
        ("mpt", {"head_dim": 64}, "head_dim=64 cannot be honoured"),
        ("mpt", attention(head_dim=64), "head_dim=64 cannot be honoured"),
        ("mpt", attention(nope=True), r"attn_config\.nope=True"),
        (
            "mpt",
            attention(add_cross_attention=True),
            r"not known: attn_config\.add_cross_attention",
        ),
        ("mpt", attention(pruned_heads={"0": [1]}), r"not known: attn_config\.pruned_heads"),
        (
            "mpt",
            attention(attn_temperature_tuning={"floor_scale": 8192, "attn_scale": 0.1}),
            r"attn_config\.attn_temperature_tuning\.attn_scale=0\.1 .* by their position",
        ),
        (
            "mpt",
            attention(attn_temperature_tuning={"mystery": 1}),
            r"not known: attn_config\.attn_temperature_tuning\.mystery",
        ),
        ("mpt", {"attn_config": {}}, r"attn_config\.alibi=False"),  # llm-foundry's own default
        ("mpt", {"initializer_range": 0.02, "attn_config": None}, r"attn_config\.alibi=False"),
        ("bloom", {"mystery": 1}, r"not known: mystery; .*ignore_keys=\(…\) \(--ignore-key NAME\)"),
    ],
)
def test_what_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(family, PUBLISHED[family] | changes)


def test_keys_that_nobody_knows_may_be_ignored() -> None:
    """But not those that say what is computed, whatever the caller's word."""
    config = BLOOM_560M | {"mystery": 1, "quantization_config": {"bits": 4}}
    assert read("bloom", config, "mystery", "quantization_config") == read("bloom", BLOOM_560M)
    with pytest.raises(CheckpointError, match="not known: mystery"):
        read("bloom", config, "quantization_config", "misspelt")
    config = MPT_7B | attention(mystery=1)
    assert read("mpt", config, "attn_config.mystery") == read("mpt", MPT_7B)
    config = MPT_7B | attention(prefix_lm=True)
    for name in ("attn_config.prefix_lm", "attn_config.alibi", "attn_config", "d_model"):
        with pytest.raises(CheckpointError, match=f"{name} .* cannot be ignored"):
            read("mpt", config, name)


def test_what_was_ignored_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "source", "bloom")
    edit(source, mystery={"depth": 7})
    readers: tuple[Callable[..., Any], ...] = (
        open_checkpoint,
        alibi_torch.ALiBiLM.from_pretrained,
        alibi_flax.from_pretrained,
        plan,
    )
    for read_it in readers:
        with pytest.raises(CheckpointError, match="not known: mystery"):
            read_it(source)
        read_it(source, ignore_keys=["mystery"])
    report = convert(source, tmp_path / "ours", ignore_keys=["mystery", "absent"])
    assert report.ignored == {"mystery": {"depth": 7}}
    assert report.verification["logits"]["against"] == "transformers' bloom"
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert record["ignored"] == report.ignored
    convert(tmp_path / "ours", tmp_path / "back", to="bloom")
    assert "mystery" not in json.loads((tmp_path / "back" / "config.json").read_text())

    assert main(["inspect", str(source)]) == 3
    assert "--ignore-key NAME" in capsys.readouterr().err
    for command in ("inspect", "plan"):
        assert main([command, str(source), "--ignore-key", "mystery"]) == 0
        assert "ignored: mystery={'depth': 7}" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["mpt", "falcon"])
def test_models_without_their_heads(tmp_path: Path, family: str) -> None:
    """MptModel and FalconModel write their tensors without the prefix."""
    name = family.title()
    config = getattr(transformers, f"{name}Config")(vocab_size=101, **SIZES[family], **IDS)
    model = redraw(getattr(transformers, f"{name}ForCausalLM")(config))
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "bare")
    whole, bare = (open_checkpoint(tmp_path / each) for each in ("whole", "bare"))
    assert bare.config == whole.config
    for key, array in whole.tensors.items():
        assert_bitwise(bare.tensors[key], array, key)
