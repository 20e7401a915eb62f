"""File formats besides the folder: torch state dicts (.safetensors, .pt), Flax msgpack and orbax.

torch, flax and orbax are imported by the format that needs them, when it is used. The formats of
these three (.pt, .msgpack, orbax) hold the whole model in memory; folders and .safetensors stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.extras import require
from alibi_convert.families import Family, bloom, export_tensors, falcon, jaketae, mpt
from alibi_convert.journal import Journal
from alibi_convert.layout import CONFIG_FILE, ORBAX_FOLDER
from alibi_convert.layout import sidecar as sidecar  # exported
from alibi_convert.pickle_file import read_pt as read_pt  # exported
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.store import (
    MAX_SHARD_BYTES,
    config_json,
    write_folder,
    write_safetensors,
    write_tensors,
)
from alibi_convert.tensors import Tensors, as_torch
from alibi_spec import ALiBiConfig

ORBAX_SUFFIX = ".orbax"  # a folder's name may say what is in it
# These ask for a format that is not written. Any other dot is part of a folder's name, as in v1.5.
UNWRITTEN_SUFFIXES = frozenset(
    (
        *(".bin", ".ckpt", ".flax", ".ggml", ".gguf", ".h5", ".hdf5", ".joblib", ".keras"),
        *(".mlmodel", ".mlpackage", ".nemo", ".npy", ".npz", ".onnx", ".pb", ".pickle", ".pkl"),
        *(".pt2", ".pte", ".pth", ".tflite", ".torchscript", ".zarr"),
        *(".gz", ".json", ".tar", ".tgz", ".txt", ".zip", ".zst"),
    )
)


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


def read_msgpack(path: Path, config: ALiBiConfig) -> Tensors:
    """Flax params written by `flax.serialization.to_bytes` or by us.

    Raises:
        CheckpointError: truncated, not msgpack, or not the params of this configuration.
    """
    require("flax", "flax", "reading .msgpack")
    from flax import serialization
    from msgpack.exceptions import UnpackException

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except (UnpackException, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or not Flax msgpack: {error}") from None
    return Tensors.of(canonical_tensors(_params(tree, path), config))


def read_orbax(folder: Path, config: ALiBiConfig) -> Tensors:
    """Flax params in an orbax checkpoint.

    Raises:
        CheckpointError: broken, or not the params of this configuration.
    """
    require("orbax.checkpoint", "flax", "reading orbax")
    import jax
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            # As NumPy arrays: the devices that wrote it need not be here.
            saved: Any = checkpointer.metadata(folder.absolute())
            saved = getattr(saved, "item_metadata", saved)  # newer orbax wraps it
            if saved is None:
                raise FileNotFoundError("it describes no arrays")
            one = ocp.RestoreArgs(restore_type=np.ndarray)
            as_arrays = jax.tree.map(lambda _: one, saved.tree)
            tree = checkpointer.restore(folder.absolute(), restore_args=as_arrays)
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} is not a complete orbax checkpoint: {cause}") from None
    return Tensors.of(canonical_tensors(_params(tree, folder), config))


def _params(tree: Any, path: Path) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, expected a tree of params")
    return tree["params"] if set(tree) == {"params"} else tree


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
    import torch

    torch.save({name: as_torch(array) for name, array in tensors.items()}, path)
    sidecar(path).write_text(config_json(config), encoding="utf-8")
    return {}


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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / ORBAX_FOLDER, flax_tree(tensors, config))
    (path / CONFIG_FILE).write_text(config_json(config), encoding="utf-8")
    return {}


def _family_folder(family: Family, library: str) -> Format:
    def config_json(config: ALiBiConfig) -> dict[str, Any]:
        return family.write_config(config) if family.write_config else {}

    return folder_format(config_json, partial(export_tensors, family), f"folder, as {library}")


def _write_jaketae(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    require("torch", "torch", "writing jaketae")
    import torch

    stored = _stored_jaketae(config, tensors)
    torch.save({name: as_torch(array) for name, array in stored.items()}, path)
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
