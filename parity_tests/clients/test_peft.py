"""LoRA that peft itself trains, saves and merges, held against ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_spec.budgets import BUDGETS
from parity_tests import test_family_bloom, test_family_falcon, test_family_mpt
from parity_tests.adapters import SETTINGS
from parity_tests.families import assert_same_logits, batch, our_logits, peer_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's, about tied embeddings
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers', about its use by peft
]
LIMIT = BUDGETS["float32", "cpu"].forward
HEADS = 5
PEERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bloom": test_family_bloom.peer,
    "mpt": test_family_mpt.peer,
    "falcon": test_family_falcon.peer,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"target_modules": ["query_key_value", "dense"]}),
    "mpt, every linear layer": ("mpt", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "falcon, by an expression": ("falcon", {"target_modules": r".*h\.0\.mlp\.dense.*"}),
    "rank-stabilized, by patterns": (
        "bloom",
        {
            "target_modules": ["query_key_value", "dense"],
            "use_rslora": True,
            "rank_pattern": {r"h\.0\.self_attention\.dense": 4, "query_key_value": 3},
            "alpha_pattern": {"^transformer.h.1.self_attention.dense": 7},
        },
    ),
    "one layer": ("mpt", {"target_modules": ["Wqkv"], "layers_to_transform": [1]}),
    "excluded": (
        "falcon",
        {"target_modules": ["dense"], "exclude_modules": ["h.0.self_attention.dense"]},
    ),
    "every bias": ("falcon", {"target_modules": ["dense"], "bias": "all", "lora_bias": True}),
    "some biases": ("bloom", {"target_modules": ["dense"], "bias": "lora_only"}),
    "embedding": ("bloom", {"target_modules": ["word_embeddings", "dense"]}),
    "embedding and head": ("mpt", {"target_modules": ["wte", "lm_head"]}),
    "whole modules": (
        "falcon",
        {"target_modules": ["dense"], "modules_to_save": ["lm_head", "ln_f"]},
    ),
    "orthogonal": ("mpt", {"target_modules": ["out_proj"], "init_lora_weights": "orthogonal"}),
}


def adapted(family: str, tmp_path: Path, **options: Any) -> PeftModel:
    """A model with an adapter that is no longer as it was initialised; both are saved."""
    model = PEERS[family](HEADS)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(**({"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | options))
    peft_model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    peft_model.save_pretrained(tmp_path / "adapter")
    return peft_model


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_adapter(name: str, tmp_path: Path) -> None:
    family, options = CASES[name]
    expected = peer_logits(adapted(family, tmp_path, **options))
    logits = our_logits(tmp_path / "base", adapter=tmp_path / "adapter")
    assert_same_logits(logits, expected, LIMIT)


def test_training_merging_and_generation(tmp_path: Path) -> None:
    """A trained adapter, merged by peft's merge_and_unload and by a conversion."""
    peft_model = adapted("bloom", tmp_path, target_modules="all-linear").train()
    optimizer = torch.optim.AdamW(
        [each for each in peft_model.parameters() if each.requires_grad], lr=1e-2
    )
    tokens = torch.from_numpy(batch()[0][:, :32])
    for _ in range(5):
        peft_model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.save_pretrained(tmp_path / "adapter")
    merged = peft_model.merge_and_unload().eval()
    out = tmp_path / "out"
    report = convert(tmp_path / "base", out, adapter=tmp_path / "adapter")
    assert report.verification["logits"]["against"] == "transformers' bloom"
    assert_same_logits(our_logits(out), peer_logits(merged), LIMIT)

    greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = merged.generate(tokens, attention_mask=torch.ones_like(tokens), **greedy).numpy()
    model = alibi_torch.ALiBiLM.from_pretrained(out)
    found = {"torch": alibi_torch.generate(model, tokens, 24).tokens.numpy()}
    flax_model, params = alibi_flax.from_pretrained(out)
    flax_found = alibi_flax.generate(flax_model, params, tokens.numpy(), 24)
    found["flax"] = np.asarray(flax_found.tokens)
    for name, text in found.items():
        assert text.tolist() == expected.tolist(), name


def test_the_tests_know_what_peft_writes(tmp_path: Path) -> None:
    """Whatever a version of peft adds to its configuration must be looked at here."""
    adapted("bloom", tmp_path, target_modules=["dense"])
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written.keys() == SETTINGS.keys()
    same = written.keys() - {"base_model_name_or_path", "lora_dropout", "target_modules"}
    same -= {"peft_version"}
    assert {name: written[name] for name in same} == {name: SETTINGS[name] for name in same}


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 3]},
    "ensure_weight_tying": {"modules_to_save": ["word_embeddings"], "ensure_weight_tying": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_variants_are_refused_by_name(key: str, tmp_path: Path) -> None:
    adapted("bloom", tmp_path, target_modules=["dense"], **REFUSED[key])
    with pytest.raises(CheckpointError, match=f"has {key} .*; merge it|has {key} .*, or merge it"):
        open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
