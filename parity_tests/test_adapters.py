"""Adapters of peft: exactly W + scaling · B A, rounded once, in every family that peft names.

The folders here are written without peft; parity_tests/clients holds peft itself against us.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import alibi_convert.adapters.merging
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, inspect, open_checkpoint, plan
from alibi_convert.formats import shards
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import as_torch
from alibi_spec.budgets import BUDGETS
from alibi_verify import verify_steps
from parity_tests import test_family_bloom, test_family_falcon, test_family_mpt
from parity_tests.adapters import SETTINGS, Arrays, draw, embedding, linear, whole, write_adapter
from parity_tests.checkpoints import truncate
from parity_tests.checkpoints import write as write_ours
from parity_tests.compare import assert_bitwise
from parity_tests.families import (
    VOCAB,
    assert_same_logits,
    our_logits,
    peer_logits,
    write_folder,
)
from parity_tests.peers import published
from parity_tests.peers.btlm import shapes as btlm_shapes
from parity_tests.test_family_btlm import SMALL as SMALL_BTLM

LIMIT = BUDGETS["float32", "cpu"].forward
HEADS, DIM = 5, 30
PEERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bloom": test_family_bloom.peer,
    "mpt": test_family_mpt.peer,
    "falcon": test_family_falcon.peer,
}
QKV, OUT = (
    "transformer.h.{}.self_attention.query_key_value",
    "transformer.h.{}.self_attention.dense",
)
UP, DOWN = "transformer.h.{}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.dense_4h_to_h"
WQKV, PROJECTION = "transformer.blocks.{}.attn.Wqkv", "transformer.blocks.{}.attn.out_proj"
FFN_UP, FFN_DOWN = "transformer.blocks.{}.ffn.up_proj", "transformer.blocks.{}.ffn.down_proj"


def layers(*modules: tuple[str, tuple[int, int], int]) -> Arrays:
    """The factors of modules (name, shape, rank) in both layers."""
    return {
        name: array
        for module, shape, rank in modules
        for index in range(2)
        for name, array in linear(module.format(index), shape, rank).items()
    }


@dataclass(frozen=True)
class Case:
    """An adapter, and what becomes of the base's tensors: written out by hand.

    Attributes:
        family: of the base.
        tensors: of the adapter.
        settings: where they differ from peft's defaults.
        scalings: of every weight to which a product is added.
        untied: whether the head is a layer of its own afterwards.
        base: options of the base.
    """

    family: str
    tensors: Arrays
    settings: dict[str, Any]
    scalings: dict[str, float]
    untied: bool = False
    base: dict[str, Any] = field(default_factory=dict)

    def save_base(self, folder: Path) -> PreTrainedModel:
        model = PEERS[self.family](HEADS, **self.base)
        model.save_pretrained(folder)
        return model

    def save_adapter(self, folder: Path) -> Path:
        return write_adapter(folder, self.tensors, **self.settings)


def scalings(value: float, *modules: str) -> dict[str, float]:
    return {f"{module.format(index)}.weight": value for module in modules for index in range(2)}


CASES: dict[str, Case] = {
    "bloom": Case(
        "bloom",
        layers((QKV, (3 * DIM, DIM), 2), (OUT, (DIM, DIM), 2)),
        {"target_modules": ["query_key_value", "dense"]},
        scalings(1.5, QKV, OUT),
    ),
    "mpt": Case(
        "mpt",
        layers(
            (WQKV, (3 * DIM, DIM), 3),
            (PROJECTION, (DIM, DIM), 3),
            (FFN_UP, (4 * DIM, DIM), 3),
            (FFN_DOWN, (DIM, 4 * DIM), 3),
        ),
        {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["Wqkv", "out_proj", "up_proj", "down_proj"],
            "use_rslora": True,
        },
        scalings(7 / math.sqrt(3), WQKV, PROJECTION, FFN_UP, FFN_DOWN),
    ),
    "falcon, every bias": Case(
        "falcon",
        layers((QKV, (3 * DIM, DIM), 2), (DOWN, (DIM, 4 * DIM), 2))
        | whole(f"{QKV.format(0)}.base_layer.bias", (3 * DIM,))
        | whole(f"{QKV.format(1)}.base_layer.bias", (3 * DIM,))
        | whole(f"{DOWN.format(0)}.base_layer.bias", (DIM,))
        | whole(f"{DOWN.format(1)}.base_layer.bias", (DIM,))
        | {f"base_model.model.{DOWN.format(0)}.lora_B.bias": draw((DIM,), 5)}
        | {
            name: array
            for index in range(2)
            for module, size in (
                (OUT, DIM),
                (UP, 4 * DIM),
                ("transformer.h.{}.input_layernorm", DIM),
                ("transformer.h.{}.post_attention_layernorm", DIM),
            )
            for name, array in whole(f"{module.format(index)}.bias", (size,)).items()
        }
        | whole("transformer.ln_f.bias", (DIM,)),
        {"target_modules": r".*\.(query_key_value|dense_4h_to_h)", "bias": "all"},
        scalings(1.5, QKV, DOWN) | {f"{DOWN.format(0)}.bias": 1.5},
    ),
    "falcon, biases of the updated modules": Case(
        "falcon",
        layers((QKV, (3 * DIM, DIM), 2))
        | whole(f"{QKV.format(0)}.base_layer.bias", (3 * DIM,))
        | whole(f"{QKV.format(1)}.bias", (3 * DIM,)),  # as older versions named it
        {"target_modules": ["query_key_value"], "bias": "lora_only"},
        scalings(1.5, QKV),
    ),
    "patterns": Case(
        "bloom",
        linear(QKV.format(0), (3 * DIM, DIM), 4)
        | linear(QKV.format(1), (3 * DIM, DIM), 3)
        | layers((OUT, (DIM, DIM), 2), (UP, (4 * DIM, DIM), 2)),
        {
            "target_modules": ["query_key_value", "dense", "dense_h_to_4h"],
            "rank_pattern": {r"h\.0\..*query_key_value": 4, "query_key_value": 3},
            "alpha_pattern": {"^transformer.h.1.self_attention.dense": 5, "h_to_4h": 99},
        },
        {
            f"{QKV.format(0)}.weight": 3 / 4,
            f"{QKV.format(1)}.weight": 1.0,
            f"{OUT.format(0)}.weight": 1.5,
            f"{OUT.format(1)}.weight": 2.5,
        }
        | scalings(1.5, UP),  # a pattern is the end of a name, after a dot
    ),
    "one layer": Case(
        "mpt",
        linear(WQKV.format(1), (3 * DIM, DIM), 2, ".default"),
        {
            "target_modules": ["Wqkv", "out_proj"],
            "exclude_modules": ["blocks.1.attn.out_proj"],
            "layers_to_transform": 1,
        },
        {f"{WQKV.format(1)}.weight": 1.5},
    ),
    "embedding": Case(
        "bloom",
        embedding("transformer.word_embeddings", (VOCAB, DIM), 2),
        {"target_modules": ["word_embeddings"]},
        {"transformer.word_embeddings.weight": 1.5},
        untied=True,
    ),
    "an untied embedding": Case(
        "mpt",
        embedding("transformer.wte", (VOCAB, DIM), 2),
        {"target_modules": ["wte"]},
        {"transformer.wte.weight": 1.5},
        base={"tie_word_embeddings": False},
    ),
    "head": Case(
        "falcon",
        linear("lm_head", (VOCAB, DIM), 2)
        | whole("lm_head.base_layer.weight", (VOCAB, DIM)),  # tied: the embedding's too
        {"target_modules": ["lm_head"]},
        {"lm_head.weight": 1.5},
        untied=True,
    ),
    "a head of its own": Case(
        "mpt",
        layers((WQKV, (3 * DIM, DIM), 2)) | whole("lm_head.weight", (VOCAB, DIM)),
        {"target_modules": ["Wqkv"], "modules_to_save": ["lm_head"]},
        scalings(1.5, WQKV),
        untied=True,
    ),
    "modules as a whole": Case(
        "bloom",
        layers((OUT, (DIM, DIM), 2))
        | whole("transformer.ln_f.weight", (DIM,))
        | whole("transformer.ln_f.bias", (DIM,)),
        {"target_modules": ["dense"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True},
        scalings(1.5, OUT),
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def merged_by_hand(case: Case, base: Mapping[str, np.ndarray]) -> Arrays:
    """In float64, rounded once."""
    base = dict(base)
    is_tied = "lm_head.weight" not in base
    exact = {name: array.astype(np.float64) for name, array in base.items()}
    given = {short(name).replace(".default", ""): array for name, array in case.tensors.items()}
    for name, array in given.items():
        target = name.replace(".base_layer", "")
        if "lora_" not in name:
            exact[target] = array.astype(np.float64)
            if is_tied and name == "lm_head.base_layer.weight":
                exact["transformer.word_embeddings.weight"] = exact[target]
    if case.untied:
        exact.setdefault("lm_head.weight", exact[EMBEDDINGS[case.family]])
    for name, scaling in case.scalings.items():
        module = name.rpartition(".")[0]
        if name.endswith(".bias"):
            product = given[f"{module}.lora_B.bias"]
        elif f"{module}.lora_A.weight" in given:
            product = wide(given[f"{module}.lora_B.weight"]) @ wide(
                given[f"{module}.lora_A.weight"]
            )
        else:
            first, second = (given[f"{module}.lora_embedding_{factor}"] for factor in "AB")
            product = (wide(second) @ wide(first)).T
        exact[name] = exact[name] + scaling * wide(product)
    return {name: array.astype(np.float32) for name, array in exact.items()}


EMBEDDINGS = {
    "bloom": "transformer.word_embeddings.weight",
    "falcon": "transformer.word_embeddings.weight",
    "mpt": "transformer.wte.weight",
}


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


@each_case
def test_merged_tensors(name: str, tmp_path: Path) -> None:
    """Those of the base, under its own names, bit for bit what a computation by hand gives."""
    case = CASES[name]
    case.save_base(tmp_path / "base")
    adapter = case.save_adapter(tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "base", adapter=adapter)
    by_hand = merged_by_hand(case, read_tensors(tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    ties = {"tie_word_embeddings": False} if case.untied else {}
    expected = open_checkpoint(write_folder(tmp_path / "hand", config | ties, by_hand))
    assert checkpoint.config == expected.config
    assert list(checkpoint.tensors) == list(expected.tensors)
    for each, array in expected.tensors.items():
        assert_bitwise(checkpoint.tensors[each], array, each)
        chunks = np.concatenate([*checkpoint.tensors.headers[each].chunks()])
        assert_bitwise(chunks.reshape(array.shape), array, f"chunks of {each}")
    changed = {
        short(each).replace(".base_layer", "") for each in case.tensors if "lora" not in each
    }
    assert checkpoint.adapter == {
        "path": str(adapter),
        "base": "org/base",
        "added": len(case.scalings),
        "replaced": len(changed - set(case.scalings)) + (name == "head"),
        "scalings": sorted(set(case.scalings.values())),
        "untied": "lm_head.weight" if case.untied else None,
    }


@pytest.mark.parametrize("name", ["patterns", "a head of its own", "falcon, every bias"])
def test_logits(name: str, tmp_path: Path) -> None:
    """Both backends compute what transformers does with the weights merged by hand."""
    case = CASES[name]
    case.save_base(tmp_path / "base")
    ties = {"tie_word_embeddings": False} if case.untied else {}
    model = PEERS[case.family](HEADS, **case.base, **ties)
    by_hand = merged_by_hand(case, read_tensors(tmp_path / "base"))
    state = {each: torch.from_numpy(array.copy()) for each, array in by_hand.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    logits = our_logits(tmp_path / "base", adapter=case.save_adapter(tmp_path / "adapter"))
    assert_same_logits(logits, peer_logits(model), LIMIT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_one_rounding(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a unit in the last place, and the roundings of a sum of `rank` terms in float64."""
    monkeypatch.setattr(alibi_convert.adapters.merging, "CHUNK_BYTES", 7 * 8 * DIM)
    PEERS["bloom"](HEADS).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    rank, scaling, name = 9, 2.6 / 3, f"{OUT.format(0)}.weight"
    rng = np.random.default_rng(0)
    first, second = (
        (rng.standard_normal(shape) / 4).astype(np.float32) for shape in ((rank, DIM), (DIM, rank))
    )
    factors = dict(zip(linear(OUT.format(0), (DIM, DIM), rank), (first, second), strict=True))
    settings = {"r": rank, "lora_alpha": 2.6, "use_rslora": True, "target_modules": None}
    adapter = write_adapter(tmp_path / "adapter", factors, **settings)
    weight = read_tensors(tmp_path / "base")[name]
    long = [each.astype(np.longdouble) for each in (weight, second, first)]
    exact = long[0] + np.longdouble(scaling) * (long[1] @ long[2])
    size = np.abs(long[0]) + scaling * (np.abs(long[1]) @ np.abs(long[2]))
    found = open_checkpoint(tmp_path / "base", adapter=adapter).tensors[
        "transformer.layers.0.attn.output.weight"
    ]
    assert found.dtype == weight.dtype
    unit = np.spacing(np.abs(found)).astype(np.longdouble)
    allowed = unit / 2 + (rank + 3) * np.longdouble(2) ** -53 * size
    assert (np.abs(found.astype(np.longdouble) - exact) <= allowed).all()


