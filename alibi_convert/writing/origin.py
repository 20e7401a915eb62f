"""Where a loaded model comes from: its other files are copied when it is saved.

The tokenizer, generation settings, chat templates; and, in conversion.json, the keys of a family's
configuration that we have no use for, such as the ids of special tokens.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.errors import CheckpointError
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.tensors import Tensors
from alibi_convert.writing.atomic import replacing
from alibi_convert.writing.layout import CONFIG_FILE, companions, copy_companion, is_model_file
from alibi_convert.writing.provenance import family_record, recorded_family, write_record
from alibi_spec import ALiBiConfig


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from.

    Attributes:
        path: its folder or file.
        companions: names of the files in the folder that belong to the model.
        record: the family's configuration and name, as conversion.json keeps them.
        inside: companions that the file itself holds, by name.
    """

    path: Path
    companions: tuple[str, ...]
    record: Mapping[str, Any]
    inside: Callable[[], Mapping[str, bytes]] = dict


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a model that is loaded from this checkpoint."""
    path = checkpoint.path.absolute()
    names = companions(path) if path.is_dir() else []
    try:
        record = family_record(checkpoint)
    except CheckpointError as error:
        warnings.warn(f"{error}; its record of the model's family is lost", stacklevel=3)
        record = {}
    return Origin(path, tuple(names), record, checkpoint.inside)


def save_folder(
    folder: Path,
    config: ALiBiConfig,
    tensors: Tensors,
    origin: Origin | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder of ours, with the model's other files, and those that the folder held already.

    Args:
        folder: a path that does not exist yet, or see `overwrite`.
        config: of the model.
        tensors: canonical names, torch layout.
        origin: what the model was loaded from.
        overwrite: replace the weights and the configuration that are there; other files of a
            checkpoint's folder stay as they are.

    Raises:
        CheckpointError: as for `replacing` and `folder.write`.
    """
    folder = folder.expanduser()
    kept = _kept(folder)
    with replacing(folder, overwrite, kept=kept) as temporary:
        temporary.mkdir()
        write_folder(temporary, config, tensors)
        for name in kept:
            _bring(folder / name, temporary / name)
        lost, other = _bring_companions(origin, temporary)
        record = recorded_family(folder) if origin is None else origin.record
        if record:
            write_record(temporary, record)
    if lost:
        warnings.warn(
            f"{folder} lacks {', '.join(lost)}, which the model had where it was loaded from, and "
            "which are gone from there; save the tokenizer and generation settings again",
            stacklevel=3,
        )
    if other:
        warnings.warn(
            f"{folder} keeps its own {', '.join(other)}, which differ from those that the model "
            "was loaded with; remove them first if they are not meant",
            stacklevel=3,
        )


def _kept(folder: Path) -> list[str]:
    """Names of the files and folders that stay when the model in a folder is replaced."""
    if not (folder / CONFIG_FILE).exists():
        return []
    others = [path for path in sorted(folder.iterdir()) if not is_model_file(path)]
    return [path.name for path in others if all(map(_is_plain, (path, *path.rglob("*"))))]


def _is_plain(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def _bring(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name, or a copy where that cannot be had."""
    try:
        if os.path.islink(source):  # it may lead elsewhere from there
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _bring_companions(origin: Origin | None, folder: Path) -> tuple[list[str], list[str]]:
    """Copy the files that are missing; the names of those that are gone, and that differ."""
    lost, other = [], []
    if origin is None:
        return lost, other
    for name in origin.companions:
        source = origin.path / name
        is_there = (folder / name).exists()
        if not is_there and source.is_file():
            copy_companion(origin.path, folder, name)
        elif not is_there:
            lost.append(name)
        elif source.is_file() and not filecmp.cmp(source, folder / name, shallow=False):
            other.append(name)
    for name, contents in origin.inside().items():
        if not (folder / name).exists():
            (folder / name).write_bytes(contents)
        elif (folder / name).read_bytes() != contents:
            other.append(name)
    return lost, other
