"""A run: from settings and, where a run was stopped, its newest checkpoint, to the last step."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from alibi_convert import CheckpointError, load_tokenizer
from alibi_convert.checkpoint import open_checkpoint
from alibi_convert.optimizers import OptimizerState
from alibi_convert.progress import progress_bar
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_convert.tokenizer import TOKENIZER_FILE
from alibi_convert.writing.origin import Origin, origin_of
from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.checks import check_count, require_vocabulary
from alibi_spec.parameters import initial_parameter
from alibi_spec.training import Metrics
from alibi_train.backends import Trainer, trainer
from alibi_train.batches import Batches, Rows
from alibi_train.checkpoints import Checkpoints, State
from alibi_train.documents import Encode, files_of, read_documents
from alibi_train.processes import explaining_loss, is_first
from alibi_train.records import Records
from alibi_train.settings import BYTES, Settings, differences


@dataclass(frozen=True)
class Finished:
    """What a run came to.

    Attributes:
        folder: its newest checkpoint.
        step: of that.
        loss: of the last step, in nats per token; None if nothing was left to do.
        validation_loss: the last one; None without validation.
    """

    folder: Path
    step: int
    loss: float | None
    validation_loss: float | None


def train(
    settings: Settings,
    folder: Path,
    backend: str = "torch",
    *,
    until: int | None = None,
    device: str | None = None,
    progress: bool = False,
    mesh: Any = None,
) -> Finished:
    """Train as the settings say; go on from the newest checkpoint in the folder, if there is one.

    Either backend goes on from what the other saved. A run that is killed and started again comes
    to the same weights, on a CPU bit for bit.

    Args:
        folder: of checkpoints and log; made where it is not there.
        until: stop after this step, and save; None is the last of `training.steps`.
        device: of torch; None is a GPU where there is one.
        progress: show a bar on the standard error stream.
        mesh: of the backend: divide the model over it (`alibi_train.processes`). Every process
            calls this alike, and sees the same folder; only the first one writes.

    Raises:
        ValueError: settings that contradict each other, or those of the run in the folder; data
            that does not fit them; a loss that is not finite.
        CheckpointError: a broken checkpoint, or one that cannot be written.
        ConnectionError: another process of the mesh has ended.
    """
    last = settings.recipe.steps
    if until is not None:
        check_count("until", until)
        last = min(until, last)
    folder.mkdir(parents=True, exist_ok=True)
    writes = is_first(mesh)
    with _alone(folder) if writes else nullcontext(), explaining_loss(mesh):
        start, origin = _start(settings, folder)
        data = _Data.of(settings, start.config, origin)
        _require_same(settings, data, start, folder)
        run = _Run(settings, folder, backend, start, data, origin, device, mesh)
        run.up_to(last, progress and writes)
    return Finished(run.checkpoints.path(run.step), run.step, run.loss, run.validation_loss)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raise CheckpointError while another process trains in this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another run is training in {folder}; wait for it or choose another folder"
            ) from None
        yield
    finally:
        os.close(handle)


class _Run:
    """What changes while a run goes on."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        backend: str,
        start: State,
        data: _Data,
        origin: Origin,
        device: str | None,
        mesh: Any,
    ) -> None:
        options, tensors = settings.run, _as_dtype(start.tensors, np.dtype(settings.run.dtype))
        self.settings, self.config, self.data = settings, start.config, data
        self.trainer: Trainer = trainer(
            backend, start.config, settings.recipe, tensors, start.optimizer, device, mesh
        )
        self.step, self.validation_loss = start.progress["step"], start.progress["validation_loss"]
        self.loss: float | None = None
        self.batches = iter(data.train)
        if start.progress["position"] is not None:
            self.batches.set_state(start.progress["position"])
        self.checkpoints = Checkpoints(folder, options, origin)
        writes = is_first(mesh)
        self.records = Records(folder, self.step, options.tensorboard) if writes else None
        self.clock = _Clock(settings.recipe.batch_size * settings.data.length, self.step)
        self.unread: Metrics | None = None

    def up_to(self, last: int, progress: bool) -> None:
        """Take the steps that are left.

        Raises:
            KeyboardInterrupt: when interrupted, with how the run goes on.
        """
        size, done = self.clock.size, self.step
        bar = progress_bar(progress, "training", last * size, done * size, unit=" tokens")
        records = nullcontext() if self.records is None else self.records.open()
        with self.checkpoints.open(), records, bar as advance:
            try:
                for step in range(done + 1, last + 1):
                    self.one_step(is_last=step == last)
                    advance(size)
            except KeyboardInterrupt:
                saved = self.checkpoints.steps()
                there = f"the same command goes on from step {saved[-1]}" if saved else None
                raise KeyboardInterrupt(there or "nothing saved") from None

    def one_step(self, is_last: bool) -> None:
        """Take a step; tell, evaluate and save where it is time."""
        metrics, options = self.trainer.step(next(self.batches)), self.settings.run
        self._read()  # of the step before: reading this one would keep the device waiting
        self.step, self.unread = self.step + 1, metrics
        if is_last or self.step % options.log_every == 0:
            values = self._read() or {}
            self._record(**values, tokens_per_second=self.clock.speed(self.step))
        if self.data.validation is not None and (
            is_last or self.step % options.evaluate_every == 0
        ):
            self.validation_loss = self._evaluated(self.data.validation)
            self._record(validation_loss=self.validation_loss)
        if is_last or self.step % options.save_every == 0:
            self._read()
            self._save()

    def _record(self, **values: float) -> None:
        if self.records is not None:
            self.records.add(self.step, **values)

    def _read(self) -> dict[str, float] | None:
        """The numbers of the newest step, if they were not read yet.

        Raises:
            ValueError: they are not finite. The step has changed nothing.
        """
        metrics, self.unread = self.unread, None
        if metrics is None:
            return None
        values = {name: float(value) for name, value in metrics._asdict().items()}
        if not all(map(math.isfinite, values.values())):
            saved = self.checkpoints.steps()
            there = f"the checkpoint of step {saved[-1]} stays" if saved else "none was saved yet"
            raise ValueError(
                f"step {self.step}: loss {values['loss']}, norm of the gradients "
                f"{values['grad_norm']}; {there}. Try a smaller learning_rate, a longer "
                "warmup_steps, or another folder with another seed"
            )
        self.loss = values["loss"]
        return values

    def _evaluated(self, batches: Batches) -> float:
        """The mean negative log-likelihood."""
        parts = batches.in_order(self.settings.run.evaluation_batches)
        sums, counts = zip(*map(self.trainer.evaluate, parts), strict=True)
        return sum(sums) / sum(counts)

    def _save(self) -> None:
        progress = {
            "step": self.step,
            "position": self.batches.get_state(),
            "validation_loss": self.validation_loss,
            "settings": self.settings.identity,
            "tokens": self.data.tokens,
        }

        def state(tensors: Tensors, optimizer: OptimizerState) -> State:
            return State(self.config, tensors, optimizer, progress)

        checkpoints = self.checkpoints
        self.trainer.save(
            write=lambda *parts: checkpoints.save_now(state(*parts)),
            write_later=lambda *parts: checkpoints.save(state(*parts)),
        )


