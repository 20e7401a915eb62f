"""What a run of training is told: one TOML file of four sections, the same for both backends."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alibi_spec import ALiBiConfig
from alibi_spec.options import (
    COUNT,
    FLAG,
    NATURAL,
    TEXT,
    TEXTS,
    Options,
    one_of,
    option,
    or_none,
    with_options_documented,
)
from alibi_spec.training import Recipe

BYTES = "bytes"  # the tokenizer whose tokens are the bytes of UTF-8
TOKEN_DTYPES = ("uint16", "uint32")
WEIGHT_DTYPES = ("float32", "float64")
_CHECKPOINT = "checkpoint"


@with_options_documented
@dataclass(frozen=True)
class Data(Options):
    """Which documents are read, and as what tokens.

    Raises:
        ValueError: an unknown option, or one with an impossible value.
    """

    KIND: ClassVar[str] = "section [data]"
    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "seq_len": "length",
        "max_seq_len": "length",
        "block_size": "length",
        "sequence_length": "length",
        "eos_token_id": "end_token_id",
    }

    train: tuple[str, ...] = option(
        (),
        TEXTS,
        "files, or patterns of files, to learn from: .txt, a document each; .jsonl, one in the "
        '"text" of each line; .npy and .bin, tokens.',
    )
    validation: tuple[str, ...] = option((), TEXTS, "files to evaluate on, perhaps none.")
    length: int = option(256, COUNT, "tokens of a sequence.")
    tokenizer: str | None = option(
        None,
        or_none(TEXT),
        '"bytes", or the path of a tokenizer.json; None is that of the checkpoint, or the one in '
        "the run's folder, or bytes.",
    )
    end_token_id: int | None = option(
        None,
        or_none(NATURAL),
        "token that follows every document of a text; that ends one in files of tokens.",
    )
    token_dtype: str = option("uint16", one_of(TOKEN_DTYPES), "of .bin files.")
    mask_token_id: int | None = option(
        None, or_none(NATURAL), "token that stands for a mask; needed for masked_lm."
    )


@with_options_documented
@dataclass(frozen=True)
class Run(Options):
    """What is kept of a run, and how often it tells of itself.

    Raises:
        ValueError: an unknown option, or one with an impossible value.
    """

    KIND: ClassVar[str] = "section [run]"

    save_every: int = option(
        500, COUNT, "steps from one checkpoint to the next; the last is saved."
    )
    keep_last: int = option(2, COUNT, "checkpoints, the newest, that are kept.")
    keep_every: int = option(0, NATURAL, "keep those whose step is a multiple of it; 0 is none.")
    keep_best: bool = option(True, FLAG, "keep the one of the lowest validation loss.")
    evaluate_every: int = option(500, COUNT, "steps from one validation to the next.")
    evaluation_batches: int = option(20, COUNT, "batches of a validation, at most.")
    log_every: int = option(10, COUNT, "steps from one line of the log to the next.")
    tensorboard: bool = option(False, FLAG, "write TensorBoard's files too.")
    dtype: str = option("float32", one_of(WEIGHT_DTYPES), "of the weights and their moments.")


@dataclass(frozen=True)
class Settings:
    """All four sections.

    Attributes:
        model: the fields of an `ALiBiConfig`; without vocab_size it is that of the tokenizer.
        checkpoint: the folder or file that training begins from; then `model` is empty.
        data, recipe, run: the other sections.
        folder: where relative paths begin.
    """

    model: Mapping[str, Any]
    checkpoint: str | None
    data: Data
    recipe: Recipe
    run: Run
    folder: Path

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any], folder: Path) -> Settings:
        """From the contents of a TOML file.

        Raises:
            ValueError: an unknown section or option, or an impossible value.
        """
        known = ("model", "data", "training", "run")
        for name, section in sections.items():
            if name not in known or not isinstance(section, Mapping):
                raise ValueError(f"unknown section {name!r}; expected {', '.join(known)}")
        model, data, recipe, run = (dict(sections.get(name, {})) for name in known)
        checkpoint = model.pop(_CHECKPOINT, None)
        if checkpoint is not None and model:
            raise ValueError(f"[model] has a checkpoint and {', '.join(model)}; expected only one")
        if checkpoint is not None and "tokenizer" in data:
            raise ValueError(
                "data.tokenizer and a checkpoint, which has its own; leave the tokenizer out, or "
                "put a tokenizer.json into the checkpoint's folder"
            )
        ALiBiConfig.refuse_unknown(model)
        return cls(
            model,
            checkpoint,
            Data.from_dict(data),
            Recipe.from_dict(recipe),
            Run.from_dict(run),
            folder,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes, as plain JSON values."""
        sections = {
            "model": dict(self.model) | {_CHECKPOINT: self.checkpoint},
            "data": self.data.to_dict(),
            "training": self.recipe.to_dict(),
            "run": {"dtype": self.run.dtype},
        }
        return json.loads(json.dumps(sections))

    @property
    def source(self) -> str:
        """The checkpoint that training begins from: a path, or the id of a folder on the hub."""
        path = self.path(self.checkpoint or "")
        return str(path) if path.exists() else self.checkpoint or ""

    def path(self, text: str) -> Path:
        """A path of the settings."""
        return self.folder / os.path.expanduser(text)


def read_settings(file: Path, changes: Sequence[str] = ()) -> Settings:
    """The settings in a TOML file, with changes such as "training.steps=100", in TOML too.

    Raises:
        ValueError: not TOML, or as for `Settings.from_dict`.
    """
    try:
        sections = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    for change in changes:
        for name, section in _parsed(change).items():
            sections.setdefault(name, {}).update(section)
    return Settings.from_dict(sections, file.parent)


def _parsed(change: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(change)
    except tomllib.TOMLDecodeError:
        values = {}
    if not values or not all(isinstance(section, dict) for section in values.values()):
        raise ValueError(f"{change!r} is no change; expected section.option=value, as in TOML")
    return values


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """One line for each option of two `Settings.identity` that differs."""
    for section, options in ours.items():
        others = theirs.get(section, {})
        for name in dict.fromkeys((*options, *others)):
            if options.get(name) != others.get(name):
                yield f"{section}.{name} is {options.get(name)!r}, was {others.get(name)!r}"
