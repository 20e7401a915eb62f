"""The tree of states that an optax transformation keeps: what each holds, by type (SPEC.md §17).

A position in the tree says nothing: transformations are chained, masked and wrapped in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.optimizers.state import KINDS

# What a field of a state is, unless it is a moment, which is called by torch's word for it.
INNER = "states"
COUNT = "how many updates were made, which the next one depends on"
TALLY = "how many updates were made, for information"
OPTIONS = "hyperparameters"
START = "zero, unless something has begun that torch has no word for"
RECORD = "a record of the last step, which the next one does not read"

_INJECTED = {"count": TALLY, "hyperparams": OPTIONS, "inner_state": INNER}
STATES: Mapping[str, Mapping[str, str]] = {
    "EmptyState": {},
    "ScaleByAdamState": {"count": COUNT, "mu": "exp_avg", "nu": "exp_avg_sq"},
    "TraceState": {"trace": "momentum_buffer"},
    "ScaleByLionState": {"count": TALLY, "mu": "exp_avg"},
    "ScaleByScheduleState": {"count": COUNT},
    "WrappedScheduleState": {"count": COUNT},
    "MaskedState": {"inner_state": INNER},
    "PartitionState": {"inner_states": INNER},
    "InjectHyperparamsState": _INJECTED,
    "InjectStatefulHyperparamsState": {**_INJECTED, "hyperparams_states": INNER},
    "MultiStepsState": {
        **{"mini_step": START, "gradient_step": COUNT, "inner_opt_state": INNER},
        **{"acc_grads": START, "skip_state": RECORD},
    },
    "ApplyIfFiniteState": {
        **{"notfinite_count": START, "last_finite": RECORD, "total_notfinite": START},
        "inner_state": INNER,
    },
}
KIND_OF = {"ScaleByAdamState": "adam", "TraceState": "sgd", "ScaleByLionState": "lion"}
_UNSAYABLE = {
    "ScaleByAmsgradState": "optax keeps the largest nu after correction of its bias, torch before",
    "FactoredState": "its second moments are factored",
}


@dataclass(frozen=True)
class Saved:
    """A state that was read from a file, which does not know its type.

    Attributes:
        state: the type with these fields, a key of `STATES`.
        values: by field.
    """

    state: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """One field of a state somewhere in a tree.

    Attributes:
        path: how Python reaches it.
        state: the type it belongs to, a key of `STATES`.
        role: what it is: a value of `STATES`.
        value: what it holds.
    """

    path: str
    state: str
    role: str
    value: Any

    @property
    def is_moment(self) -> bool:
        """Whether it is a tree like the params, which torch keeps too."""
        return self.state in KIND_OF and self.role in KINDS[KIND_OF[self.state]].moments


def fields(node: Any, path: str) -> Iterator[Field]:
    """Every field of every state in a tree.

    Raises:
        CheckpointError: a state that is not known.
    """
    state = _state(node, path)
    if state is None:
        for key, child in _children(node, path):
            yield from fields(child, f"{path}[{key!r}]")
        return
    for name, role in STATES[state].items():
        value = node.values.get(name) if isinstance(node, Saved) else getattr(node, name)
        if role == INNER:
            yield from fields(value, f"{path}.{name}")
        else:
            yield Field(f"{path}.{name}", state, role, value)


def rebuilt(node: Any, filled: Callable[[Field], Any], path: str) -> Any:
    """The same tree with other values in its fields."""
    state = _state(node, path)
    if state is None:
        children = {
            key: rebuilt(child, filled, f"{path}[{key!r}]") for key, child in _children(node, path)
        }
        return type(node)(children if isinstance(node, Mapping) else children.values())
    values = {}
    for name, role in STATES[state].items():
        value, where = getattr(node, name), f"{path}.{name}"
        is_inner = role == INNER
        values[name] = (
            rebuilt(value, filled, where) if is_inner else filled(Field(where, state, role, value))
        )
    return node._replace(**values)


def _state(node: Any, path: str) -> str | None:
    """The type of a state, None for what only holds states."""
    if isinstance(node, Saved):
        return node.state
    if not hasattr(node, "_fields"):
        return None
    name = type(node).__name__
    if name not in STATES or not type(node).__module__.startswith("optax."):
        reason = _UNSAYABLE.get(name, f"known are {', '.join(STATES)}")
        raise CheckpointError(f"{path} is a {name}, which torch has no word for: {reason}")
    return name


def _children(node: Any, path: str) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return node.items()
    if isinstance(node, tuple | list):
        return enumerate(node)
    raise CheckpointError(
        f"{path} is a {type(node).__name__} in no state that is known; known are "
        f"{', '.join(STATES)}"
    )
