"""Checkpoints of a run: folders that both backends read, with all that training goes on from.

A folder appears whole or not at all. Which ones stay is a matter of `Run`'s options.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_convert import CheckpointError
from alibi_convert.carrying import open_optimizer
from alibi_convert.checkpoint import open_checkpoint
from alibi_convert.files import read_json
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.optimizers.file import as_file
from alibi_convert.optimizers.state import OptimizerState
from alibi_convert.tensors import Tensors
from alibi_convert.writing.atomic import replacing
from alibi_convert.writing.layout import TRAINING_FILE, copy_companion
from alibi_convert.writing.origin import Origin, origin_of
from alibi_convert.writing.provenance import write_record
from alibi_spec import ALiBiConfig
from alibi_train.settings import Run

_FOLDER = re.compile(r"step-(\d{8,})")
_REMOVED = ".removed"


@dataclass(frozen=True)
class State:
    """What a run goes on from.

    Attributes:
        config: of the model.
        tensors: canonical names, torch layout.
        optimizer: None before the first step.
        progress: plain JSON values: the step, where the data is, the settings.
    """

    config: ALiBiConfig
    tensors: Tensors
    optimizer: OptimizerState | None
    progress: Mapping[str, Any]


class Checkpoints:
    """The checkpoints in a folder, the newest last; written by a thread of its own.

    Args:
        folder: of the run.
        run: which checkpoints stay.
        origin: where the first checkpoint's other files come from: the tokenizer, …. A later one
            gets those of the one before.
    """

    def __init__(self, folder: Path, run: Run, origin: Origin | None = None) -> None:
        self.folder, self.run, self.origin = folder, run, origin
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps that are saved."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(found[1]) for name in names if (found := _FOLDER.fullmatch(name)))

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"step-{step:08}"

    def newest(self) -> tuple[State, Origin] | None:
        """The state of the newest checkpoint, and where it is; None if there is none.

        Raises:
            CheckpointError: it is broken.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        checkpoint, optimizer = open_checkpoint(path), open_optimizer(path)
        state = State(checkpoint.config, checkpoint.tensors, optimizer, read_progress(path))
        return state, origin_of(checkpoint)

    def save(self, state: State) -> None:
        """Write a state in the background, after the one before.

        Raises:
            CheckpointError: the one before could not be written; the disk is full, ….
        """
        self.wait()
        self._writing = self._pool.submit(self._write, state)

    def save_now(self, state: State) -> None:
        """Write a state, and return when it is on the disk. Errors are those of `save`."""
        self.wait()
        self._write(state)

    def wait(self) -> None:
        """Return when everything is on the disk. Errors are those of `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def open(self) -> Iterator[Checkpoints]:
        """Finish writing at the end, whatever happens in the block."""
        with self._pool:
            try:
                yield self
            finally:
                self.wait()

    def _write(self, state: State) -> None:
        folder = self.path(state.progress["step"])
        optimizer = None if state.optimizer is None else as_file(state.optimizer)
        nbytes = state.tensors.nbytes + (0 if optimizer is None else optimizer[0].nbytes)
        with replacing(folder, nbytes=nbytes) as draft:
            write_folder(draft, state.config, state.tensors, optimizer)
            self._bring(draft)
            text = json.dumps(state.progress, indent=2)
            (draft / TRAINING_FILE).write_text(text, encoding="utf-8")
        for left in self.folder.glob(f".step-*{_REMOVED}"):  # by a process that was killed
            shutil.rmtree(left)
        for step in self._superfluous():
            removed = self.path(step).with_name(f".{self.path(step).name}{_REMOVED}")
            self.path(step).rename(removed)  # it is gone whole, also if the process is killed now
            shutil.rmtree(removed)

    def _bring(self, draft: Path) -> None:
        """Copy the other files of the model."""
        steps, origin = self.steps(), self.origin
        if steps:
            origin = origin_of(open_checkpoint(self.path(steps[-1])))
        if origin is None:
            return
        for name in origin.companions:
            copy_companion(origin.path, draft, name)
        if origin.record:
            write_record(draft, origin.record)

    def _superfluous(self) -> list[int]:
        """The steps that no option keeps."""
        steps, run = self.steps(), self.run
        kept = set(steps[-run.keep_last :])
        kept |= {step for step in steps if run.keep_every and step % run.keep_every == 0}
        if run.keep_best:
            kept.add(min(steps, key=self._validation_loss))
        return [step for step in steps if step not in kept]

    def _validation_loss(self, step: int) -> float:
        loss = read_progress(self.path(step)).get("validation_loss")
        return float("inf") if loss is None else loss


def read_progress(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's `training.json`.

    Raises:
        CheckpointError: it has none, or a broken one.
    """
    file = folder / TRAINING_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {TRAINING_FILE}; expected a checkpoint of a run")
    progress = read_json(file)
    absent = {"step", "position", "validation_loss", "settings", "tokens"} - progress.keys()
    if absent or type(progress["step"]) is not int:
        lacks = ", ".join(sorted(absent or {"step"}))
        raise CheckpointError(f"{file} lacks {lacks}; expected what `alibi train` wrote")
    return progress
