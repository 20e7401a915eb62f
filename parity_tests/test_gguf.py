"""GGUF both ways: what llama.cpp's files say, element by element, and what cannot be said.

gguf's own reader and writer are the other side; clients/test_llama_cpp.py runs the files.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, load_tokenizer, open_checkpoint, plan
from alibi_convert.formats.gguf_file import read_gguf, write_gguf
from alibi_convert.formats.gguf_tokenizer import companions
from alibi_convert.rules import canonical_tensors
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests import test_family_bloom, test_family_mpt
from parity_tests.cases import draw_parameters
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.families import arrays_of, assert_same_logits, our_logits, peer_logits
from parity_tests.gguf_files import (
    CONFIGS,
    ENCODERS,
    NAMES,
    OF_BERT,
    TEXTS,
    WORDS,
    folder,
    of_roberta,
    unsaid,
    wordpiece,
    write_by_gguf,
)
from parity_tests.peers import encoders, jina, published

LIMIT = BUDGETS["float32", "cpu"].forward
MASKS = {"bert": "[MASK]", "gpt2": "<mask>"}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# llama.cpp's names, by ours; {i} is a layer.
TENSORS = {
    "token_embd": "token_embedding",
    "token_embd_norm": "embedding_norm",
    "blk.{i}.attn_norm": "transformer.layers.{i}.attn_norm",
    "blk.{i}.attn_output": "transformer.layers.{i}.attn.output",
    "blk.{i}.ffn_norm": "transformer.layers.{i}.ffn_norm",
    "blk.{i}.ffn_up": "transformer.layers.{i}.ffn.fc1",
    "blk.{i}.ffn_gate": "transformer.layers.{i}.ffn.gate",
    "blk.{i}.ffn_down": "transformer.layers.{i}.ffn.fc2",
    "output_norm": "transformer.final_norm",
    "output": "lm_head",
}
OF_ENCODERS = {
    name: ours for name, ours in TENSORS.items() if not name.endswith(("attn_norm", "ffn_norm"))
} | {
    "token_types": "token_type_embedding",
    "blk.{i}.attn_q_norm": "transformer.layers.{i}.attn.query_norm",
    "blk.{i}.attn_k_norm": "transformer.layers.{i}.attn.key_norm",
    "blk.{i}.attn_output_norm": "transformer.layers.{i}.attn_norm",
    "blk.{i}.layer_output_norm": "transformer.layers.{i}.ffn_norm",
}
OF_TWICE_NORMALISED = OF_ENCODERS | {
    "blk.{i}.attn_output_norm": "transformer.layers.{i}.attn_output_norm",
    "blk.{i}.attn_norm_2": "transformer.layers.{i}.attn_norm",
}
ALWAYS_FLOAT32 = ("token_types.weight", "token_type_embedding.weight")
PROJECTIONS = ("query", "key", "value")
SAID: dict[str, dict[str, Any]] = {
    "bloom": {
        **{"vocab_size": 420, "context_length": 256, "embedding_length": 48, "block_count": 2},
        **{"feed_forward_length": 192, "attention.head_count": 6, "attention.head_count_kv": 6},
        "attention.layer_norm_epsilon": float(np.float32(1e-5)),
    },
    "mpt, clipped and grouped": {
        **{"vocab_size": 420, "context_length": 256, "embedding_length": 48, "block_count": 2},
        **{"feed_forward_length": 192, "attention.head_count": 6, "attention.head_count_kv": 2},
        "attention.layer_norm_epsilon": float(np.float32(1e-5)),
        **{"attention.max_alibi_bias": 6.0, "attention.clamp_kqv": 0.5},
    },
    "jais": {
        **{"vocab_size": 420, "context_length": 256, "embedding_length": 48, "block_count": 2},
        **{"feed_forward_length": 192, "attention.head_count": 6, "attention.head_count_kv": 6},
        "attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "attention.max_alibi_bias": 8.0,
    },
    "baichuan": {
        **{"vocab_size": 420, "context_length": 256, "embedding_length": 24, "block_count": 40},
        **{"feed_forward_length": 96, "attention.head_count": 6, "attention.head_count_kv": 6},
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    },
    "jina-bert-v2": {
        **{"vocab_size": 420, "context_length": 256, "embedding_length": 48, "block_count": 2},
        **{"feed_forward_length": 192, "attention.head_count": 6, "attention.head_count_kv": 6},
        "attention.layer_norm_epsilon": float(np.float32(1e-12)),
        **{"attention.causal": False, "pooling_type": 1},
    },
}


def expected_arrays(config: ALiBiConfig) -> dict[str, np.ndarray]:
    """The tensors of a file, put together here a second time."""
    parameters, found = draw_parameters(config), {}
    encoder = OF_TWICE_NORMALISED if config.attention_output_norm else OF_ENCODERS
    for kind in ("weight", "bias"):
        for theirs, ours in (TENSORS if config.causal else encoder).items():
            for i in range(config.num_layers if "{i}" in ours else 1):
                name = f"{ours}.{kind}".replace("{i}", str(i))
                if name in parameters:
                    found[f"{theirs}.{kind}".replace("{i}", str(i))] = parameters[name]
        for i in range(config.num_layers):
            names = [f"transformer.layers.{i}.attn.{each}.{kind}" for each in PROJECTIONS]
            parts = [parameters[name] for name in names if name in parameters]
            if parts and (config.norm == "rms" or not config.causal):  # Baichuan, Jina
                each = zip("qkv", parts, strict=True)
                found |= {f"blk.{i}.attn_{letter}.{kind}": part for letter, part in each}
            elif parts:
                found[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
            if not config.causal and config.gated_ffn:
                halves = (found.pop(f"blk.{i}.ffn_{name}.{kind}") for name in ("gate", "up"))
                found[f"blk.{i}.ffn_up.{kind}"] = np.concatenate(list(halves))
    return found


def in_file(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor as a file of that dtype has it."""
    is_wide = array.ndim == 1 or name in ALWAYS_FLOAT32
    return array.astype(np.float32 if is_wide else DTYPES[dtype])


