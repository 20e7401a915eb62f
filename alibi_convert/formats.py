"""File formats besides the folder: torch state dicts (.safetensors, .pt), Flax msgpack and orbax.

torch, flax and orbax are imported by the format that needs them, when it is used.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.extras import require
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.store import (
    CONFIG_FILE,
    ORBAX_FOLDER,
    config_json,
    write_folder,
    write_safetensors,
)
from alibi_convert.tensors import Tensors, as_torch
from alibi_spec import ALiBiConfig

# What torch.load and the unpickler under it raise for broken files.
_UNPICKLING_ERRORS = (
    AttributeError,
    EOFError,
    KeyError,
    IndexError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Format:
    """One way to keep a model on disk.

    Attributes:
        suffix: of a file; empty for a folder.
        write: into a path that does not exist yet.
        description: one line for the help text.
    """

    suffix: str
    write: Callable[[Path, ALiBiConfig, Tensors], None]
    description: str


def sidecar(path: Path) -> Path:
    """Where the configuration of a .pt or .msgpack file is kept: `<file>.json` beside it."""
    return path.with_name(path.name + ".json")


def read_pt(path: Path) -> Tensors:
    """A torch state dict, unpickled with weights_only=True and file-mapped.

    Raises:
        CheckpointError: truncated, not a state dict, or holding more than tensors.
    """
    require("torch", "torch", "reading .pt")
    import torch

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _UNPICKLING_ERRORS as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to trust it
            cause = "it may hold more than tensors; save the model's state_dict() alone"
        raise CheckpointError(f"{path} is truncated or not a plain state dict: {cause}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds more than tensors ({', '.join(map(str, others[:4]))}); save the "
            "model's state_dict() alone"
        )
    return Tensors.of(state)


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


def _write_safetensors(path: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    write_safetensors(path, tensors, {"alibi_config": config_json(config)})


def _write_pt(path: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    require("torch", "torch", "writing .pt")
    import torch

    torch.save({name: as_torch(array) for name, array in tensors.items()}, path)
    sidecar(path).write_text(config_json(config), encoding="utf-8")


def _write_msgpack(path: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    require("flax", "flax", "writing .msgpack")
    from flax import serialization

    path.write_bytes(serialization.msgpack_serialize(flax_tree(tensors, config)))
    sidecar(path).write_text(config_json(config), encoding="utf-8")


def _write_orbax(folder: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    require("orbax.checkpoint", "flax", "writing orbax")
    import orbax.checkpoint as ocp

    folder.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / ORBAX_FOLDER, flax_tree(tensors, config))
    (folder / CONFIG_FILE).write_text(config_json(config), encoding="utf-8")


def _write_alibi(folder: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    folder.mkdir()
    write_folder(folder, config, tensors)


FORMATS: dict[str, Format] = {
    "alibi": Format("", _write_alibi, "folder that both backends read"),
    "safetensors": Format(".safetensors", _write_safetensors, "torch state dict"),
    "pt": Format(".pt", _write_pt, "torch state dict, pickled"),
    "msgpack": Format(".msgpack", _write_msgpack, "Flax params"),
    "orbax": Format("", _write_orbax, "Flax params, orbax folder"),
}