def test_an_embedding_stays_tied_to_an_equal_head(tmp_path: Path) -> None:
    """What peft saves of a vocabulary that was resized: both names, the same values."""
    both = whole("transformer.word_embeddings.weight", (VOCAB, DIM))
    (values,) = both.values()
    both |= {"base_model.model.lm_head.weight": values}
    PEERS["bloom"](HEADS).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", both)
    checkpoint = open_checkpoint(tmp_path / "base", adapter=adapter)
    assert checkpoint.config.tie_embeddings
    assert checkpoint.adapter["untied"] is None
    assert "lm_head.weight" not in checkpoint.tensors
    assert_bitwise(checkpoint.tensors["token_embedding.weight"], values, "embedding")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_without_the_models_own_prefix(prefix: str, tmp_path: Path) -> None:
    """A base that was saved without its head, and an adapter of a model without one."""
    case = CASES["bloom"]
    model = case.save_base(tmp_path / "usual")
    arrays = {
        name.removeprefix("transformer."): array
        for name, array in read_tensors(tmp_path / "usual").items()
    }
    write_folder(tmp_path / "base", model.config.to_dict(), arrays)
    tensors = {name.replace("transformer.", prefix): array for name, array in case.tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, **case.settings)
    found = open_checkpoint(tmp_path / "base", adapter=adapter)
    usual = open_checkpoint(tmp_path / "usual", adapter=case.save_adapter(tmp_path / "same"))
    for name, array in usual.tensors.items():
        assert_bitwise(found.tensors[name], array, name)