def _as_dtype(tensors: Tensors, dtype: np.dtype) -> Tensors:
    """The same tensors, rounded or widened as each is read."""

    def cast(header: LazyTensor) -> LazyTensor:
        return LazyTensor(header.shape, dtype, lambda: header.read().astype(dtype))

    return Tensors({name: cast(header) for name, header in tensors.headers.items()})


@dataclass
class _Clock:
    """Tokens per second since it was last asked.

    Attributes:
        size: tokens of a step.
        step, time: when it was.
    """

    size: int
    step: int
    time: float = field(default_factory=monotonic)

    def speed(self, step: int) -> float:
        before, self.step = self.step, step
        started, self.time = self.time, monotonic()
        return (step - before) * self.size / (self.time - started)


@dataclass(frozen=True)
class _Data:
    """What is read of the documents.

    Attributes:
        train: without end.
        validation: None where there is none.
        tokens: how many there are to learn from.
    """

    train: Batches
    validation: Batches | None
    tokens: int

    @classmethod
    def of(cls, settings: Settings, config: ALiBiConfig, origin: Origin) -> _Data:
        data, recipe = settings.data, settings.recipe
        is_masked = recipe.objective == "masked_lm"
        if is_masked and data.mask_token_id is None:
            raise ValueError("objective masked_lm needs data.mask_token_id")
        vocab_size = require_vocabulary(config.vocab_size)
        file = _tokenizer_file(settings, origin)
        encode = None if file is None else _encode_of(file.parent)

        def batches(patterns: Sequence[str]) -> Batches:
            files = files_of(patterns, settings.folder)
            documents = read_documents(files, encode, data.end_token_id, data.token_dtype)
            rows = Rows(documents, data.length, vocab_size, has_next=not is_masked)
            mask = data.mask_token_id if is_masked else None
            return Batches(rows, recipe.batch_size, recipe.seed, mask)

        if not data.train:
            raise ValueError("data.train names no files; expected paths or patterns")
        train = batches(data.train)
        validation = batches(data.validation) if data.validation else None
        return cls(train, validation, len(train.rows.documents.tokens))