def read_by_gguf(path: Path) -> dict[str, np.ndarray]:
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = np.array(tensor.data)
        if tensor.tensor_type is gguf.GGMLQuantizationType.BF16:
            array = array.view(ml_dtypes.bfloat16)
        found[tensor.name] = array
        assert list(tensor.shape) == list(array.shape)[::-1]
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Baichuan's forty layers once.
    [(n, d) for n in CONFIGS for d in DTYPES if n != "baichuan" or d == "float16"]
    + list(zip(ENCODERS, DTYPES, strict=True)),
)
def test_tensors(name: str, dtype: str, tmp_path: Path) -> None:
    """Every element, and vectors in float32 whatever the matrices are in; back without a change."""
    config, file = (CONFIGS | ENCODERS)[name], tmp_path / "model.gguf"
    report = convert(write(tmp_path / "model", config=config), file, dtype=dtype, verify="bits")
    assert report.destination_format == "gguf"
    assert report.verified
    found, expected = read_by_gguf(file), expected_arrays(config)
    assert set(found) == set(expected)
    for tensor, array in expected.items():
        assert_bitwise(found[tensor], in_file(tensor, array, dtype), tensor)

    opened = open_checkpoint(file)
    assert opened.config == unsaid(config)
    assert opened.family == f"gguf-{name.split(',')[0]}"
    convert(file, tmp_path / "back", verify="bits")
    back = open_checkpoint(tmp_path / "back")
    assert back.config == unsaid(config)
    for parameter, array in draw_parameters(config).items():
        assert_bitwise(back.tensors[parameter], in_file(parameter, array, dtype), parameter)
    convert(tmp_path / "back", tmp_path / "again.gguf", verify="bits")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_what_metadata_says(tmp_path: Path) -> None:
    for name, said in SAID.items():
        architecture = name.split(",")[0]
        file = tmp_path / f"{architecture}.gguf"
        source = folder(tmp_path / architecture, (CONFIGS | ENCODERS)[name])
        convert(source, file, dtype="float16", verify="bits")
        fields = gguf.GGUFReader(file).fields
        found = {key: field.contents() for key, field in fields.items()}
        prefix = f"{architecture}."
        assert {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)} == said
        for key in said:
            wanted = {float: "FLOAT32", int: "UINT32", bool: "BOOL"}[type(said[key])]
            assert [each.name for each in fields[prefix + key].types] == [wanted], key
        assert found["general.architecture"] == architecture
        assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
        assert found["tokenizer.ggml.model"] == "gpt2"
        own = architecture in ("bloom", "mpt", "jais")
        assert found["tokenizer.ggml.pre"] == (architecture if own else "gpt-2")
        is_encoder = architecture == "jina-bert-v2"
        assert found.get("tokenizer.ggml.token_type_count") == (2 if is_encoder else None)
        types = dict(
            zip(*(found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type")), strict=True)
        )
        assert len(types) == len(found["tokenizer.ggml.token_type"]) == 420
        assert (types["<s>"], types["t"]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
        assert types["<|user|>"] == gguf.TokenType.USER_DEFINED
        assert types["[PAD419]"] == gguf.TokenType.UNUSED
        ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 3}
        assert {key: found[f"tokenizer.ggml.{key}_token_id"] for key in ids} == ids
        assert not found["tokenizer.ggml.add_bos_token"]


def as_their_converter(model: torch.nn.Module, heads: int) -> dict[str, np.ndarray]:
    """transformers' BLOOM or MPT as llama.cpp's convert_hf_to_gguf.py lays it out."""
    words = {
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.word_embeddings": "token_embd",
        "transformer.wte": "token_embd",
        "transformer.ln_f": "output_norm",
        "transformer.norm_f": "output_norm",
        "lm_head": "output",
        "transformer.h": "blk",
        "transformer.blocks": "blk",
        "input_layernorm": "attn_norm",
        "norm_1": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "attn.Wqkv": "attn_qkv",
        "self_attention.dense": "attn_output",
        "attn.out_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "norm_2": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "ffn.up_proj": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "ffn.down_proj": "ffn_down",
    }
    found = {}
    for name, array in arrays_of(model).items():
        if "query_key_value" in name:
            shape = (heads, 3, array.shape[0] // heads // 3, *array.shape[1:])
            parts = np.moveaxis(array.reshape(shape), 1, 0)
            array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        for theirs, theirs_there in words.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\1{theirs_there}", name)
        found[name] = array
    return found


def test_files_of_their_converter(tmp_path: Path) -> None:
    """Written by gguf from transformers' models; both backends compute what those do."""
    heads = 5
    size = {"embedding_length": 6 * heads, "feed_forward_length": 24 * heads, "block_count": 2}
    size |= {"context_length": 256, "attention.head_count": heads}
    size |= {"attention.head_count_kv": heads, "attention.layer_norm_epsilon": 1e-5}
    peers = {
        "bloom": (test_family_bloom.peer(heads), {}),
        "mpt": (test_family_mpt.peer(heads), {"attention.max_alibi_bias": 8.0}),
    }
    for name, (model, more) in peers.items():
        arrays = as_their_converter(model, heads)
        file = write_by_gguf(tmp_path / f"{name}.gguf", name, size | more, arrays)
        assert_same_logits(our_logits(file), peer_logits(model), LIMIT)
        destination = tmp_path / f"{name}-folder"
        convert(file, destination, to=name, verify="bits")  # transformers' own folder
        assert_same_logits(our_logits(destination), peer_logits(model), LIMIT)


def test_the_other_keys_of_their_converter(tmp_path: Path) -> None:
    """JAIS without heads of keys; Baichuan with queries and keys ordered as for a rotation."""
    said = {"jais": dict(SAID["jais"]), "baichuan": dict(SAID["baichuan"])}
    arrays = {name: expected_arrays(CONFIGS[name]) for name in said}
    for values in said.values():
        del values["vocab_size"]
    del said["jais"]["attention.head_count_kv"]
    said["baichuan"] |= {"rope.dimension_count": 4, "tensor_data_layout": "Meta AI original pth"}
    for name, array in arrays["baichuan"].items():
        if re.search("attn_[qk]", name):
            rows = array.reshape(6, 2, 2, 24).swapaxes(1, 2)
            arrays["baichuan"][name] = rows.reshape(24, 24)
    tokens = np.random.default_rng(0).integers(0, 420, (1, 40))
    for name, values in said.items():
        file = write_by_gguf(tmp_path / f"{name}.gguf", name, values, arrays[name])
        found, config = open_checkpoint(file), CONFIGS[name]
        assert found.config == unsaid(config)
        exact = reference_forward(config, draw_parameters(config), tokens)["logits"]
        logits = reference_forward(found.config, found.tensors, tokens)["logits"]
        assert_within(logits, exact, BUDGETS["float64", "cpu"].forward, name)


def by_their_names(arrays: dict[str, np.ndarray], splits: bool) -> dict[str, np.ndarray]:
    """Jina's published tensors as llama.cpp's converter has them, which once split the halves."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.JINA_BERT_V2, 2)
    found = {}
    for name, array in arrays.items():
        parts = {name: array}
        if splits and "gated_layer" in name:
            first, second = np.split(array, 2)
            value_first = "up_gated_layer" in name
            stem = re.sub("(up_)?gated_layers?", "gated_layers", name).removesuffix(".weight")
            parts = {
                f"{stem}_v.weight": first if value_first else second,
                f"{stem}_w.weight": second if value_first else first,
            }
        for each, part in parts.items():
            theirs = names.get_name(each.removeprefix("bert."), try_suffixes=(".weight", ".bias"))
            assert theirs is not None
            found[theirs] = part.astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("kind", "splits"), [("geglu", False), ("geglu", True), ("original", False), ("qk-norm", True)]
)
def test_encoders_of_their_converter(kind: str, splits: bool, tmp_path: Path) -> None:
    """Jina's formulas, on tensors renamed by gguf's own table; the gate in one tensor or apart."""
    arrays = published.draw(jina.shapes(kind), np.float32)
    said: dict[str, Any] = {
        **{"context_length": 64, "embedding_length": 30, "block_count": 2},
        **{"feed_forward_length": 23, "attention.head_count": 5, "attention.causal": False},
        **{"attention.layer_norm_epsilon": 1e-12, "pooling_type": 2},
    }
    named = by_their_names(arrays, splits)
    found = open_checkpoint(write_by_gguf(tmp_path / "m.gguf", "jina-bert-v2", said, named))
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    for tokens in encoders.TOKENS:
        exact = jina.forward(kind, wide, tokens, np.zeros_like(tokens))
        hidden = reference_forward(found.config, found.tensors, tokens[None])["output"]
        assert_within(hidden[0], exact, BUDGETS["float64", "cpu"].forward, kind)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "softmax_scale": ("mpt", {"attention_scale": 0.3}, "mpt cannot express attention_scale=0.3"),
    "logit_scale": ("mpt", {"logit_scale": 0.5}, "mpt cannot express logit_scale=0.5; it would be"),
    "activation": ("mpt", {"activation": "relu"}, "mpt cannot express activation='relu'"),
    "qk_norm": ("mpt", {"qk_norm": True}, "mpt cannot express qk_norm=True"),
    "slopes": ("bloom", {"bias_max": 6.0}, "bloom cannot express bias_max=6.0"),
    "own slopes": ("mpt", {"slopes": (0.5,) * 6}, r"mpt cannot express slopes=\(0.5"),
    "learned": ("mpt", {"slopes": "learned"}, "mpt cannot express slopes='learned'"),
    "interpolation": ("mpt", {"slope_interpolation": 64}, "express slope_interpolation=64"),
    "gelu": ("bloom", {"activation": "gelu"}, "bloom cannot express activation='gelu'"),
    "encoder": ("mpt", {"causal": False}, "mpt cannot express causal=False"),
    "more digits": ("mpt", {"norm_eps": 1.00000001e-5}, "express norm_eps=1.00000001e-05"),
    "tied": ("jais", {"tie_embeddings": True}, "jais cannot express tie_embeddings=True"),
    "embedding_scale": ("jais", {"embedding_scale": 2.0}, "jais cannot express embedding_scale=2"),
    "shallow": ("baichuan", {"num_layers": 2}, "num_layers=2, and llama.cpp gives ALiBi only to a"),
    "no vocabulary": ("mpt", {"vocab_size": None}, "mpt cannot express vocab_size=None"),
    "a head": ("jina-bert-v2", {"head": "masked_lm"}, "v2 cannot express head='masked_lm'"),
    "reglu": ("jina-bert-v2", {"activation": "relu"}, "v2 cannot express activation='relu'"),
    "no types": ("jina-bert-v2", {"type_vocab_size": None}, "v2 cannot express type_vocab_size=No"),
    "no biases": ("jina-bert-v2", {"ffn_bias": False}, "v2 cannot express ffn_bias=False"),
    "decoder": ("jina-bert-v2", {"causal": True}, "v2 cannot express causal=True"),
    "keys": (
        "jina-bert-v2-twice-normalised",
        {"num_kv_heads": 2},
        "num_kv_heads=2 together with qk_norm, which llama.cpp lacks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_express(case: str, tmp_path: Path) -> None:
    name, changes, message = REFUSED[case]
    config = dataclasses.replace((CONFIGS | ENCODERS)[name], **changes)
    source = write(tmp_path / "model", config=config)
    with pytest.raises(CheckpointError, match=f"llama.cpp runs no such model:\n(.*\n)*.*{message}"):
        convert(source, tmp_path / "model.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    planned = plan(source, tmp_path / "model.gguf")
    assert not planned.possible
    assert re.search(message, planned.problems[0].cause)


def test_float64_needs_another_dtype(tmp_path: Path) -> None:
    source = write(tmp_path / "model", config=CONFIGS["mpt"], dtype=np.float64)
    with pytest.raises(CheckpointError, match=r"is float64, which llama\.cpp does not .*--dtype"):
        convert(source, tmp_path / "model.gguf")
    convert(source, tmp_path / "model.gguf", dtype="float32", verify="bits")


def test_models_of_several_dtypes(tmp_path: Path) -> None:
    """Both backends open them as they are, matrices beside wider vectors, or in the dtype asked."""
    config = CONFIGS["bloom"]
    source = write(tmp_path / "model", config=config)
    convert(source, tmp_path / "m.gguf", dtype="float16", verify="bits")
    stored = {
        name: array.astype(np.float16) if array.ndim > 1 else array
        for name, array in draw_parameters(config).items()
    }
    model = alibi_torch.ALiBiLM.from_pretrained(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        assert_bitwise(parameter.detach().numpy(), stored[name], name)
    narrow = alibi_torch.ALiBiLM.from_pretrained(tmp_path / "m.gguf", dtype=torch.float16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float16}
    module, params = alibi_flax.from_pretrained(tmp_path / "m.gguf")
    for name, array in canonical_tensors(params, config).items():
        assert_bitwise(array, stored[name], name)
    tokens = np.arange(40).reshape(2, 20)
    exact = reference_forward(config, stored, tokens)["logits"]
    limit = BUDGETS["float16", "cpu"].forward
    for logits in (
        model(torch.from_numpy(tokens)).detach().numpy(),
        np.asarray(module.apply({"params": params}, tokens)),
    ):
        assert_within(logits, exact, limit, "logits", dtype="float32")


# Tokenizers


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_tokenizers_come_back(name: str, tmp_path: Path) -> None:
    source, file = folder(tmp_path / "model", CONFIGS[name]), tmp_path / "model.gguf"
    report = convert(source, file, verify="bits")
    assert report.left_behind == []
    report = convert(file, tmp_path / "back", verify="bits")
    files = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert report.copied == files
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    expected, found = load_tokenizer(source), load_tokenizer(tmp_path / "back")
    inside = load_tokenizer(file)
    for text in TEXTS:
        assert inside.encode(text).ids == expected.encode(text).ids, text
        assert found.encode(text).ids == expected.encode(text).ids, text
        ids = expected.encode(text).ids
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(
            ids, skip_special_tokens=False
        )
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert NAMES.items() <= settings.items()
    convert(tmp_path / "back", tmp_path / "again.gguf", verify="bits")
    convert(file, tmp_path / "copy.gguf", verify="bits")
    assert convert(file, tmp_path / "alone.safetensors", verify="bits").left_behind == files
    for each in ("again", "copy"):
        assert (tmp_path / f"{each}.gguf").read_bytes() == file.read_bytes()

    alibi_torch.ALiBiLM.from_pretrained(file).save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "tokenizer.json").read_bytes()
    assert saved == (tmp_path / "back" / "tokenizer.json").read_bytes()


OF_ENCODERS_TOKENIZERS = {"bert": (wordpiece, OF_BERT, WORDS), "gpt2": (of_roberta, NAMES, TEXTS)}


def encoder_folder(path: Path, kind: str) -> Path:
    make, names, _ = OF_ENCODERS_TOKENIZERS[kind]
    source = write(path, config=ENCODERS["jina-bert-v2"])
    make().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(names | {"mask_token": MASKS[kind]}))
    return source


@pytest.mark.parametrize("kind", OF_ENCODERS_TOKENIZERS)
def test_tokenizers_of_encoders_come_back(kind: str, tmp_path: Path) -> None:
    source, file = encoder_folder(tmp_path / "model", kind), tmp_path / "model.gguf"
    convert(source, file, verify="bits")
    fields = gguf.GGUFReader(file).fields
    said = {key.removeprefix("tokenizer.ggml."): each.contents() for key, each in fields.items()}
    assert said["model"] == kind
    tokens, types = said["tokens"], said["token_type"]
    expected, back = load_tokenizer(source), tmp_path / "back"
    first, last = expected.encode("").ids
    keys = {"bert": ("bos", "seperator"), "gpt2": ("bos", "eos")}[kind]
    assert tuple(said[f"{key}_token_id"] for key in keys) == (first, last)
    mask = said["mask_token_id"]
    assert (tokens[mask], types[mask]) == (MASKS[kind], gguf.TokenType.CONTROL)
    if kind == "bert":
        pieces = {token: tokens[at] for token, at in expected.get_vocab().items()}
        assert (pieces["the"], pieces["##e"], pieces["[SEP]"]) == ("\u2581the", "e", "[SEP]")
    else:
        assert said["pre"] == "jina-v2-code"
    assert convert(file, back, verify="bits").left_behind == []
    settings = json.loads((back / "tokenizer_config.json").read_text())
    wanted = json.loads((source / "tokenizer_config.json").read_text())
    assert wanted.items() <= settings.items()
    for text in (*OF_ENCODERS_TOKENIZERS[kind][2], f"a  {MASKS[kind]} b"):
        found, exact = load_tokenizer(back).encode(text), expected.encode(text)
        assert found.ids == exact.ids, text
        assert load_tokenizer(file).encode(text).ids == exact.ids, text
        assert load_tokenizer(back).decode(found.ids) == expected.decode(exact.ids)
    convert(back, tmp_path / "again.gguf", verify="bits")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


OF_BERT_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "capitals": ({"normalizer": {"type": "BertNormalizer", "lowercase": False}}, "normalizer {"),
    "accents": (
        {"normalizer": lambda parts: {**parts, "strip_accents": False}},
        'has the normalizer {"type": "BertNormalizer"',
    ),
    "spaces": ({"pre_tokenizer": {"type": "Whitespace"}}, "has the pre_tokenizer {"),
    "nothing around": ({"post_processor": None}, "does not put a token before and one after"),
    "prefix": (
        {"model": lambda model: {**model, "continuing_subword_prefix": "@@"}},
        "has continuing_subword_prefix='@@'",
    ),
    "normalized": (
        {"added_tokens": lambda tokens: [{**tokens[0], "normalized": True}, *tokens[1:]]},
        "has the token '[UNK]' with normalized",
    ),
    "alike": (
        {"model": lambda model: {**model, "vocab": {**model["vocab"], "##[CLS]": 419}}},
        "has the token '##[CLS]', which is spelled like another",
    ),
    "a mark": (
        {"model": lambda model: {**model, "vocab": {**model["vocab"], "##\u2581x": 419}}},
        "has the token '##\u2581x', which is spelled like another",
    ),
}


@pytest.mark.parametrize("case", OF_BERT_PARTS)
def test_wordpiece_that_llama_cpp_does_not_have(case: str, tmp_path: Path) -> None:
    changes, message = OF_BERT_PARTS[case]
    source = encoder_folder(tmp_path / "model", "bert")
    change(source, **changes)
    with pytest.raises(CheckpointError, match=f"tokenizer.json .*{re.escape(message)}"):
        convert(source, tmp_path / "model.gguf")


def test_wordpiece_of_their_converter() -> None:
    """Special tokens at their usual places are not said; unknown places are damage."""
    tokens = [f"\u2581w{index}" for index in range(104)] + ["s"]
    named = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    types = [3 if index in named else 1 for index in range(105)]
    for index, token in named.items():
        tokens[index] = token
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "jina-v2-en"}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    found = Tokenizer.from_buffer(companions(metadata)["tokenizer.json"])
    assert found.encode("W7 w8s [MASK] x").ids == [101, 7, 8, 104, 103, 100, 102]
    with pytest.raises(CheckpointError, match="lacks the token before a text"):
        companions(metadata | {"tokenizer.ggml.unknown_token_id": 200})
    with pytest.raises(CheckpointError, match="105 tokens, 104 of them different"):
        companions(metadata | {"tokenizer.ggml.tokens": [*tokens[:-1], "\u2581w7"]})


def test_tokens_before_and_after_every_text(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", CONFIGS["mpt"])
    change(
        source,
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                token: {"id": token, "ids": [index], "tokens": [token]}
                for token, index in (("<s>", 1), ("</s>", 2))
            },
        },
    )
    settings = json.dumps(NAMES | {"chat_template": "{{ messages }}"})
    (source / "tokenizer_config.json").write_text(settings)
    convert(source, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == 1
    assert fields["tokenizer.ggml.add_eos_token"].contents() == 1
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    convert(tmp_path / "model.gguf", tmp_path / "back")
    for text in TEXTS:
        found = load_tokenizer(tmp_path / "back").encode(text).ids
        assert found == load_tokenizer(source).encode(text).ids
    single = json.loads((source / "tokenizer.json").read_text())["post_processor"]
    ids = {"</s>": {"id": "</s>", "ids": [3], "tokens": ["</s>"]}}
    change(source, post_processor={**single, "special_tokens": single["special_tokens"] | ids})
    with pytest.raises(CheckpointError, match="adds '</s>' to every text without calling it eos_t"):
        convert(source, tmp_path / "other.gguf")
    (source / "tokenizer_config.json").write_text(json.dumps(NAMES | {"bos_token": "<unk>"}))
    with pytest.raises(CheckpointError, match="adds '<s>' to every text without calling it bos_t"):
        convert(source, tmp_path / "other.gguf")


def change(source: Path, **changes: Any) -> None:
    """Edit tokenizer.json; a function changes what is there."""
    values = json.loads((source / "tokenizer.json").read_text())
    for name, value in changes.items():
        values[name] = value(values[name]) if callable(value) else value
    (source / "tokenizer.json").write_text(json.dumps(values))


def moved(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*tokens[:-1], {**tokens[-1], "id": 410}]


def strips(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**tokens[0], "lstrip": True}, *tokens[1:]]


UNKNOWN_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": {"type": "Unigram", "vocab": {}}}, "is of the kind Unigram"),
    "spaces before": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        'has the pre_tokenizer {"type": "ByteLevel", "add_prefix_space": true}',
    ),
    "another expression": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}},
        "has the pre_tokenizer",
    ),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, 'has the normalizer {"type": "Lowerc'),
    "words' ends": (
        {"model": lambda model: {**model, "end_of_word_suffix": "</w>"}},
        "has end_of_word_suffix='</w>'",
    ),
    "stripping": ({"added_tokens": strips}, "has the token '<unk>' with lstrip"),
    "another model's": (
        {"model": lambda model: {**model, "vocab": {**model["vocab"], "far": 420}}},
        "has the token 'far' at 420, and the model only 420 tokens",
    ),
    "twice": (
        {"model": lambda model: {**model, "vocab": {**model["vocab"], "near": 7}}},
        "has two tokens at 7",
    ),
    "elsewhere": (
        {"added_tokens": moved},
        "has the token '<|user|>' at 410, and its library puts it at 400; save the tokenizer again",
    ),
    "no merges": ({"model": lambda model: {**model, "merges": []}}, "has no merges"),
    "no model": ({"model": {}}, "is of the kind None"),
    "no list": ({"model": {"type": "BPE"}}, "is not a tokenizer"),
}


def test_tokenizers_without_an_end(tmp_path: Path) -> None:
    """llama.cpp would end every text at token 11, which may be a comma."""
    source = folder(tmp_path / "model", CONFIGS["mpt"])
    for settings in ({"bos_token": "<s>"}, {"eos_token": "of another"}):
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match="end every text at token 11; name one as eos_to"):
            convert(source, tmp_path / "model.gguf")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    convert(source, tmp_path / "model.gguf", verify="bits")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


@pytest.mark.parametrize("case", UNKNOWN_PARTS)
def test_tokenizers_that_llama_cpp_does_not_have(case: str, tmp_path: Path) -> None:
    changes, message = UNKNOWN_PARTS[case]
    source = folder(tmp_path / "model", CONFIGS["mpt"])
    change(source, **changes)
    with pytest.raises(CheckpointError, match=f"tokenizer.json {re.escape(message)}"):
        convert(source, tmp_path / "model.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    (problem,) = plan(source, tmp_path / "model.gguf").problems
    assert problem.stops
    assert f"tokenizer.json {message}" in problem.cause
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "model.gguf", verify="bits")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_tokenizers_that_are_not_rebuilt(tmp_path: Path) -> None:
    convert(folder(tmp_path / "model", CONFIGS["mpt"]), tmp_path / "model.gguf")
    contents = (tmp_path / "model.gguf").read_bytes()
    for old, new, reason in (
        (b"gpt2", b"rwkv", "of the kind 'rwkv'; only byte-level BPE and"),
        (b"\x03\0\0\0\0\0\0\0mpt\x15", b"\x03\0\0\0\0\0\0\0dbr\x15", "that splits by 'dbr'; known"),
    ):
        assert contents.count(old) == 1
        (tmp_path / "other.gguf").write_bytes(contents.replace(old, new))
        assert reason in open_checkpoint(tmp_path / "other.gguf").derived["tokenizer"]
        report = convert(tmp_path / "other.gguf", tmp_path / "out", overwrite=True)
        assert report.copied == []
        with pytest.raises(CheckpointError, match=r"other\.gguf holds no tokenizer that can be"):
            load_tokenizer(tmp_path / "other.gguf")


def test_what_becomes_of_one_is_run_by_its_library(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    convert(write(tmp_path / "model", config=CONFIGS["bloom"]), file, verify="bits")
    report = convert(file, tmp_path / "theirs", to="bloom")
    assert report.verification["logits"]["against"] == "transformers' bloom"


def test_special_tokens_without_a_spelling(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", CONFIGS["mpt"])
    (source / "generation_config.json").write_text('{"pad_token_id": 419}')
    settings = {name: token for name, token in NAMES.items() if name != "pad_token"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "model.gguf", verify="bits")
    convert(tmp_path / "model.gguf", tmp_path / "back", verify="bits")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    found = load_tokenizer(tmp_path / "back")
    assert generation["pad_token_id"] == found.token_to_id(settings["pad_token"]) == 419


def test_chat_templates_that_are_no_text(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", CONFIGS["mpt"])
    (source / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        convert(source, tmp_path / "model.gguf")


def test_tokenizers_with_values_of_other_types(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    tensors, metadata = read_gguf(path)
    held = {"model": "gpt2", "pre": "mpt", "tokens": ["a"], "token_type": [1], "merges": ["a a"]}
    for name, value, message in (
        ("tokens", "a", "no list of str"),
        ("token_type", ["a"], "no list of int"),
        ("merges", [1], "no list of str"),
        ("pre", [1], "holds no tokenizer that can be rebuilt"),
    ):
        of_tokenizer = {
            f"tokenizer.ggml.{key}": each for key, each in (held | {name: value}).items()
        }
        del metadata["general.architecture"]
        write_gguf(tmp_path / "other.gguf", "mpt", tensors, metadata | of_tokenizer)
        metadata["general.architecture"] = "mpt"
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path / "other.gguf")


# Damage


def file_of(tmp_path: Path, **options: Any) -> Path:
    convert(write(tmp_path / "model", config=CONFIGS["mpt"]), tmp_path / "m.gguf", **options)
    return tmp_path / "m.gguf"


def start_of(path: Path) -> int:
    """Where the tensors begin."""
    return gguf.GGUFReader(path).data_offset


def assert_refused(path: Path, message: str) -> None:
    for read in (open_checkpoint, alibi_torch.ALiBiLM.from_pretrained, alibi_flax.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.timeout(60)
def test_damaged_headers(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    healthy = path.read_bytes()
    huge = struct.pack("<Q", 2**62)
    for contents, message in (
        (b"GGML" + healthy[4:], "is truncated or not GGUF: it does not begin with GGUF"),
        (b"", "is truncated or not GGUF"),
        (healthy[:4] + b"\1" + healthy[5:], "it has version 1; expected 2 or 3"),
        (healthy[:4] + b"\0\0\0\3" + healthy[8:], "it is big-endian; convert it first"),
        (healthy[:8] + huge + healthy[16:], r"4,611,686,018,427,387,904 tensors are announced"),
        (healthy[:16] + huge + healthy[24:], r"4,611,686,018,427,387,904 keys are announced"),
        (healthy[:24] + huge + healthy[32:], "bytes are announced where"),
        (healthy.replace(b"mpt.vocab_size", b"mpt.vocab_sizf", 1), "keys that are not known: voc"),
        (healthy.replace(b"general.type", b"general.typ\xff", 1), "not GGUF: 'utf-8' codec"),
        (healthy.replace(b"\3\0\0\0\0\0\0\0mpt", b"\3\0\0\0\0\0\0\0mpx", 1), "architecture 'mpx'"),
        (healthy.replace(b"blk.0.ffn_up", b"blk.1.ffn_up", 1), r"blk\.1\.ffn_up.* is there twice"),
        (healthy.replace(b"blk.0.ffn_up", b"blk.2.ffn_up", 1), "1 tensors missing, 1 unexpected"),
    ):
        path.write_bytes(contents)
        assert_refused(path, message)
    path.write_bytes(healthy[:24] + struct.pack("<Q", 2**32) + healthy[32:])
    with path.open("ab") as file:
        file.truncate(2**34)  # nearly all of it holes
    assert_refused(path, "4,294,967,296 bytes are announced where 67,.* are left")
    for length in range(0, len(healthy), 997):
        path.write_bytes(healthy[:length])
        with pytest.raises(CheckpointError, match="is truncated or not GGUF"):
            open_checkpoint(path)


def test_damage_at_random(tmp_path: Path) -> None:
    """One clear error, or the values that gguf's own reader finds."""
    path = file_of(tmp_path)
    healthy, end = path.read_bytes(), start_of(path)
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(400):
        contents = bytearray(healthy)
        for _ in range(rng.integers(1, 3)):
            contents[rng.integers(0, end)] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(contents))
        try:
            found = open_checkpoint(path)
        except CheckpointError:
            continue
        opened += 1
        assert found.config.num_layers == 2
        expected = read_by_gguf(path)
        for name, array in found.tensors.items():
            if "attn." not in name:
                theirs = found.origins[name][0]
                assert_bitwise(array, expected[theirs], name)
    assert opened > 20


def test_quantised_tensors(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for kind in ("Q4_0", "Q8_0", "Q6_K"):
        quantised = gguf.GGMLQuantizationType[kind]
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "bloom")
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        data = np.zeros((256, 256 // block * size), np.uint8)
        writer.add_tensor("output_norm.weight", rows[0])
        writer.add_tensor("token_embd.weight", data, raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        message = rf"token_embd\.weight is {kind}, which is quantised .*; take .* F32, F16 or BF16"
        assert_refused(tmp_path / f"{kind}.gguf", message)


def test_one_of_several_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bloom", split_max_tensors=1)
    for name in ("a", "b", "c"):
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(tmp_path / "m-00001-of-00003.gguf", "one of 3 files of a model; join them first")


def test_a_folder_around_one(tmp_path: Path) -> None:
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "m.gguf").touch()
    assert_refused(tmp_path / "downloaded", r"or the path of a file: .*downloaded/m\.gguf")


def test_files_that_were_joined(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    tensors, metadata = read_gguf(path)
    del metadata["general.architecture"]
    write_gguf(tmp_path / "joined.gguf", "mpt", tensors, metadata | {"split.count": 0})
    assert open_checkpoint(tmp_path / "joined.gguf").config == open_checkpoint(path).config


def test_big_endian_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bloom", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(tmp_path / "m.gguf", "it is big-endian; convert it first")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.max_alibi_bias": 0.0}, "max_alibi_bias=0.0 .* the model has no ALiBi"),
        ({"rope.freq_base": 10000.0}, r"keys that are not known: rope\.freq_base"),
        ({"attention.head_count": 7}, "num_heads=7 does not divide d_model"),
        ({"block_count": 3}, "tensors missing"),
        ({"block_count": 2**30}, "1,073,741,824 layers, the file"),
        ({"vocab_size": 99}, r"shape +token_embd.weight"),
    ],
)
def test_metadata_that_cannot_be_honoured(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said: dict[str, Any] = {
        **{"context_length": 256, "embedding_length": 48, "block_count": 2},
        **{"feed_forward_length": 192, "attention.head_count": 6, "attention.head_count_kv": 6},
        **{"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0},
    }
    arrays = expected_arrays(CONFIGS["mpt"])
    write_by_gguf(tmp_path / "right.gguf", "mpt", said, arrays)
    assert open_checkpoint(tmp_path / "right.gguf").config == unsaid(CONFIGS["mpt"])
    assert_refused(write_by_gguf(tmp_path / "m.gguf", "mpt", said | metadata, arrays), message)


def test_encoders_that_cannot_be_honoured(tmp_path: Path) -> None:
    arrays = expected_arrays(ENCODERS["jina-bert-v2"])
    halves = np.split(arrays["blk.0.ffn_up.weight"], 2)
    odd = {"blk.0.ffn_gate.weight": halves[0][1:], "blk.0.ffn_up.weight": halves[1]}
    untyped = {name: array for name, array in arrays.items() if name != "token_types.weight"}
    said = SAID["jina-bert-v2"]
    for name, (metadata, tensors, message) in {
        "decoder": ({"attention.causal": True}, arrays, "causal=True .* the bias is symmetric"),
        "ranking": ({"pooling_type": 4}, arrays, "pooling_type=4 .* no head that ranks"),
        "types": ({}, untyped, r"1 tensors missing, 0 unexpected.*\n +missing +token_types.weight"),
        "halves": ({}, arrays | odd, r"unexpected +blk\.0\.ffn_gate\.weight"),
        "head": ({}, arrays | {"cls.weight": halves[0][:1]}, r"unexpected +cls\.weight"),
    }.items():
        file = write_by_gguf(tmp_path / f"{name}.gguf", "jina-bert-v2", said | metadata, tensors)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(file)


def test_keys_may_be_ignored(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    contents = path.read_bytes().replace(b"mpt.vocab_size", b"mpt.some_thing", 1)
    path.write_bytes(contents)
    assert open_checkpoint(path, ignore_keys=["some_thing"]).ignored == {"some_thing": 420}


def test_gguf_is_not_imported_before_it_is_needed() -> None:
    command = "import sys, alibi_convert.formats; assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "model", CONFIGS["bloom"])
    file = str(tmp_path / "m.gguf")
    assert main(["plan", str(source), file]) == 0
    assert main(["convert", str(source), file, "--dtype", "float16"]) == 0
    capsys.readouterr()
    assert main(["inspect", file]) == 0
    assert "gguf-bloom (gguf)" in capsys.readouterr().out
    assert main(["convert", file, str(tmp_path / "back"), "--dtype", "float32"]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "the cat", "--max-new-tokens", "4", "--json"]
    for each in (file, str(tmp_path / "back")):
        assert main(["generate", each, *prompt]) == 0
        (said,) = json.loads(capsys.readouterr().out)
        assert load_tokenizer(file).decode(said["tokens"]) == said["text"]


@pytest.mark.slow
def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = write(tmp_path / "model", config=CONFIGS["bloom"]), tmp_path / "m.gguf"
    convert(source, file, dtype="float16")
    assert main(["verify", str(source), str(file)]) == 0
    assert "the second checkpoint is the first, cast to float16" in capsys.readouterr().out
