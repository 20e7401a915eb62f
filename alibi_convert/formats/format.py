"""What a format is: how a path is recognised as one, read, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_convert.writing.journal import Journal
from alibi_spec import ALiBiConfig


@dataclass(frozen=True)
class Asked:
    """How a path is to be read.

    Attributes:
        allow_pt: whether pickles may be.
        step: of those that orbax's CheckpointManager kept; None is the latest.
        settle: the configuration that a file carries, or None, and the one that the caller gave,
            made one; raises CheckpointError where there is none or they disagree.
    """

    allow_pt: bool
    step: int | None
    settle: Callable[[ALiBiConfig | None], ALiBiConfig]


@dataclass(frozen=True)
class Beside:
    """An optimizer's state that a path holds beside the model.

    Attributes:
        name: of the file, or the keys that lead to it.
        layout: "file" for that of a folder of ours, "torch" for a state dict, "optax" for a tree.
        read: what is there: the file's path, the state dict, the tree.
    """

    name: str
    layout: str
    read: Callable[[], Any]


@dataclass(frozen=True)
class Opened:
    """What a path holds: a configuration of ours, or a foreign one, or none; and tensors.

    Attributes:
        format: a key of `FORMATS`, or "folder" for that of another library.
        path: where it was found: of an orbax manager, the step.
        files: those with the configuration and the weights, by name.
        tensors: as they are named there, unread.
        carried: a configuration of ours.
        foreign: one of a family's.
        left: names in the file that are not of the model, with the reason; they are dropped.
        wrappers: keys that led to the tensors, and prefixes of their names that were removed.
        optimizer: of the run that trained the model.
        inside: companions that the file itself holds, by name.
    """

    format: str
    path: Path
    files: Mapping[str, Path]
    tensors: Tensors
    carried: ALiBiConfig | None = None
    foreign: Mapping[str, Any] | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    wrappers: Sequence[str] = ()
    optimizer: Beside | None = None
    inside: Callable[[], Mapping[str, bytes]] = dict


def no_steps(path: Path, step: int) -> CheckpointError:
    """The error for a step that is asked for where no manager kept any."""
    return CheckpointError(f"{path} has no steps; leave out step={step} (--step)")


class Writing(TypedDict, total=False):
    """Options of some formats.

    Those of several files know their size, and which of them are finished already. Those with room
    for an optimizer's state get it as they write it; those that hold companions, what reads them.
    """

    max_shard_bytes: int
    journal: Journal | None
    optimizer: Any
    companion: Callable[[str], bytes | None]


class Write(Protocol):
    """How a format is written, into a path that does not exist unless a conversion is resumed."""

    def __call__(
        self, path: Path, config: ALiBiConfig, tensors: Tensors, **options: Unpack[Writing]
    ) -> dict[str, str]:
        """Write the model and return the XXH3 of those files whose hash is known, by name."""
        ...


def _as_they_are(_: ALiBiConfig, tensors: Tensors) -> Tensors:
    return tensors


def _as_asked(_: str, header: LazyTensor, asked: np.dtype | None) -> np.dtype:
    return header.dtype if asked is None else asked


def _keeps_any(_: ALiBiConfig, __: Callable[[str], bytes | None]) -> None:
    return None


def _never(_: Path) -> bool:
    return False


@dataclass(frozen=True)
class Format:
    """One way to keep a model on disk.

    Attributes:
        description: one line for the help text.
        suffix: of a file; empty for a folder.
        write: into a path.
        recognises: whether a path is of this format, by its name or by what a folder holds.
        read: such a path; None for an export, which another format reads.
        streams: whether it is written a few megabytes at a time; otherwise the whole model is in
            memory at once.
        library: module without which it cannot be written, and the extra that installs it.
        stored: the canonical tensors as the files name and lay them out, unread.
        dtype: of a canonical tensor, by name, in the files, where one is asked for, or None.
        holds: names of companions whose contents the file itself keeps.
        check: raises CheckpointError for companions that it cannot keep.
    """

    description: str
    suffix: str
    write: Write
    recognises: Callable[[Path], bool] = _never
    read: Callable[[Path, Asked], Opened] | None = None
    streams: bool = False
    library: tuple[str, str] | None = None
    stored: Callable[[ALiBiConfig, Tensors], Tensors] = _as_they_are
    dtype: Callable[[str, LazyTensor, np.dtype | None], np.dtype] = _as_asked
    holds: tuple[str, ...] = ()
    check: Callable[[ALiBiConfig, Callable[[str], bytes | None]], object] = _keeps_any
