"""File formats besides the folder: torch state dicts (.safetensors, .pt), Flax msgpack and orbax.

torch, flax and orbax are imported by the format that needs them, when it is used. The formats of
these three (.pt, .msgpack, orbax) hold the whole model in memory; folders and .safetensors stream.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alibi_convert.extras import require
from alibi_convert.families import Family, bloom, export_tensors, falcon, jaketae, mpt
from alibi_convert.journal import Journal
from alibi_convert.layout import CONFIG_FILE, ORBAX_FOLDER
from alibi_convert.layout import sidecar as sidecar  # exported
from alibi_convert.msgpack_file import load_msgpack
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.store import (
    MAX_SHARD_BYTES,
    config_json,
    write_folder,
    write_safetensors,
    write_tensors,
)
from alibi_convert.tensors import Tensors, as_torch
from alibi_convert.train_state import find_params
from alibi_spec import ALiBiConfig

ORBAX_SUFFIX = ".orbax"  # a folder's name may say what is in it
# A suffix of letters asks for a format, and so do these. Any other dot is part of a folder's name,
# as in v1.5.
SUFFIXES_WITH_DIGITS = frozenset((".h5", ".hdf5", ".pt2"))


class Write(Protocol):
    """How a format is written, into a path that does not exist yet unless a run is resumed."""

    def __call__(
        self,
        path: Path,
        config: ALiBiConfig,
        tensors: Tensors,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        journal: Journal | None = None,
    ) -> dict[str, str]:
        """Write the model and return the XXH3 of those files whose hash is known, by name."""
        ...


def _as_they_are(_: ALiBiConfig, tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Format:
    """One way to keep a model on disk.

    Attributes:
        suffix: of a file; empty for a folder.
        write: into a path.
        description: one line for the help text.
        streams: whether it is written a few megabytes at a time; otherwise the whole model is in
            memory at once.
        stored: the canonical tensors as the files name and lay them out, unread.
    """

    suffix: str
    write: Write
    description: str
    streams: bool = False
    stored: Callable[[ALiBiConfig, Tensors], Tensors] = _as_they_are


def read_msgpack(path: Path, config: ALiBiConfig) -> tuple[Tensors, dict[str, str]]:
    """Flax params, or a training state with them, and what was left beside them.

    Raises:
        CheckpointError: truncated, not msgpack, or not the params of this configuration.
    """
    found, left = find_params(load_msgpack(path), path)
    return Tensors.of(canonical_tensors(found.params, config)), left


def folder_format(
    config_json: Callable[[ALiBiConfig], dict[str, Any]],
    foreign: Callable[[ALiBiConfig, Tensors], Tensors],
    description: str,
) -> Format:
    """A folder as another library writes it: its `config.json`, and tensors by its names.

    Args:
        config_json: the contents of `config.json`; raises CheckpointError for a configuration that
            the library cannot express.
        foreign: the canonical tensors under the library's names and in its layouts, unread.
        description: one line for the help text.
    """

    def write(
        path: Path,
        config: ALiBiConfig,
        tensors: Tensors,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        journal: Journal | None = None,
    ) -> dict[str, str]:
        dtypes = {str(header.dtype) for header in tensors.headers.values()}
        values = config_json(config) | ({"dtype": dtypes.pop()} if len(dtypes) == 1 else {})
        path.mkdir(exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return write_tensors(path, foreign(config, tensors), max_shard_bytes, journal)

    def stored(config: ALiBiConfig, tensors: Tensors) -> Tensors:
        config_json(config)  # raises where there is no way to say what the model computes
        return foreign(config, tensors)

    return Format("", write, description, streams=True, stored=stored)


def _write_alibi(
    path: Path,
    config: ALiBiConfig,
    tensors: Tensors,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    journal: Journal | None = None,
) -> dict[str, str]:
    path.mkdir(exist_ok=True)
    return write_folder(path, config, tensors, max_shard_bytes, journal)


def _write_safetensors(
    path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any
) -> dict[str, str]:
    xxh3 = write_safetensors(path, tensors, {"alibi_config": config_json(config)})
    return {path.name: xxh3}


def _write_pt(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    require("torch", "torch", "writing .pt")
    _save_pt(path, tensors)
    sidecar(path).write_text(config_json(config), encoding="utf-8")
    return {}


def _save_pt(path: Path, tensors: Tensors) -> None:
    import torch

    state = {name: as_torch(array) for name, array in tensors.items()}
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # raised over what the disk said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_msgpack(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    require("flax", "flax", "writing .msgpack")
    from flax import serialization

    path.write_bytes(serialization.msgpack_serialize(flax_tree(tensors, config)))
    sidecar(path).write_text(config_json(config), encoding="utf-8")
    return {}


def _write_orbax(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    require("orbax.checkpoint", "flax", "writing orbax")
    import orbax.checkpoint as ocp

    path.mkdir()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute() / ORBAX_FOLDER, flax_tree(tensors, config))
    except ValueError as error:  # tensorstore's, for a full disk, too
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    (path / CONFIG_FILE).write_text(config_json(config), encoding="utf-8")
    return {}


def _family_folder(family: Family, library: str) -> Format:
    def config_json(config: ALiBiConfig) -> dict[str, Any]:
        return family.write_config(config) if family.write_config else {}

    return folder_format(config_json, partial(export_tensors, family), f"folder, as {library}")


def _write_jaketae(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    require("torch", "torch", "writing jaketae")
    _save_pt(path, _stored_jaketae(config, tensors))
    return {}


def _stored_jaketae(config: ALiBiConfig, tensors: Tensors) -> Tensors:
    if jaketae.FAMILY.write_config is not None:
        jaketae.FAMILY.write_config(config)  # raises for any other model
    return export_tensors(jaketae.FAMILY, config, tensors)


FORMATS: dict[str, Format] = {
    "alibi": Format("", _write_alibi, "folder that both backends read", streams=True),
    "safetensors": Format(".safetensors", _write_safetensors, "torch state dict", streams=True),
    "pt": Format(".pt", _write_pt, "torch state dict, pickled"),
    "msgpack": Format(".msgpack", _write_msgpack, "Flax params"),
    "orbax": Format("", _write_orbax, "Flax params, orbax folder"),
    "bloom": _family_folder(bloom.FAMILY, "transformers' BLOOM"),
    "mpt": _family_folder(mpt.FAMILY, "llm-foundry's and transformers' MPT"),
    "falcon": _family_folder(falcon.FAMILY, "transformers' Falcon-RW"),
    "jaketae": Format(
        ".pt", _write_jaketae, "state dict of jaketae/alibi, pickled", stored=_stored_jaketae
    ),
}
