"""Exports of families that no library runs: their published formulas read what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import alibi_flax
import alibi_torch
from alibi_convert import convert, open_checkpoint
from alibi_convert.families import Family
from alibi_convert.formats import FORMATS
from alibi_convert.rules import canonical_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import draw_parameters
from parity_tests.compare import assert_bitwise, assert_within

Formula = Callable[..., np.ndarray]


def draw(config: ALiBiConfig) -> dict[str, np.ndarray]:
    """Parameters of a configuration, without biases where a gated layer of BERT has none."""
    arrays = draw_parameters(config)
    if config.norm_placement == "post" and config.gated_ffn:
        for name, array in arrays.items():
            if name.endswith(("gate.bias", "fc1.bias")):
                arrays[name] = np.zeros_like(array)
    return arrays


def written(path: Path, config: ALiBiConfig, arrays: Mapping[str, np.ndarray]) -> Path:
    """A folder of ours."""
    FORMATS["alibi"].write(path, config, Tensors.of(arrays))
    return path


def assert_exported(
    folder: Path,
    family: Family,
    config: ALiBiConfig,
    formula: Callable[[dict[str, Any], dict[str, np.ndarray]], Formula],
    *inputs: np.ndarray,
) -> dict[str, Any]:
    """Ours -> family: the published formula computes the same, and what is read back is the same.

    Args:
        folder: an empty one.
        family: which is written.
        config: what it can express.
        formula: the forward pass of one sequence, given the config.json and the tensors, by the
            family's names, in float64.
        inputs: tokens [batch, seq], and token types where the model has them.

    Returns:
        the family's config.json.
    """
    arrays, destination = draw(config), folder / "theirs"
    convert(written(folder / "ours", config, arrays), destination, to=family.name, verify="bits")
    found = open_checkpoint(destination)
    assert (found.family, found.config) == (family.name, config)
    model, params = alibi_flax.from_pretrained(destination)
    assert model.config == config
    for each in (found.tensors, canonical_tensors(params, config)):
        assert set(each) == set(arrays)
        for name, array in arrays.items():
            assert_bitwise(each[name], array, name)

    foreign = json.loads((destination / "config.json").read_text())
    stored = load_file(destination / "model.safetensors")
    forward = formula(foreign, {name: each.astype(np.float64) for name, each in stored.items()})
    expected = np.stack([forward(*row) for row in zip(*inputs, strict=True)])
    named = dict(zip(("inputs", "token_type_ids"), inputs, strict=False))
    trace = reference_forward(config, arrays, **named)
    model = alibi_torch.ALiBiLM.from_pretrained(destination, dtype=torch.float64).eval()
    with torch.no_grad():
        output = model(*map(torch.from_numpy, inputs[:1]), **_types(inputs)).numpy()
    limit = BUDGETS["float64", "cpu"].forward
    for name, actual in (("reference", trace.get("logits", trace["output"])), ("torch", output)):
        assert_within(actual, expected, limit, name)
    return foreign


def _types(inputs: tuple[np.ndarray, ...]) -> dict[str, torch.Tensor]:
    return {"token_type_ids": torch.from_numpy(inputs[1])} if len(inputs) > 1 else {}