def test_layers_that_are_transposed(tmp_path: Path) -> None:
    """BTLM's Conv1D is [in, out]; its head and its embedding are not."""
    shapes = btlm_shapes(SMALL_BTLM)
    arrays = published.draw(shapes, np.float32)
    base = published.write_folder(tmp_path / "base", SMALL_BTLM, arrays)
    module = "transformer.h.1.attn.c_proj"  # square: only its kind tells
    wide_module = "transformer.h.0.mlp.c_fc"
    inner, outer = shapes[f"{wide_module}.weight"]
    tensors = linear(module, (30, 30), 2) | linear(wide_module, (outer, inner), 2)
    adapter = write_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True)
    by_hand = dict(arrays)
    for each in (module, wide_module):
        first, second = (
            wide(tensors[f"base_model.model.{each}.lora_{factor}.weight"]) for factor in "AB"
        )
        name = f"{each}.weight"
        by_hand[name] = (wide(arrays[name]) + 1.5 * (second @ first).T).astype(np.float32)
    expected = open_checkpoint(published.write_folder(tmp_path / "hand", SMALL_BTLM, by_hand))
    for name, array in open_checkpoint(base, adapter=adapter).tensors.items():
        assert_bitwise(array, expected.tensors[name], name)


def test_pickled_adapters(tmp_path: Path) -> None:
    """As peft wrote them before safetensors; with consent."""
    case = CASES["bloom"]
    case.save_base(tmp_path / "base")
    adapter = case.save_adapter(tmp_path / "adapter")
    usual = open_checkpoint(tmp_path / "base", adapter=adapter)
    expected = dict(usual.tensors)
    (adapter / "adapter_model.safetensors").unlink()
    state = {name: as_torch(array) for name, array in case.tensors.items()}
    torch.save(state, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin .*allow_pt"):
        open_checkpoint(tmp_path / "base", adapter=adapter)
    found = open_checkpoint(tmp_path / "base", adapter=adapter, allow_pt=True)
    for name, array in expected.items():
        assert_bitwise(found.tensors[name], array, name)


SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, r"peft_type 'IA3', expected 'LORA'; merge it into"),
    "no method": ({"peft_type": None}, r"peft_type None, expected 'LORA'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4', by which .* path_initial"),
    "loftq": ({"init_lora_weights": "loftq"}, r"init_lora_weights 'loftq'"),
    "dora": ({"use_dora": True}, r"use_dora True, which is not merged here; merge it into"),
    "tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices \[3\], which is not"),
    "tying": ({"ensure_weight_tying": True}, r"ensure_weight_tying True, which is not merged"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication .* not merged"),
    "parameters": ({"target_parameters": ["w"]}, r"target_parameters \['w'\], which is not"),
    "of the future": ({"use_next_lora": {"a": 1}}, r"use_next_lora \{'a': 1\}, which is not"),
    "rank": ({"r": True}, r"r True, expected a positive integer"),
    "no rank": ({"r": 0}, r"r 0, expected a positive integer"),
    "alpha": ({"lora_alpha": 10**400}, r"lora_alpha 10+, expected a number"),
    "alphas": ({"alpha_pattern": {"dense": "3"}}, r"alpha_pattern .*, expected numbers by"),
    "bias": ({"bias": "some"}, r"bias 'some', expected one of none, all, lora_only"),
    "targets": ({"target_modules": [3]}, r"target_modules \[3\], expected names or"),
    "flag": ({"use_rslora": 1}, r"use_rslora 1, expected true or false"),
    "no expression": ({"target_modules": "(dense"}, r"'\(dense', no regular expression"),
    "half an expression": ({"rank_pattern": {"a)(b": 2}}, r"'a\)\(b', no regular expression"),
    "an endless expression": (
        {"target_modules": r"(t|r|a|\w)+(x|y)"},
        r"expected at most 4 groups and repetitions, and none of a group: write out",
    ),
    "a long expression": ({"alpha_pattern": {".*.*.*.*.*x": 2}}, r"at most 4 groups and rep"),
}


