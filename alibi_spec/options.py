"""What an option of `ALiBiConfig` is: a default, the values it takes, and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

from alibi_spec.biases import SLOPE_RULES


class Kind(NamedTuple):
    """The values that an option takes, and their description in an error."""

    is_valid: Callable[[Any], bool]
    expected: str


def option(default: Any, kind: Kind, meaning: str) -> Any:
    """A field of a dataclass with what `kind_of` and `meaning_of` return."""
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning})


def kind_of(field: dataclasses.Field[Any]) -> Kind:
    """The values that an option takes."""
    return field.metadata["kind"]


def meaning_of(field: dataclasses.Field[Any]) -> str:
    """What an option means, as a sentence that begins with its name."""
    return field.metadata["meaning"]


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, whose dtype cannot reach a model."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool | int) else value


def plain_tuple(values: Any) -> Any:
    """Lists, arrays and tuples, also of one another, as tuples of plain numbers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return plain(values)
    return tuple(map(plain_tuple, values))


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1 that fits 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def or_none(kind: Kind) -> Kind:
    """The same values and None."""
    return Kind(lambda value: value is None or kind.is_valid(value), f"None or {kind.expected}")


def one_of(choices: tuple[str, ...]) -> Kind:
    """One of a few words."""
    return Kind(lambda value: value in choices, f"one of {choices}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 2.0**100  # well inside float32; NaN is not


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_cutoffs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(is_count, value))


def _is_slopes(value: Any) -> bool:
    if isinstance(value, str):
        return value in SLOPE_RULES
    if not isinstance(value, tuple) or not value:
        return False
    if all(isinstance(layer, tuple) for layer in value):
        return all(layer and all(map(_is_slope, layer)) for layer in value)
    return all(map(_is_slope, value))


def _is_slope(value: Any) -> bool:
    return _is_number(value) and value >= 0


COUNT = Kind(is_count, "an integer of at least 1")
RATE = Kind(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
FLAG = Kind(lambda value: isinstance(value, bool), "True or False")
POSITIVE = Kind(_is_positive, "a number above 0")
EXPONENT = Kind(lambda value: _is_positive(value) and value <= 100, "a number in (0, 100]")
CUTOFFS = Kind(_is_cutoffs, "rising integers of at least 1")
SLOPES = Kind(
    _is_slopes,
    f"one of {SLOPE_RULES}, one finite number >= 0 per head, or one such tuple per layer",
)
