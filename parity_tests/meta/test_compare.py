"""The comparisons themselves: they see one bit, one element, one NaN, one shape, one dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alibi_spec import ALiBiConfig, biased_logits, model_slopes
from alibi_spec.budgets import BUDGETS, activation_errors, relative_error
from parity_tests.compare import (
    assert_bitwise,
    assert_comparable,
    assert_gradients_within,
    assert_trace_within,
    assert_within,
)

EXACT = np.linspace(-3, 5, 24).reshape(2, 3, 4)
BUDGET = BUDGETS["float32", "cpu"]
CONFIG = ALiBiConfig(d_model=8, num_heads=2)


def test_bitwise_sees_one_ulp() -> None:
    array = EXACT.astype(np.float32)
    assert_bitwise(array.copy(), array, "same")
    moved = array.copy()
    moved[1, 2, 3] = np.nextafter(moved[1, 2, 3], np.float32(9))
    with pytest.raises(AssertionError, match=r"1 of 24 elements differ, first at \[1, 2, 3\]"):
        assert_bitwise(moved, array, "moved")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.float32([0.0]), np.float32([-0.0])),
        (np.float32([1.0]), np.float64([1.0])),
        (np.float32([1.0]), np.float32([[1.0]])),
        (np.float32([np.nan]), np.float32([1.0])),
    ],
)
def test_bitwise_sees_sign_dtype_shape_and_nan(actual: np.ndarray, expected: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        assert_bitwise(actual, expected, "different")
    assert_bitwise(np.float32([np.nan, -np.inf]), np.float32([np.nan, -np.inf]), "same")


def test_within_sees_one_element() -> None:
    assert_within(EXACT.copy(), EXACT, 0.0, "same")
    moved = EXACT.copy()
    moved[0, 1, 2] += 5 * 2e-5
    assert_within(moved, EXACT, 2.1e-5, "inside")
    with pytest.raises(AssertionError, match=r"relative error 2\.00e-05 exceeds 1e-05"):
        assert_within(moved, EXACT, 1e-5, "outside")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_within_sees_what_is_not_finite(wrong: float) -> None:
    broken = EXACT.copy()
    broken[0, 0, 0] = wrong
    for actual, exact in ((broken, EXACT), (EXACT, broken)):
        if not np.isnan(exact).any():
            with pytest.raises(AssertionError):
                assert_within(actual, exact, 1.0, "not finite")
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.array([1e-30]), np.zeros(1)) == np.inf


def test_within_sees_shapes_and_dtypes() -> None:
    """float64 is no float32 result, however exact; without a name it is the dtype of `exact`."""
    narrow = EXACT.astype(np.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(EXACT[:1], EXACT, 1.0, "broadcastable")
    with pytest.raises(AssertionError, match="wide: dtype float64 instead of float32"):
        assert_within(EXACT, EXACT, 1.0, "wide", dtype="float32")
    with pytest.raises(AssertionError, match="narrow: dtype float32 instead of float64"):
        assert_within(narrow, EXACT, 1.0, "narrow")
    assert 0 < assert_within(narrow, EXACT, 1e-6, "named", dtype="float32") < 1e-6


def _exact_trace() -> dict[str, np.ndarray]:
    exact = {"layers.0": EXACT, "layers.1": EXACT, "output": EXACT}
    return {"layers.0.key": EXACT, "layers.0.query": EXACT} | exact  # shown by the reference only


def _found_trace() -> dict[str, np.ndarray]:
    return {name: EXACT.astype(np.float32) for name in ("layers.0", "layers.1", "output")}


def test_trace_names_the_first_layer() -> None:
    exact, found = _exact_trace(), _found_trace()
    assert_trace_within(CONFIG, found, exact, BUDGET, "float32", "same")
    found["layers.1"] = found["layers.1"] * np.float32(1.001)
    found["output"] = found["output"] * np.float32(1.1)
    with pytest.raises(AssertionError, match=r"layers\.1"):
        assert_trace_within(CONFIG, found, exact, BUDGET, "float32", "moved")
    found["layers.0"] = exact["layers.0"]
    with pytest.raises(AssertionError, match=r"layers\.0: dtype float64 instead of float32"):
        assert_trace_within(CONFIG, found, exact, BUDGET, "float32", "widened")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1": None}, r"\['layers\.1'\] missing"),
        ({"layers.2": EXACT}, r"\['layers\.2'\] not expected"),
        ({"layers.0": None, "layers.1": None, "output": None}, "missing"),
    ],
)
def test_trace_sees_missing_and_unknown_names(changes: dict[str, Any], message: str) -> None:
    changed = _found_trace() | changes
    found = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(AssertionError, match=message):
        assert_trace_within(CONFIG, found, _exact_trace(), BUDGET, "float32", "names")


@pytest.mark.parametrize("exact", [{}, {"layers.0.key": EXACT}])
def test_trace_of_nothing_is_refused(exact: dict[str, np.ndarray]) -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_trace_within(CONFIG, {}, exact, BUDGET, "float32", "nothing")


def test_comparable_sees_a_sloppy_backend() -> None:
    errors = {"a": {"layers.0": 1e-7, "layers.1": 2e-7}, "b": {"layers.0": 3e-7, "layers.1": 9e-6}}
    with pytest.raises(AssertionError, match=r"layers\.1: b errs"):
        assert_comparable(errors, BUDGET.ratio, 1e-7)
    errors["b"]["layers.1"] = 7e-7
    assert_comparable(errors, BUDGET.ratio, 1e-7)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({"a": {"x": 0.0, "y": 0.0}, "b": {"x": 0.0}}, r"b: \['y'\] missing"),
        ({"a": {"x": 0.0}, "b": {"x": 0.0, "y": 0.0}}, r"b: \['y'\] not expected"),
        ({"a": {}, "b": {}}, "nothing to compare"),
        ({}, "nothing to compare"),
    ],
)
def test_comparable_sees_names(errors: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_comparable(errors, BUDGET.ratio, 1e-7)


def test_gradients_see_a_missing_and_a_wrong_parameter() -> None:
    exact = {"a": EXACT, "b": EXACT / 50}
    assert_gradients_within({"a": EXACT, "b": EXACT / 50}, exact, 1e-9, "same")
    with pytest.raises(AssertionError, match=r"\['b'\] missing"):
        assert_gradients_within({"a": EXACT}, exact, 1e-9, "missing")
    with pytest.raises(AssertionError, match=r"\['c'\] not expected"):
        assert_gradients_within(exact | {"c": EXACT}, exact, 1e-9, "unknown")
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_gradients_within({}, {}, 1e-9, "nothing")
    with pytest.raises(AssertionError, match="gradient of b"):
        assert_gradients_within({"a": EXACT, "b": EXACT / 51}, exact, 1e-3, "wrong")


def test_gradients_see_dtypes() -> None:
    exact = {"a": EXACT, "b": EXACT}
    found = {"a": EXACT.astype(np.float32), "b": EXACT}
    assert_gradients_within(found, exact, 1e-6, "each", dtype={"a": "float32", "b": "float64"})
    for dtype, name in (("float32", "b"), ("float64", "a"), (None, "a")):
        with pytest.raises(AssertionError, match=f"gradient of {name}: dtype"):
            assert_gradients_within(found, exact, 1e-6, "dtypes", dtype=dtype)


def test_logits_are_not_judged_by_their_bias() -> None:
    """A q·k that is off by a percent is seen beside a bias that is a thousand times larger."""
    query, key = np.random.default_rng(0).standard_normal((2, 1, 2, 900, 4))
    slopes = model_slopes(CONFIG)[0] * 50
    right = biased_logits(query, key, slopes)
    config = ALiBiConfig(d_model=8, num_heads=2, slopes=tuple(slopes.tolist()))
    name = "layers.0.biased_logits"
    exact = {"layers.0.query": query, "layers.0.key": key, name: right}

    def error(logits: np.ndarray) -> float:
        return activation_errors(config, {name: logits}, exact)[name]

    assert error(right.astype(np.float32)) == 0.0  # one rounding of the sum is allowed
    assert error(biased_logits(query * 1.01, key, slopes)) > 0.005
    assert relative_error(biased_logits(query * 1.01, key, slopes), right) < 1e-4
    hidden = right.copy()
    hidden[0, 0, 5, 3] = -np.inf
    assert error(hidden) == np.inf
