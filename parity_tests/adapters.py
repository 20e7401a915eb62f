"""Adapters for the tests: plain safetensors and JSON, in the layout that peft writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]

# As peft 0.21 writes it for LoRA without any option.
SETTINGS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 3,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": [],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Small multiples of 1/64: their products and sums are exact in float64, in any order."""
    return (np.random.default_rng(seed).integers(-24, 25, shape) / 64).astype(np.float32)


def linear(module: str, shape: tuple[int, int], rank: int, infix: str = "") -> Arrays:
    """The factors of a torch Linear [out, in]."""
    seed = sum(map(ord, module))
    return {
        f"base_model.model.{module}.lora_A{infix}.weight": draw((rank, shape[1]), seed),
        f"base_model.model.{module}.lora_B{infix}.weight": draw((shape[0], rank), seed + 1),
    }


def embedding(module: str, shape: tuple[int, int], rank: int) -> Arrays:
    """The factors of an embedding [tokens, dim]."""
    seed = sum(map(ord, module))
    return {
        f"base_model.model.{module}.lora_embedding_A": draw((rank, shape[0]), seed),
        f"base_model.model.{module}.lora_embedding_B": draw((shape[1], rank), seed + 1),
    }


def whole(name: str, shape: tuple[int, ...]) -> Arrays:
    """A tensor that was trained itself."""
    return {f"base_model.model.{name}": draw(shape, sum(map(ord, name)))}


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
