"""Windows that are proved from weights hold for every input (SPEC.md §12)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from alibi_spec import ALiBiConfig, parameter_table, reference_forward
from alibi_spec.bounds import logit_gaps, model_windows
from alibi_spec.certificate import TOLERANCES

SEQ, WIDTH = 400, 24
BASE = ALiBiConfig(num_layers=2, d_model=WIDTH, num_heads=3, slopes=(1.5, 0.8, 0.5))
_POST: dict[str, Any] = {"norm_placement": "post", "final_norm": False}
CASES: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "rms norm": {"norm": "rms", "norm_bias": False},
    "no biases": {"attention_bias": False, "norm_bias": False, "attention_scale": 0.4},
    "grouped": {"num_kv_heads": 1},
    "clipped": {"qkv_clip": 0.4},
    "normalised": {"qk_norm": True},
    "clipped and normalised": {"qkv_clip": 0.5, "qk_norm": True},
    "residual from the norm": {"norm_placement": "pre_residual"},
    "learned": {"slopes": "learned"},
    "tokens": {"vocab_size": 31, "embedding_scale": 1.5, "type_vocab_size": 2},
    "post, tokens": {**_POST, "vocab_size": 31, "type_vocab_size": 2},
    "post, normed tokens": {**_POST, "vocab_size": 31, "embedding_norm": True},
}


def _parameters(config: ALiBiConfig, gain: float) -> dict[str, np.ndarray]:
    """Queries and keys that can be large, from large norms."""
    rng = np.random.default_rng(0)
    drawn = {}
    for row in parameter_table(config):
        values = rng.standard_normal(row.shape)
        if row.init == "slopes":
            values = np.array([1.5, -0.1, 0.5])
        elif row.init == "ones":
            values = 1 + gain * values
        elif len(row.shape) > 1:
            values = values / np.sqrt(row.shape[-1])
        else:
            values = 0.5 * values
        drawn[row.name] = values.astype(np.float32)
    return drawn


@pytest.mark.parametrize("gain", [0.2, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_no_input_needs_more(case: str, gain: float) -> None:
    """Random inputs: no logit beats that of the query's own key by more, no far key counts."""
    config = dataclasses.replace(BASE, **CASES[case])
    parameters, rng = _parameters(config, gain), np.random.default_rng(1)
    if config.vocab_size is None:
        inputs = 30 * rng.standard_normal((1, SEQ, WIDTH)) + 50
    else:
        inputs = rng.integers(0, config.vocab_size, (1, SEQ))
    trace = reference_forward(config, parameters, inputs)
    windows = model_windows(config, parameters)
    distance = np.arange(SEQ)[:, None] - np.arange(SEQ)[None]
    for layer in range(config.num_layers):
        gaps = logit_gaps(config, parameters, layer)
        logits = trace[f"layers.{layer}.biased_logits"][0]
        slopes = np.array(BASE.slopes)
        if config.slopes == "learned":
            slopes = np.array([1.5, -0.1, 0.5])
            assert windows[layer, 1] == -1
        for head in range(3):
            scores = logits[head] + slopes[head] * distance
            excess = np.where(distance >= 0, scores - np.diagonal(scores)[:, None], -np.inf).max()
            assert 0 < excess <= gaps[head], f"{case}, head {layer}.{head}"
            probabilities = trace[f"layers.{layer}.probabilities"][0, head]
            if windows[layer, head] >= 0:
                far = np.where(distance >= windows[layer, head], probabilities, 0).sum(axis=1)
                assert far.max() <= TOLERANCES["float32"]


