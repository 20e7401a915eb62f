"""The only assertions on arrays. Dtype and shape come before values; every element counts.

Tolerances are rows of `alibi_spec.budgets`; nothing here takes a literal one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from alibi_spec import ALiBiConfig
from alibi_spec.budgets import Budget, activation_errors, gradient_floor, relative_error

_SHOWN_BY_THE_REFERENCE_ONLY = ("query", "key", "value", "probabilities")


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
    actual: np.ndarray,
    exact: np.ndarray,
    relative: float,
    what: str,
    *,
    dtype: str | None = None,
    floor: float = 0.0,
) -> float:
    """No element deviates by more than `relative` times the largest magnitude of `exact`.

    `actual` has the dtype that is named, or else that of `exact`. Returns the error.
    """
    _assert_alike(actual, exact, what, dtype)
    error = relative_error(*(np.asarray(each, np.float64) for each in (actual, exact)), floor)
    if not error <= relative:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {relative:.0e}")
    return error


def assert_trace_within(
    config: ALiBiConfig,
    actual: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    budget: Budget,
    dtype: str,
    what: str,
) -> dict[str, float]:
    """Every intermediate within the budget, naming the first that leaves it; returns the errors."""
    shown = [name for name in exact if name.rpartition(".")[2] not in _SHOWN_BY_THE_REFERENCE_ONLY]
    _assert_names(actual, shown, what)
    for name in shown:
        expected = "float32" if dtype == "bfloat16" and name.endswith("biased_logits") else dtype
        _assert_alike(actual[name], exact[name], f"{what} {name}", expected)
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
    names = next(iter(errors.values()), {})
    for implementation, found in errors.items():
        _assert_names(found, names, implementation)
    _assert_names(names, names, "errors")
    for name in names:
        by_size = sorted(errors, key=lambda implementation: errors[implementation][name])
        least, most = by_size[0], by_size[-1]
        limit = ratio * max(errors[least][name], resolution)
        if errors[most][name] > limit:
            raise AssertionError(
                f"{name}: {most} errs by {errors[most][name]:.2e}, {least} by only "
                f"{errors[least][name]:.2e}"
            )


def assert_gradients_within(
    actual: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    relative: float,
    what: str,
    *,
    dtype: str | Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The same parameters, every element of every gradient within `relative`; the errors.

    Gradients have the dtype that is named, for all or for each, or else those of `exact`.
    """
    _assert_names(actual, exact, f"{what} gradients")
    floor = gradient_floor(exact)
    errors = {}
    for name, gradient in exact.items():
        expected = dtype[name] if isinstance(dtype, Mapping) else dtype
        errors[name] = assert_within(
            *(actual[name], gradient, relative, f"{what} gradient of {name}"),
            dtype=expected,
            floor=floor,
        )
    return errors


def _assert_names(actual: Collection[str], expected: Collection[str], what: str) -> None:
    """The same names, and some."""
    if missing := [name for name in expected if name not in actual]:
        raise AssertionError(f"{what}: {missing} missing")
    if unknown := [name for name in actual if name not in expected]:
        raise AssertionError(f"{what}: {unknown} not expected")
    if not expected:
        raise AssertionError(f"{what}: nothing to compare")


def _assert_alike(
    actual: np.ndarray, expected: np.ndarray, what: str, dtype: str | None = None
) -> None:
    if actual.dtype != (dtype or expected.dtype):
        raise AssertionError(f"{what}: dtype {actual.dtype} instead of {dtype or expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {actual.shape} instead of {expected.shape}")