@pytest.mark.parametrize("what", SETTINGS_REFUSED)
def test_settings_that_are_refused(what: str, tmp_path: Path) -> None:
    settings, message = SETTINGS_REFUSED[what]
    case = CASES["bloom"]
    case.save_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", case.tensors, **(case.settings | settings))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "base", adapter=adapter)


def without(*parts: str) -> Callable[[Arrays], Arrays]:
    return lambda tensors: {
        name: array for name, array in tensors.items() if not any(part in name for part in parts)
    }


def and_also(other: Arrays) -> Callable[[Arrays], Arrays]:
    return lambda tensors: tensors | other


FIRST_QKV = f"base_model.model.{QKV.format(0)}"
TENSORS_REFUSED: dict[str, tuple[Callable[[Arrays], Arrays], dict[str, Any], str]] = {
    "none": (lambda _: {}, {"target_modules": None}, r"adapter holds no tensors; save"),
    "a layer": (
        without("h.1.self_attention.dense"),
        {},
        r"nothing for transformer\.h\.1\.self_attention\.dense\.weight, which its configuration",
    ),
    "by an expression": (
        without("h.0.self_attention.query"),
        {"target_modules": r".*\.(query_key_value|dense)"},
        r"nothing for transformer\.h\.0\.self_attention\.query_key_value\.weight",
    ),
    "a factor": (
        without("h.1.self_attention.dense.lora_B"),
        {},
        r"has lora_A; expected lora_A and",
    ),
    "biases": (lambda each: each, {"bias": "lora_only"}, r"nothing for .*\.dense\.bias"),
    "all biases": (lambda each: each, {"bias": "all"}, r"nothing for transformer\..*\.bias"),
    "a module": (lambda each: each, {"modules_to_save": ["ln_f"]}, r"nothing for .*ln_f\.(w|b)"),
    "a head": (lambda each: each, {"modules_to_save": ["lm_head"]}, r"nothing for lm_head\.weight"),
    "a misspelt module": (
        and_also(linear("transformer.h.0.self_attention.dnse", (DIM, DIM), 2)),
        {},
        r"changes .*dnse\.weight, which the base does not have   nearest: .*\.dense\.weight",
    ),
    "a stray tensor": (
        and_also(whole("score.weight", (2, DIM))),
        {},
        r"changes score\.weight, which the base does not have",
    ),
    "magnitudes": (
        and_also({f"{FIRST_QKV}.lora_magnitude_vector": draw((3 * DIM,), 0)}),
        {},
        r"changes .*lora_magnitude_vector, which the base does not have",
    ),
    "a bias without a base": (
        and_also({"base_model.model.lm_head.lora_B.bias": draw((VOCAB,), 0)}),
        {},
        r"lm_head has lora_B\.bias; expected lora_A and lora_B",
    ),
    "twice": (
        and_also({f"{FIRST_QKV}.lora_A.other.weight": draw((2, DIM), 0)}),
        {},
        r"holds .*lora_A.* a second time; remove one",
    ),
    "another rank": (lambda each: each, {"r": 3}, r"factors \[2, 30\] and .*; expected \[3, in\]"),
    "another size": (
        and_also(linear(QKV.format(0), (3 * DIM - 3, DIM), 2)),
        {},
        r"has \[87, 30\] for .*query_key_value\.weight, which is \[90, 30\] in .*'org/base'",
    ),
    "integers": (
        and_also({f"{FIRST_QKV}.lora_A.weight": np.ones((2, DIM), np.int8)}),
        {},
        r"lora_A\.weight is int8; expected one of float16",
    ),
    "an axis too many": (
        and_also({f"{FIRST_QKV}.lora_A.weight": np.ones((2, DIM, 1), np.float32)}),
        {},
        r"has factors \[2, 30, 1\] and \[90, 2\]; expected",
    ),
}