@pytest.mark.parametrize("case", ["rms norm", "grouped rms", "clipped rms"])
def test_the_worst_input_needs_nearly_as_much(case: str) -> None:
    """The query and the keys that the bound is about."""
    options = {"grouped rms": {"num_kv_heads": 1}, "clipped rms": {"qkv_clip": 0.05}}.get(case, {})
    config = dataclasses.replace(
        BASE,
        **options,
        num_layers=1,
        norm="rms",
        norm_bias=False,
        attention_bias=False,
        slopes=(0.8, 0.3, 0.2),
    )
    parameters = _parameters(config, 0.2)
    windows = model_windows(config, parameters)[0]
    gain = parameters["layers.0.attn_norm.weight"]
    for head in range(3):
        rows, key_rows = slice(8 * head, 8 * head + 8), slice(0, 8)
        if config.kv_heads == 3:
            key_rows = rows
        query = parameters["layers.0.attn.query.weight"][rows] * gain
        key = parameters["layers.0.attn.key.weight"][key_rows] * gain
        if config.qkv_clip is None:
            left, _, right = np.linalg.svd(query.T @ key)
            first, second = left[:, 0], right[0]
        else:  # all corners of the clamped cube at once
            first, second = (np.linalg.pinv(each) @ np.ones(8) for each in (query, key))
        x = np.tile(1e3 * second, (SEQ, 1))
        x[-1] = 1e3 * first
        trace = reference_forward(config, parameters, x[None])
        logits = trace["layers.0.biased_logits"][0, head, -1]
        # Half of the bound allows for the query's own key to be turned away as far.
        farthest = logits[0] + np.array(config.slopes)[head] * (SEQ - 1)
        gap = logit_gaps(config, parameters, 0)[head]
        assert 0.4 * gap < farthest <= gap, f"{case}, head {head}"
        assert windows[head] < SEQ


def test_the_bound_is_attained() -> None:
    """Keys along the query, its own against it: the gap is the bound, but for rounding."""
    config = dataclasses.replace(
        BASE, num_layers=1, norm="rms", norm_bias=False, attention_bias=False
    )
    parameters = _parameters(config, 0.2)
    parameters["layers.0.attn_norm.weight"][:] = 1
    for name, sign in (("query", 1), ("key", -1)):
        weight = parameters[f"layers.0.attn.{name}.weight"]
        weight[:] = 0
        weight[::8, 0] = sign * 0.7  # the first row of each head
    x = np.zeros((1, 5, WIDTH))
    x[0, :, 0] = (-100, -100, -100, -100, 100)
    logits = reference_forward(config, parameters, x)["layers.0.biased_logits"][0, :, -1]
    excess = logits[:, 0] + np.array(BASE.slopes) * 4 - logits[:, -1]
    gaps = logit_gaps(config, parameters, 0, "float64")
    assert (excess <= gaps).all()
    assert (excess > 0.999 * gaps).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_rounding_and_tolerance_widen(dtype: str) -> None:
    config = dataclasses.replace(BASE, num_layers=1)
    parameters = _parameters(config, 0.2)
    exact = logit_gaps(config, parameters, 0, "float64")
    assert (logit_gaps(config, parameters, 0, "float32") > exact).all()
    if dtype != "float64":
        wider = logit_gaps(config, parameters, 0, dtype)
        assert (wider > logit_gaps(config, parameters, 0, "float32")).all()
    windows = [
        model_windows(config, parameters, tolerance=tolerance, dtype=dtype)
        for tolerance in (1e-2, 1e-8)
    ]
    assert (windows[1] - windows[0] >= np.floor(np.log(1e6) / np.array(BASE.slopes))).all()


def test_nothing_is_claimed_where_nothing_is_proved() -> None:
    for options in (
        {"causal": False},
        {"distance": "bfloat16"},
        {"slope_interpolation": 99},
        {"slopes": (0.0, 0.0, 0.0)},
    ):
        config = dataclasses.replace(BASE, **options)
        assert (model_windows(config, _parameters(config, 0.2)) == -1).all(), options
    config = dataclasses.replace(BASE, **_POST)
    windows = model_windows(config, _parameters(config, 0.2))
    assert (windows[0] == -1).all(), "nothing bounds what a bare model is given"
    assert (windows[1] > 0).all()
    parameters = _parameters(BASE, 0.2)
    assert (model_windows(BASE, parameters, tolerance=0) == -1).all()
    parameters["layers.0.attn.key.weight"][3, 3] = np.nan
    assert (model_windows(BASE, parameters)[0] == -1).any()


def test_the_series_is_cut_where_it_passes_the_tolerance() -> None:
    """All keys at the gap that is proved: one fewer would be too few."""
    config = dataclasses.replace(BASE, slopes=(1.5, 0.2, 0.02))
    parameters = _parameters(config, 0.2)
    gaps, windows = logit_gaps(config, parameters, 0), model_windows(config, parameters)[0]
    for gap, window, slope in zip(gaps, windows, np.float32(config.slopes), strict=True):
        terms = np.exp(gap - np.float64(slope) * np.arange(window - 1, window + 10_000))
        assert terms[1:].sum() <= TOLERANCES["float32"] < terms.sum()
