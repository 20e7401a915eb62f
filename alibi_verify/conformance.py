"""Runs an implementation through the kit of `alibi_spec.conformance` and says where it differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alibi_spec import ALiBiConfig
from alibi_spec.budgets import (
    AGREEMENTS,
    BUDGETS,
    Budget,
    activation_errors,
    gradient_floor,
    relative_error,
)
from alibi_spec.conformance import LEVELS, Case, read_cases
from alibi_verify.factories import told

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: "level/name".
        level: of the case.
        status: "ok", "failed", or "refused": the implementation does not know the configuration.
        tensor: that with the largest error; of a failure the first that is wrong.
        error, limit: relative to the tensor, as its budget says (README.md of the kit).
        found: the rest of a sentence that begins with the case: what was measured, or the reason.
    """

    case: str
    level: str
    status: str
    tensor: str | None
    error: float | None
    limit: float | None
    found: str


@dataclass(frozen=True)
class Conformance:
    """The result of all cases.

    Attributes:
        implementation, dtype, device: as the implementation calls them.
        levels: of each level that was asked for: "conforms", "conforms in part" (some
            configurations were refused), "refused" (all of them), "fails" or "not offered".
        outcomes: of every case.
    """

    implementation: str
    dtype: str
    device: str
    levels: Mapping[str, str]
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """No case failed, and some were run."""
        statuses = [outcome.status for outcome in self.outcomes]
        return "failed" not in statuses and "ok" in statuses

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values; an infinite error is null, as is that of no tensor."""
        cases = [asdict(outcome) for outcome in self.outcomes]
        for case in cases:
            if case["error"] is not None and not np.isfinite(case["error"]):
                case["error"] = None
        return {**asdict(self), "passed": self.passed, "outcomes": cases}


def offered_levels(implementation: Any, levels: Iterable[str] | None = None) -> list[str]:
    """The levels whose functions the implementation has, in order.

    Args:
        levels: those that it must have; None is any.

    Raises:
        ValueError: it has no function of the kit, or none of a level that was asked for.
    """
    functions = {level: LEVELS[level].function for level in LEVELS}
    offered = [each for each in LEVELS if hasattr(implementation, functions[each])]
    if not offered:
        names = ", ".join(functions.values())
        raise ValueError(
            f"{_name(implementation)} has none of the kit's functions; expected some of {names}"
        )
    for level in levels or ():
        if level not in offered:
            raise ValueError(
                f"{_name(implementation)} does not offer the level {level}; expected a function "
                f"{functions[level]}"
            )
    return [each for each in offered if levels is None or each in levels]


def budget_of(implementation: Any) -> Budget:
    """The row of budgets for its dtype and device.

    What is expected is stored in float32, so that wider dtypes have the same row.

    Raises:
        ValueError: there is no such row.
    """
    dtype, device = _dtype(implementation), _device(implementation)
    row = BUDGETS.get(("float32" if dtype == "float64" else dtype, device))
    if row is None:
        rows = ", ".join(f"{dtype} on {device}" for dtype, device in BUDGETS)
        raise ValueError(
            f"{_name(implementation)} computes in {dtype} on {device}, which has no budget; "
            f"expected one of: {rows}"
        )
    return row


def conformance_steps(
    implementation: Any, levels: Iterable[str] | None = None
) -> Iterator[Outcome]:
    """The outcomes of the cases one by one.

    Args:
        implementation: with some of the functions of `alibi_spec.conformance.Implementation`.
        levels: of `LEVELS`; None is all that are offered.

    Raises:
        ValueError: as for `offered_levels` and `budget_of`.
        DamagedKitError: a file of the kit is damaged.
    """
    budget = budget_of(implementation)
    for case in read_cases(offered_levels(implementation, levels)):
        yield outcome_of(implementation, case, budget)


def conformance_of(
    implementation: Any, outcomes: Iterable[Outcome], levels: Iterable[str] | None = None
) -> Conformance:
    """What the outcomes of all cases say together; `levels` as for `conformance_steps`."""
    kept = tuple(outcomes)
    asked = LEVELS if levels is None else [level for level in LEVELS if level in set(levels)]
    by_level = {
        level: {outcome.status for outcome in kept if outcome.level == level} for level in asked
    }
    return Conformance(
        *(_name(implementation), _dtype(implementation), _device(implementation)),
        {level: _verdict(statuses) for level, statuses in by_level.items()},
        kept,
    )


def conformance(implementation: Any, levels: Iterable[str] | None = None) -> Conformance:
    """Run the kit; arguments and errors are those of `conformance_steps`."""
    levels = None if levels is None else tuple(levels)
    return conformance_of(implementation, conformance_steps(implementation, levels), levels)


def outcome_of(implementation: Any, case: Case, budget: Budget) -> Outcome:
    """Run one case."""
    level = LEVELS[case.level]
    try:
        returned = getattr(implementation, level.function)(**case.arguments)
    except NotImplementedError as refusal:
        return _without_numbers(case, "refused", f"refused: {refusal}")
    except Exception as error:  # whatever a foreign implementation raises is its failure
        return _without_numbers(case, "failed", f"raised {told(error)}")
    found = returned if level.result is None else {level.result: returned}
    unlike = _unlike(case, found)
    if unlike is not None:
        return _without_numbers(case, "failed", unlike)
    arrays = {name: np.asarray(array) for name, array in found.items()}
    floats = {
        name: array if array.dtype.kind in "iu" else array.astype(np.float32)
        for name, array in arrays.items()
    }
    return _judged(case, floats, budget)


def _judged(case: Case, found: Arrays, budget: Budget) -> Outcome:
    errors = {name: _error(case, name, found, budget) for name in case.expected if name in found}
    wrong = [name for name, (error, limit) in errors.items() if not error <= limit]
    worst = max(errors, key=lambda name: _share(*errors[name]))
    name = wrong[0] if wrong else worst
    error, limit = errors[name]
    measured = f"{name} errs by {error:.1e}, limit {limit:.0e}" if limit else f"{name} is exact"
    if wrong:
        measured = _difference(name, found[name], case.expected[name], error, limit)
    status = "failed" if wrong else "ok"
    return Outcome(case.title, case.level, status, name, error, limit, measured)


def _error(case: Case, name: str, found: Arrays, budget: Budget) -> tuple[float, float]:
    """The relative error of one tensor, and how large it may be."""
    exact = {key: array.astype(np.float64) for key, array in case.expected.items()}
    value, expected = found[name].astype(np.float64), exact[name]
    if case.budget == "exact" or case.expected[name].dtype.kind in "iu":
        return relative_error(value, expected), 0.0
    if name.endswith("biased_logits"):
        return _logits_error(case, name, found[name]), budget.forward
    if case.budget == "gradient":
        return relative_error(value, expected, gradient_floor(exact)), budget.gradient
    if case.budget == "training" and "/" in name:
        limit = max(AGREEMENTS["float32 training"].relative, budget.gradient)
        return _update_error(case, name, value), limit
    return relative_error(value, expected), budget.forward


def _logits_error(case: Case, name: str, found: np.ndarray) -> float:
    """Relative to the q·k part (`alibi_spec.budgets.activation_errors`)."""
    layer = name.removesuffix("biased_logits")  # nothing at the level of bias
    arrays = {**case.inputs, **case.expected}
    exact = {
        f"layer.{part}": arrays[f"{layer}{part}"].astype(np.float64)
        for part in ("query", "key", "biased_logits")
    }
    config = ALiBiConfig.from_dict(case.options["config"])
    errors = activation_errors(config, {"layer.biased_logits": found}, exact)
    return errors["layer.biased_logits"]


def _update_error(case: Case, name: str, found: np.ndarray) -> float:
    """Relative to the largest change of any array of its kind in this step."""
    kind = f"{name.partition('/')[0]}/"
    before = {key: case.inputs[key].astype(np.float64) for key in case.inputs if kind in key}
    moves = {key: case.expected[key] - array for key, array in before.items()}
    largest = max(float(np.abs(move).max()) for move in moves.values())
    return relative_error(found - before[name], moves[name], largest)


def _unlike(case: Case, found: Any) -> str | None:
    """How what was returned differs in names, dtypes or shapes, or None."""
    if not isinstance(found, Mapping):
        return f"returned {type(found).__name__}, expected arrays by name"
    # Of a model only the result must be shown.
    required = list(case.expected)[-1:] if case.level == "model" else case.expected
    if missing := [name for name in required if name not in found]:
        return f"{missing[0]} is missing, and {len(missing) - 1} others"
    if unknown := [name for name in found if name not in case.expected]:
        return f"{unknown[0]!r} is not expected; known are {', '.join(case.expected)}"
    for name, expected in case.expected.items():
        if name in found:
            array = np.asarray(found[name])
            is_integer = array.dtype.kind in "iu"
            if array.dtype.kind in "OSUb" or is_integer != (expected.dtype.kind in "iu"):
                return f"{name} has dtype {array.dtype}, expected {expected.dtype}"
            if array.shape != expected.shape:
                return f"{name} has shape {list(array.shape)}, expected {list(expected.shape)}"
    return None


def _difference(
    name: str, found: np.ndarray, expected: np.ndarray, error: float, limit: float
) -> str:
    """Where the largest deviation is; NaN and misplaced infinities count most."""
    with np.errstate(invalid="ignore"):
        deviation = np.where(found == expected, 0, np.abs(found - expected))
    place = np.unravel_index(np.nan_to_num(deviation, nan=np.inf).argmax(), deviation.shape)
    allowed = f"limit {limit:.0e}" if limit else "and must be exact"
    return (
        f"{name} errs by {error:.1e}, {allowed}; most at {[int(each) for each in place]}: "
        f"{found[place]:.7g} instead of {expected[place]:.7g}"
    )


def _share(error: float, limit: float) -> float:
    """How much of the limit is taken."""
    return error / limit if limit else (float("inf") if error else 0.0)


def _without_numbers(case: Case, status: str, found: str) -> Outcome:
    return Outcome(case.title, case.level, status, None, None, None, found)


def _verdict(statuses: set[str]) -> str:
    if not statuses:
        return "not offered"
    if "failed" in statuses:
        return "fails"
    if statuses == {"refused"}:
        return "refused"
    return "conforms in part" if "refused" in statuses else "conforms"


def _name(implementation: Any) -> str:
    return str(getattr(implementation, "name", type(implementation).__name__))


def _dtype(implementation: Any) -> str:
    return str(getattr(implementation, "dtype", "float32"))


def _device(implementation: Any) -> str:
    return str(getattr(implementation, "device", "cpu"))
