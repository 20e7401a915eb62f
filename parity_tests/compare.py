"""The only assertions on arrays. Dtype and shape come before values; every element counts.

Tolerances are rows of `alibi_spec.budgets`; nothing here takes a literal one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from alibi_spec import ALiBiConfig
from alibi_spec.budgets import Budget, activation_errors, gradient_floor, relative_error


def assert_bitwise(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """The same dtype, shape and bits: NaN equals itself, -0 differs from 0."""
    _assert_alike(actual, expected, what)
    unsigned = f"u{expected.dtype.itemsize}"
    differing = np.ascontiguousarray(actual).view(unsigned) != np.ascontiguousarray(expected).view(
        unsigned
    )
    if differing.any():
        where = tuple(int(index) for index in np.argwhere(differing.reshape(expected.shape))[0])
        raise AssertionError(
            f"{what}: {int(differing.sum())} of {expected.size} elements differ, first at "
            f"{list(where)}: {actual[where]!r} instead of {expected[where]!r}"
        )


def assert_within(
    actual: np.ndarray, exact: np.ndarray, relative: float, what: str, floor: float = 0.0
) -> None:
    """No element deviates by more than `relative` times the largest magnitude of `exact`."""
    if actual.shape != exact.shape:
        raise AssertionError(f"{what}: shape {actual.shape} instead of {exact.shape}")
    error = relative_error(np.asarray(actual, np.float64), exact, floor)
    if not error <= relative:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {relative:.0e}")


def assert_trace_within(
    config: ALiBiConfig,
    actual: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    budget: Budget,
    dtype: str,
    what: str,
) -> dict[str, float]:
    """Every intermediate within the budget, naming the first that leaves it; returns the errors."""
    for name, value in actual.items():
        expected = "float32" if dtype == "bfloat16" and name.endswith("biased_logits") else dtype
        if str(value.dtype) != expected:
            raise AssertionError(f"{what} {name}: dtype {value.dtype} instead of {expected}")
        if value.shape != exact[name].shape:
            raise AssertionError(f"{what} {name}: shape {value.shape}, not {exact[name].shape}")
    errors = activation_errors(config, actual, exact)
    for name, error in errors.items():
        if not error <= budget.forward:
            limit = f"{budget.forward:.0e}"
            raise AssertionError(f"{what} {name}: relative error {error:.2e} exceeds {limit}")
    return errors


def assert_comparable(
    errors: Mapping[str, Mapping[str, float]], ratio: float, resolution: float
) -> None:
    """No implementation errs more than `ratio` times as much as another, layer by layer.

    Errors below `resolution` are indistinguishable from one rounding of the largest element.
    """
    for name in next(iter(errors.values())):
        by_size = sorted(errors, key=lambda implementation: errors[implementation][name])
        least, most = by_size[0], by_size[-1]
        limit = ratio * max(errors[least][name], resolution)
        if errors[most][name] > limit:
            raise AssertionError(
                f"{name}: {most} errs by {errors[most][name]:.2e}, {least} by only "
                f"{errors[least][name]:.2e}"
            )


def assert_gradients_within(
    actual: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], relative: float, what: str
) -> dict[str, float]:
    """The same parameters, every element of every gradient within `relative`; the errors."""
    if set(actual) != set(exact):
        raise AssertionError(f"{what}: gradients of {sorted(set(actual) ^ set(exact))} missing")
    floor = gradient_floor(exact)
    errors = {}
    for name, gradient in exact.items():
        assert_within(actual[name], gradient, relative, f"{what} gradient of {name}", floor)
        errors[name] = relative_error(np.asarray(actual[name], np.float64), gradient, floor)
    return errors


def _assert_alike(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype} instead of {expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {actual.shape} instead of {expected.shape}")
