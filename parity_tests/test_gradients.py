"""Gradients of every parameter: each backend's, the other's, and the reference's differences."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

from alibi_spec import reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import (
    CONFIGS,
    draw_inputs,
    draw_mask,
    draw_parameters,
    each_narrow_gradient,
    each_padded_config,
)
from parity_tests.compare import assert_comparable, assert_gradients_within
from parity_tests.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    each_implementation,
    present,
)

TORCH_CPU = IMPLEMENTATIONS[0]


@each_implementation(("cpu", "gpu"), other_than=TORCH_CPU)
@each_padded_config
def test_float64(implementation: Implementation, config_name: str, padding: str) -> None:
    """Two independent derivations by two frameworks agree where nothing is rounded away."""
    found = _gradients(implementation, config_name, padding, "float64")
    budget = BUDGETS["float64", implementation.platform]
    exact = _exact(config_name, padding)
    assert_gradients_within(found, exact, budget.gradient, implementation.name)


@each_narrow_gradient
def test_narrow_dtypes(config_name: str, padding: str, dtype: str) -> None:
    """Every backend within its budget, and none much worse than its peer, one by one."""
    exact = _exact(config_name, padding, dtype)
    dtypes = {name: "float32" if name.endswith(".slopes") else dtype for name in exact}
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for each in present():
        found = _gradients(each, config_name, padding, dtype)
        limit = BUDGETS[dtype, each.platform].gradient
        errors.setdefault(each.platform, {})[each.name] = assert_gradients_within(
            found, exact, limit, each.name, dtype=dtypes
        )
    resolution = float(ml_dtypes.finfo(dtype).eps)
    for platform, peers in errors.items():
        assert_comparable(peers, BUDGETS[dtype, platform].gradient_ratio, resolution)


@each_padded_config
def test_reference_moves_as_the_gradient_says(config_name: str, padding: str) -> None:
    """A central difference of the reference, along a direction that touches every parameter.

    The step balances truncation (step²) and cancellation (2^-53 / step): 1e-5 leaves about 1e-9.
    """
    config, mask = CONFIGS[config_name], draw_mask(padding)
    inputs = draw_inputs(config)
    parameters = {name: array.astype(np.float64) for name, array in draw_parameters(config).items()}
    cotangent = _cotangent(config_name)
    rng = np.random.default_rng(3)
    direction = {name: rng.standard_normal(array.shape) for name, array in parameters.items()}
    step = 1e-5

    def value(sign: int) -> np.ndarray:
        moved = {name: array + sign * step * direction[name] for name, array in parameters.items()}
        trace = reference_forward(config, moved, inputs, mask)
        return cotangent * trace.get("logits", trace["output"])

    difference = float((value(+1) - value(-1)).sum()) / (2 * step)
    exact = _exact(config_name, padding)
    slope = sum(float((exact[name] * direction[name]).sum()) for name in exact)
    magnitude = sum(float(np.abs(exact[name] * direction[name]).sum()) for name in exact)
    assert abs(difference - slope) <= BUDGETS["float32", "cpu"].gradient * magnitude


def _gradients(
    implementation: Implementation,
    config_name: str,
    padding: str,
    dtype: str,
    values: str | None = None,
) -> dict[str, np.ndarray]:
    """Gradients computed in `dtype`, at a point that the dtype `values` can hold."""
    config = CONFIGS[config_name]
    return implementation.create().gradients(
        config,
        draw_parameters(config, values or dtype),
        draw_inputs(config, values or dtype),
        draw_mask(padding),
        _cotangent(config_name),
        dtype,
    )


@cache
def _exact(config_name: str, padding: str, values: str = "float32") -> dict[str, np.ndarray]:
    return _gradients(TORCH_CPU, config_name, padding, "float64", values)


def _cotangent(config_name: str) -> np.ndarray:
    config = CONFIGS[config_name]
    batch, seq = draw_inputs(config).shape[:2]
    return np.random.default_rng(2).standard_normal((batch, seq, config.output_dim))