@pytest.mark.parametrize("what", TENSORS_REFUSED)
def test_tensors_that_are_refused(what: str, tmp_path: Path) -> None:
    """Nothing is passed over: neither what the file has too much, nor what it lacks."""
    change, settings, message = TENSORS_REFUSED[what]
    case = CASES["bloom"]
    case.save_base(tmp_path / "base")
    tensors = change(case.tensors)
    adapter = write_adapter(tmp_path / "adapter", tensors, **(case.settings | settings))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "base", adapter=adapter)


def test_damaged_folders(tmp_path: Path) -> None:
    case = CASES["bloom"]
    case.save_base(tmp_path / "base")
    adapter = case.save_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"base holds no adapter_config\.json; give the fold"):
        open_checkpoint(tmp_path / "base", adapter=tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"only an adapter, for 'org/base'; .*--adapter"):
        open_checkpoint(adapter)
    with pytest.raises(CheckpointError, match=r"holds an adapter .*--adapter"):
        open_checkpoint(adapter / "adapter_model.safetensors")
    truncate(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        open_checkpoint(tmp_path / "base", adapter=adapter)
    (adapter / "adapter_config.json").write_text('{"r": 1, "r": 2}')
    with pytest.raises(CheckpointError, match="duplicate key 'r'"):
        open_checkpoint(tmp_path / "base", adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(SETTINGS))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        open_checkpoint(tmp_path / "base", adapter=adapter)


def test_bases_without_peft_names(tmp_path: Path) -> None:
    case = CASES["bloom"]
    adapter = case.save_adapter(tmp_path / "adapter")
    ours = write_ours(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"ours has our names .* open the family's checkpoin"):
        open_checkpoint(ours, adapter=adapter)


def test_sums_beyond_the_dtype(tmp_path: Path) -> None:
    """What peft turns into infinity."""
    PEERS["bloom"](HEADS).half().save_pretrained(tmp_path / "base")
    factors = {name: np.full_like(each, 200) for name, each in CASES["bloom"].tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", factors)
    with pytest.raises(
        CheckpointError, match=r"\.weight with the adapter is beyond the range of flo"
    ):
        convert(tmp_path / "base", tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_a_conversion_says_what_it_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its report, in conversion.json, in plan and inspect; transformers judges the result."""
    tensors = CASES["bloom"].tensors | CASES["embedding"].tensors
    PEERS["bloom"](HEADS).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    # After a cast all implementations run the source, each with the adapter.
    report = convert(tmp_path / "base", tmp_path / "out", dtype="bfloat16", adapter=adapter)
    assert report.verified
    assert report.verification["logits"]["against"] == "transformers' bloom"
    assert set(report.verification["logits"]["errors"]) == {"alibi_torch", "alibi_flax"}
    assert report.adapter == {
        "path": str(adapter),
        "base": "org/base",
        "added": 5,
        "replaced": 0,
        "scalings": [1.5],
        "untied": "lm_head.weight",
    }
    first = next(verify_steps(tmp_path / "base", tmp_path / "out", adapter=adapter))
    assert first.passed, first.measured
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["adapter"] == report.adapter
    assert len(record["source_sha256"]["adapter_model.safetensors"]) == 64
    assert len(record["source_sha256"]["adapter_config.json"]) == 64
    planned = plan(tmp_path / "base", adapter=adapter)
    assert planned.adapter == inspect(tmp_path / "base", adapter=adapter)["adapter"]
    assert planned.adapter == report.adapter
    assert plan(tmp_path / "base").adapter == {}
    for command in ("inspect", "plan"):
        assert main([command, str(tmp_path / "base"), f"--adapter={adapter}"]) == 0
        shown = capsys.readouterr().out
        assert f"adapter {adapter} (of 'org/base'): added to 5 tensors, in place of 0" in shown
        assert "lm_head.weight is no longer the token embedding" in shown


def test_only_the_same_adapter_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, options = CASES["mpt"], {"max_shard_size": 20_000, "verify": "bits"}
    case.save_base(tmp_path / "base")
    adapter = case.save_adapter(tmp_path / "adapter")
    other = write_adapter(tmp_path / "other", case.tensors, **(case.settings | {"lora_alpha": 9}))

    def interrupted(path: Path, *args: Any) -> str:
        if path.name >= "model-00003":
            raise KeyboardInterrupt
        return write_safetensors(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_WRITERS", 1)
        patch.setattr(shards, "write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "base", tmp_path / "out", adapter=adapter, **options)
    for reading in ({"adapter": other}, {}):
        with pytest.raises(CheckpointError, match="differs from this one in source; start anew"):
            convert(tmp_path / "base", tmp_path / "out", resume=True, **reading, **options)
    report = convert(tmp_path / "base", tmp_path / "out", adapter=adapter, resume=True, **options)
    assert len(report.kept) == 2
    expected = open_checkpoint(tmp_path / "base", adapter=adapter)
    for name, array in open_checkpoint(tmp_path / "out").tensors.items():
        assert_bitwise(array, expected.tensors[name], name)