def _encode_of(folder: Path) -> Encode:
    """The tokens of a text, without special ones, by the tokenizer of a folder."""
    tokenizer = load_tokenizer(folder)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _tokenizer_file(settings: Settings, origin: Origin) -> Path | None:
    """The tokenizer of a run: the one that is named, or that of its origin; None is bytes."""
    named = settings.data.tokenizer
    if named == BYTES:
        return None
    if named is not None:
        path = settings.path(named)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if file.name != TOKENIZER_FILE:
            raise ValueError(f"data.tokenizer={named!r} is not called {TOKENIZER_FILE}; rename it")
        return file
    if TOKENIZER_FILE not in origin.companions:
        return None
    return origin.path / TOKENIZER_FILE


def _start(settings: Settings, folder: Path) -> tuple[State, Origin]:
    """What the run begins with, and where its other files come from."""
    newest = Checkpoints(folder, settings.run).newest()
    if newest is not None:
        return newest
    progress = {"step": 0, "position": None, "validation_loss": None}
    if settings.checkpoint is not None:
        checkpoint = open_checkpoint(settings.source)
        state = State(checkpoint.config, checkpoint.tensors, None, progress)
        return state, origin_of(checkpoint)
    trained = (TOKENIZER_FILE,) if (folder / TOKENIZER_FILE).is_file() else ()
    origin, vocab_size = Origin(folder, trained, {}), 256
    file = _tokenizer_file(settings, origin)
    if file is not None:
        origin = Origin(file.parent, (TOKENIZER_FILE,), {})
        vocab_size = load_tokenizer(file.parent).get_vocab_size()
    defaults = {"vocab_size": vocab_size, "max_len": settings.data.length}
    config = ALiBiConfig.from_dict(defaults | dict(settings.model))
    return State(config, _fresh(config, settings.recipe.seed), None, progress), origin


def _fresh(config: ALiBiConfig, seed: int) -> Tensors:
    """Parameters that are drawn as each is read."""

    def unread(row: Parameter, number: int) -> LazyTensor:
        draw = partial(initial_parameter, config, row, seed, number)
        return LazyTensor(row.shape, np.dtype(np.float32), draw)

    rows = enumerate(parameter_table(config))
    return Tensors({row.name: unread(row, number) for number, row in rows})


def _require_same(settings: Settings, data: _Data, start: State, folder: Path) -> None:
    """Raise ValueError unless the run in a folder, if there is one, was told the same."""
    before: Mapping[str, Any] | None = start.progress.get("settings")
    if before is None:
        return
    lines = list(differences(settings.identity, before))
    if data.tokens != start.progress["tokens"]:
        lines.append(
            f"there are {data.tokens} tokens to learn from, were {start.progress['tokens']}"
        )
    if lines:
        raise ValueError(
            f"the run in {folder} was told otherwise:\n  " + "\n  ".join(lines) + "\n"
            "give it the same settings to go on, or another folder to begin anew"
        )
