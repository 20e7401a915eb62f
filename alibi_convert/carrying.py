"""Optimizer states on their way through a conversion: carried, or dropped with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import first_difference_of_tensors
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.optimizers.file import as_file, from_file
from alibi_convert.optimizers.saved import from_saved
from alibi_convert.optimizers.state import OptimizerState
from alibi_convert.optimizers.torch_state import from_torch, to_torch
from alibi_convert.writing.layout import OPTIMIZER_FILE
from alibi_spec import ALiBiConfig

_READERS: Mapping[str, Callable[[Any, ALiBiConfig], OptimizerState]] = {
    "file": from_file,
    "torch": from_torch,
    "optax": from_saved,
}
# What the formats write that have room for it.
_WRITTEN: Mapping[str, Callable[[OptimizerState, ALiBiConfig], Any]] = {
    "alibi": lambda state, _: as_file(state),
    "pt": to_torch,
}


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


def carried(source: Checkpoint, to: str, is_planned: bool = False) -> Carried:
    """The optimizer state of a source, if it has one that can be read and written.

    Raises:
        CheckpointError: the file in a folder of ours is broken.
    """
    beside = source.optimizer
    if beside is None:
        return Carried(source.derived)
    others = {name: reason for name, reason in source.derived.items() if name != beside.name}
    if to not in _WRITTEN:
        reason = f"an optimizer's state is written only to {' and '.join(_WRITTEN)}"
        return Carried({**source.derived, beside.name: reason})
    try:
        state = optimizer_of(source)
        written = None if is_planned else _WRITTEN[to](state, source.config)
        return Carried(others, state, written)
    except CheckpointError as error:
        if beside.layout == "file":  # of ours, which can be read unless it is broken
            raise
        return Carried({**source.derived, beside.name: str(error).splitlines()[0]})


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
