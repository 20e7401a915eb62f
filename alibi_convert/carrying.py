"""Optimizer states on their way through a conversion: carried, or dropped with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import first_difference_of_tensors
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.optimizers.file import as_file, from_file
from alibi_convert.optimizers.optax_state import SHARED_OPTIONS, from_optax
from alibi_convert.optimizers.saved import from_saved, to_saved
from alibi_convert.optimizers.state import OptimizerState
from alibi_convert.optimizers.torch_state import from_torch, to_torch
from alibi_convert.writing.layout import OPTIMIZER_FILE
from alibi_spec import ALiBiConfig

_READERS: Mapping[str, Callable[[Any, ALiBiConfig], OptimizerState]] = {
    "file": from_file,
    "torch": from_torch,
    "optax": from_saved,
}
# What the formats write that have room for it; an optax state is that of a transformation, `tx`.
_WRITTEN: Mapping[str, Callable[[OptimizerState, ALiBiConfig, Any], Any]] = {
    "alibi": lambda state, _config, _tx: as_file(state),
    "pt": lambda state, config, _tx: to_torch(state, config),
    "msgpack": to_saved,
    "orbax": to_saved,
}
# The state in that: torch has every option, with its defaults, and optax those that are injected.
_REREAD: Mapping[str, Callable[[Any, ALiBiConfig], OptimizerState]] = {
    "pt": from_torch,
    "msgpack": lambda written, config: from_optax(written["opt_state"], config),
    "orbax": lambda written, config: from_optax(written["opt_state"], config),
}
_OPTAX = ("msgpack", "orbax")


@dataclass(frozen=True)
class Carried:
    """The optimizer state of a source, on the way to a format.

    Attributes:
        dropped: what is left of the source, with the reason.
        state: None where there is none, or it is dropped.
        written: the same as the format has it; None in a plan.
    """

    dropped: Mapping[str, str]
    state: OptimizerState | None = None
    written: Any = None

    @property
    def writing(self) -> dict[str, Any]:
        """The option of the format that writes it, if there is anything to write."""
        return {} if self.state is None else {"optimizer": self.written}

    @property
    def nbytes(self) -> int:
        """Bytes that the destination needs for it."""
        return 0 if self.state is None else self.state.nbytes

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it, as plain JSON values."""
        if self.state is None:
            return {}
        return {
            "kind": self.state.kind,
            "step": self.state.step,
            "moments": list(self.state.moments),
            "parameters": len(self.state.names),
            "nbytes": self.nbytes,
        }


def carried(source: Checkpoint, to: str, tx: Any = None, is_planned: bool = False) -> Carried:
    """The optimizer state of a source, if it has one that can be read and written.

    Args:
        to: the format of the destination.
        tx: the transformation whose state an optax format gets; None is the plain one of its kind.
        is_planned: whether nothing is to be written.

    Raises:
        CheckpointError: the file in a folder of ours is broken; or `tx` is given, and its state is
            not written.
    """
    if tx is not None and to not in _OPTAX:
        raise CheckpointError(f"{to} has no place for the state of tx; expected {_listed(_OPTAX)}")
    found = _carried(source, to, tx, is_planned)
    if tx is not None and found.state is None:
        beside = source.optimizer
        reason = "the source holds none" if beside is None else found.dropped[beside.name]
        raise CheckpointError(f"the state of tx cannot be written: {reason}")
    return found


def _carried(source: Checkpoint, to: str, tx: Any, is_planned: bool) -> Carried:
    beside = source.optimizer
    if beside is None:
        return Carried(source.derived)

    def left(reason: str) -> Carried:
        return Carried({**source.derived, beside.name: reason})

    if to not in _WRITTEN:
        return left(f"an optimizer's state is written only to {_listed(_WRITTEN)}")
    try:
        state = optimizer_of(source)
    except CheckpointError as error:
        if beside.layout == "file":  # of ours, which can be read unless it is broken
            raise
        return left(str(error).splitlines()[0])
    others = {name: reason for name, reason in source.derived.items() if name != beside.name}
    if is_planned:
        lost = _options(state) if to in _OPTAX else []
        return Carried(others | _lost(lost, beside.name), state)
    try:
        written = _WRITTEN[to](state, source.config, tx)
    except CheckpointError as error:
        return left(str(error).splitlines()[0])
    expected = _expected(state, written, to, source.config)
    lost = [word for word in _options(state) if word not in _options(expected)]
    return Carried(others | _lost(lost, beside.name), expected, written)


def _expected(state: OptimizerState, written: Any, to: str, config: ALiBiConfig) -> OptimizerState:
    """The state with the step and the options that the destination has: read from memory.

    The moments, which are most of it, stay those of the source.
    """
    if to not in _REREAD:
        return state
    return replace(_REREAD[to](written, config), moments=state.moments)


def _options(state: OptimizerState) -> list[str]:
    """The options that both frameworks have and this state holds."""
    held = {word for group in state.groups for word in group.options}
    return [word for word in SHARED_OPTIONS if word in held]


def _lost(options: Sequence[str], name: str) -> dict[str, str]:
    """What a report says of options that the destination does not hold."""
    reason = "optax has them in the transformation, not in its state; set them there"
    return {f"{', '.join(options)} of {name}": reason} if options else {}


def _listed(formats: Iterable[str]) -> str:
    *others, last = formats
    return f"{', '.join(others)} and {last}"


def optimizer_of(source: Checkpoint) -> OptimizerState:
    """The optimizer state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    beside = source.optimizer
    if beside is None:
        raise CheckpointError(f"{source.path} holds no optimizer's state")
    return _READERS[beside.layout](beside.read(), source.config)


def open_optimizer(path: str | os.PathLike[str], **reading: Unpack[Reading]) -> OptimizerState:
    """The optimizer state that a checkpoint of ours has beside the model, in the neutral form.

    Raises:
        CheckpointError: as for `open_checkpoint`; or there is none, or it cannot be read.
    """
    return optimizer_of(open_checkpoint(path, **reading))


def save_optimizer(folder: str | os.PathLike[str], state: OptimizerState) -> None:
    """Write the state into a checkpoint folder, in place of the one that is there."""
    place = Path(folder) / OPTIMIZER_FILE
    draft = place.with_name(f"{place.name}.new")
    write_safetensors(draft, *as_file(state))
    draft.replace(place)


def require_same_optimizer(wanted: OptimizerState, found: OptimizerState) -> None:
    """Raise MismatchError unless two states are the same, bit by bit."""
    for name in ("kind", "step", "groups"):
        if getattr(wanted, name) != getattr(found, name):
            raise MismatchError(f"the optimizer's {name} is not what was to be written")
    for word, tensors in wanted.moments.items():
        difference = first_difference_of_tensors(tensors, found.moments[word])
        if difference is not None:
            raise MismatchError(f"the optimizer's {word} differs: {difference}")
