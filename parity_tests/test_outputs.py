"""Whole models, layer by layer, against the float64 reference: in float64, float32 and bfloat16."""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

from alibi_spec import reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import (
    CONFIGS,
    draw_inputs,
    draw_mask,
    draw_parameters,
    each_narrow_config,
    each_padded_config,
)
from parity_tests.compare import assert_bitwise, assert_comparable, assert_trace_within
from parity_tests.implementations import Implementation, each_implementation, present


@each_implementation(("cpu", "gpu"))
@each_padded_config
def test_float64(implementation: Implementation, config_name: str, padding: str) -> None:
    """Without rounding in the way, every intermediate of every layer is the reference's."""
    _check(implementation, config_name, padding, "float64")


@each_narrow_config
def test_narrow_dtypes(config_name: str, padding: str, dtype: str) -> None:
    """Every backend within its budget, and none much worse than its peer, layer by layer.

    Logits and softmax stay float32, so bfloat16 costs the rounding of activations alone.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for each in present():
        found = _check(each, config_name, padding, dtype)
        errors.setdefault(each.platform, {})[each.name] = found
    resolution = float(ml_dtypes.finfo(dtype).eps)
    for platform, peers in errors.items():
        assert_comparable(peers, BUDGETS[dtype, platform].ratio, resolution)


@each_implementation(("cpu", "gpu"))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("config_name", ["lm-tied", "lm-untied"])
def test_predictions(implementation: Implementation, config_name: str, dtype: str) -> None:
    """The next-token distribution moves by less than the budget, and top-1 agrees where it can."""
    budget = BUDGETS[dtype, implementation.platform]
    config = CONFIGS[config_name]
    inputs, parameters = draw_inputs(config), draw_parameters(config, dtype)
    values = "bfloat16" if dtype == "bfloat16" else "float32"
    exact = _exact(config_name, "unpadded", values)["logits"]
    trace = implementation.create().trace(config, parameters, inputs, None, dtype)
    found = trace["logits"].astype(np.float64)
    divergence = _divergence(exact, found)
    assert divergence.max() <= budget.divergence, f"KL {divergence.max():.1e} nats"
    ordered = np.sort(exact, axis=-1)
    decided = ordered[..., -1] - ordered[..., -2] > 2 * budget.forward * np.abs(exact).max()
    assert decided.mean() > 0.1  # otherwise the next line says nothing
    assert_bitwise(found.argmax(-1)[decided], exact.argmax(-1)[decided], "top-1")


def _check(
    implementation: Implementation, config_name: str, padding: str, dtype: str
) -> dict[str, float]:
    config, mask = CONFIGS[config_name], draw_mask(padding)
    values = "bfloat16" if dtype == "bfloat16" else "float32"
    inputs, parameters = draw_inputs(config, values), draw_parameters(config, values)
    exact = _exact(config_name, padding, values)
    found = implementation.create().trace(config, parameters, inputs, mask, dtype)
    budget = BUDGETS[dtype, implementation.platform]
    return assert_trace_within(config, found, exact, budget, dtype, implementation.name)


@lru_cache(maxsize=4)  # a trace takes up to 30 MB
def _exact(config_name: str, padding: str, values: str) -> dict[str, np.ndarray]:
    """What the reference computes from numbers that this dtype can hold."""
    config = CONFIGS[config_name]
    inputs, parameters = draw_inputs(config, values), draw_parameters(config, values)
    return reference_forward(config, parameters, inputs, draw_mask(padding))


def _divergence(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(exact || found) of the softmax of the last axis, in nats."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    log_exact, log_found = log_softmax(exact), log_softmax(found)
    return (np.exp(log_exact) * (log_exact - log_found)).sum(axis=-1)
