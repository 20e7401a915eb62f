"""Frozen records of options, each with a default, the values it takes, and what it means."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from alibi_spec.biases import SLOPE_RULES


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, whose dtype cannot reach a model."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool | int) else value


def plain_tuple(values: Any) -> Any:
    """Lists, arrays and tuples, also of one another, as tuples of plain numbers."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    return tuple(map(plain_tuple, values)) if isinstance(values, list | tuple) else plain(values)


class Kind(NamedTuple):
    """The values that an option takes, their description in an error, and their plain form."""

    is_valid: Callable[[Any], bool]
    expected: str
    plain: Callable[[Any], Any] = plain


def option(default: Any, kind: Kind, meaning: str) -> Any:
    """A field of a dataclass with what `kind_of` and `meaning_of` return."""
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning})


def kind_of(field: dataclasses.Field[Any]) -> Kind:
    """The values that an option takes."""
    return field.metadata["kind"]


def meaning_of(field: dataclasses.Field[Any]) -> str:
    """What an option means, as a sentence that begins with its name."""
    return field.metadata["meaning"]


class Options:
    """What every record of options has: its checks, and plain JSON values both ways."""

    KIND: ClassVar[str]  # what an error calls the record
    ELSEWHERE: ClassVar[Mapping[str, str]] = {}  # names in other libraries, and ours

    def __post_init__(self) -> None:
        for field in _fields(self):
            kind = kind_of(field)
            value = kind.plain(getattr(self, field.name))
            if not kind.is_valid(value):
                raise ValueError(f"{field.name}={value!r} is not valid; expected {kind.expected}")
            object.__setattr__(self, field.name, value)
        for is_wrong, problem in self._contradictions():
            if is_wrong:
                raise ValueError(problem)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """Options that are each valid, but impossible together."""
        return iter(())

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain JSON values."""
        return {field.name: _as_list(getattr(self, field.name)) for field in _fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent options take their defaults.

        Raises:
            ValueError: an unknown option (the nearest known one is named) or an invalid value.
        """
        cls.refuse_unknown(values)
        return cls(**values)

    def to_json(self) -> str:
        """Every option as an indented JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a JSON object, an unknown option or an invalid value.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the {cls.KIND} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"the {cls.KIND} is a JSON {type(values).__name__}, not an object")
        return cls.from_dict(values)

    @classmethod
    def refuse_unknown(cls, names: Iterable[Any]) -> None:
        """Raise ValueError for the first name that is no option, with the nearest that is."""
        known = [field.name for field in _fields(cls)]
        for name in names:
            if name not in known:
                nearest = [cls.ELSEWHERE[name]] if name in cls.ELSEWHERE else None
                nearest = nearest or difflib.get_close_matches(str(name), known, n=1)
                every = ", ".join(known)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known: {every}"
                raise ValueError(f"unknown option {name!r} in the {cls.KIND}; {hint}")


_Record = TypeVar("_Record", bound=type[Options])


def with_options_documented(record: _Record) -> _Record:
    """List the options in the docstring; let the constructor suggest the nearest option."""
    lines = [f"{field.name}: {meaning_of(field)}" for field in _fields(record)]
    listed = [textwrap.fill(line, 96, subsequent_indent="    ") for line in lines]
    attributes = textwrap.indent("\n".join(listed), 8 * " ")
    record.__doc__ = f"{record.__doc__}\n    Attributes:\n{attributes}\n"
    changed: Any = record  # to pyright every record has a constructor of its own
    make = changed.__init__

    @functools.wraps(make)
    def init(self: Options, *values: Any, **options: Any) -> None:
        record.refuse_unknown(options)
        make(self, *values, **options)

    changed.__init__ = init
    return record


def _fields(record: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The options of a record, which is a dataclass."""
    return dataclasses.fields(record)


def _as_list(value: Any) -> Any:
    return list(map(_as_list, value)) if isinstance(value, tuple) else value


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1 that fits 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def or_none(kind: Kind) -> Kind:
    """The same values and None."""
    expected = f"None or {kind.expected}"
    return Kind(lambda value: value is None or kind.is_valid(value), expected, kind.plain)


def one_of(choices: tuple[str, ...]) -> Kind:
    """One of a few words."""
    return Kind(lambda value: isinstance(value, str) and value in choices, f"one of {choices}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 2.0**100  # well inside float32; NaN is not


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_not_negative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_natural(value: Any) -> bool:
    return is_count(value) or (isinstance(value, int) and value is not False and value == 0)


def _is_cutoffs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(is_count, value))


def _is_slopes(value: Any) -> bool:
    if isinstance(value, str):
        return value in SLOPE_RULES
    if not isinstance(value, tuple) or not value:
        return False
    if all(isinstance(layer, tuple) for layer in value):
        return all(layer and all(map(_is_not_negative, layer)) for layer in value)
    return all(map(_is_not_negative, value))


COUNT = Kind(is_count, "an integer of at least 1")
NATURAL = Kind(_is_natural, "an integer of at least 0")
NOT_NEGATIVE = Kind(_is_not_negative, "a number of at least 0")
SHARE = Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
RATE = Kind(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
FLAG = Kind(lambda value: isinstance(value, bool), "True or False")
POSITIVE = Kind(_is_positive, "a number above 0")
EXPONENT = Kind(lambda value: _is_positive(value) and value <= 100, "a number in (0, 100]")
CUTOFFS = Kind(_is_cutoffs, "rising integers of at least 1", plain_tuple)
SLOPES = Kind(
    _is_slopes,
    f"one of {SLOPE_RULES}, one finite number >= 0 per head, or one such tuple per layer",
    plain_tuple,
)
TEXT = Kind(lambda value: isinstance(value, str) and bool(value), "a text")
TEXTS = Kind(
    lambda value: isinstance(value, tuple) and all(isinstance(each, str) for each in value),
    "a list of texts",
    plain_tuple,
)
