"""An optimizer's state as both frameworks can say it: canonical names, torch layout (SPEC.md §17).

Nothing here knows how either framework lays it out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.rules import check_shapes
from alibi_convert.tensors import DTYPES, Tensors, as_numpy
from alibi_spec import ALiBiConfig, parameter_table


@dataclass(frozen=True)
class Kind:
    """What optimizers of one kind keep.

    Attributes:
        moments: of every parameter, in torch's words.
        has_step: whether torch keeps with each parameter how often it was updated.
        options: of a param group in torch, by which the kind is told.
        lacks: options that others have besides.
    """

    moments: tuple[str, ...]
    has_step: bool
    options: frozenset[str]
    lacks: frozenset[str] = frozenset()


KINDS: Mapping[str, Kind] = {
    "adam": Kind(("exp_avg", "exp_avg_sq"), True, frozenset(("betas", "eps", "amsgrad"))),
    "sgd": Kind(("momentum_buffer",), False, frozenset(("dampening", "nesterov"))),
    "lion": Kind(("exp_avg",), False, frozenset(("betas",)), frozenset(("eps",))),
}


@dataclass(frozen=True)
class Group:
    """Parameters with the same options.

    Attributes:
        parameters: their names, in torch's order.
        options: in torch's words, as far as they are known.
    """

    parameters: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer has to remember between two updates.

    Attributes:
        kind: a key of `KINDS`.
        step: how many updates were made; None where the source does not say.
        moments: by torch's word, then by parameter; parameters that were never updated are absent.
        groups: every parameter of the optimizer, once.
    """

    kind: str
    step: int | None
    moments: Mapping[str, Tensors]
    groups: tuple[Group, ...]

    @property
    def names(self) -> list[str]:
        """The parameters that have moments."""
        return list(next(iter(self.moments.values())))

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(tensors.nbytes for tensors in self.moments.values())

    def options(self, names: Collection[str]) -> dict[str, Any]:
        """The options of some parameters, which must agree on them.

        Raises:
            CheckpointError: they do not.
        """
        groups = [group for group in self.groups if not set(names).isdisjoint(group.parameters)]
        words = dict.fromkeys(word for group in groups for word in group.options)
        return {word: _agreed(word, groups) for word in words}


def _agreed(word: str, groups: Iterable[Group]) -> Any:
    """The value of one option; parameters without weight decay are a mask's, not a difference."""
    found = {group.parameters[0]: group.options.get(word) for group in groups}
    decays = {name: value for name, value in found.items() if word != "weight_decay" or value}
    (first, value), *others = (decays or found).items()
    for name, other in others:
        if other != value:
            raise CheckpointError(
                f"{word} is {value} for {first} and {other} for {name}, and one value is expected "
                "for both; give them states of their own (optax.partition) or groups of their own"
            )
    return value


def scalar(what: str, value: Any) -> Any:
    """The Python number that an array without axes holds.

    Raises:
        CheckpointError: it is something else; `what` names it.
    """
    array = np.zeros(1) if isinstance(value, Mapping | list | tuple) else as_numpy(value)
    if array.ndim or not (array.dtype.kind in "biuf" or array.dtype in DTYPES.values()):
        raise CheckpointError(f"{what} is a {type(value).__name__}, expected one number")
    return array.item()


def whole(what: str, value: Any) -> int:
    """The number of steps in an array without axes.

    Raises:
        CheckpointError: it is something else; `what` names it.
    """
    number = float(scalar(what, value))
    if not (number.is_integer() and number >= 0):
        raise CheckpointError(f"{what} is {number}, expected a whole number")
    return int(number)


def check_state(state: OptimizerState, config: ALiBiConfig) -> OptimizerState:
    """The state, held against the parameter table.

    Raises:
        CheckpointError: names or shapes of another model, or dtypes that are no floats.
    """
    shapes = {row.name: row.shape for row in parameter_table(config)}
    grouped = {name for group in state.groups for name in group.parameters}
    for name in state.names:
        if name not in grouped:
            raise CheckpointError(f"{name} has moments and is in no group of the optimizer")
    for word, tensors in state.moments.items():
        for name in set(tensors).symmetric_difference(state.names):
            raise CheckpointError(f"{name} does not have all of {', '.join(state.moments)}")
        expected = {name: shape for name, shape in shapes.items() if name in tensors}
        try:
            check_shapes(expected, tensors.shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{word}: {error}") from None
        for name, header in tensors.headers.items():
            if header.dtype not in DTYPES.values():
                raise CheckpointError(
                    f"{word} of {name} is {header.dtype}; expected one of {', '.join(DTYPES)}"
                )
    return state
