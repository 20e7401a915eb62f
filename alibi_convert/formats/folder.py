"""Folders with a `config.json` and weights: ours, and those of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.formats.config_file import config_json, parse_config
from alibi_convert.formats.format import Asked, Beside, Format, Opened
from alibi_convert.formats.orbax import recognises as is_orbax
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.formats.shards import read_weights, write_tensors
from alibi_convert.rules import check_shapes
from alibi_convert.tensors import Tensors
from alibi_convert.writing.layout import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    OPTIMIZER_FILE,
    is_weight_file,
)
from alibi_spec import ALiBiConfig, parameter_table


def recognises(path: Path) -> bool:
    """Any folder but orbax's; one without a config.json is refused when it is read."""
    return path.is_dir() and not is_orbax(path)


def read(folder: Path, asked: Asked) -> Opened:
    """The configuration, ours or another library's, and the tensors, unread.

    Raises:
        CheckpointError: a file is missing, broken, or the index and the shards disagree.
    """
    _require_model(folder)
    file = folder / CONFIG_FILE
    if not file.exists():
        files = sorted(folder.glob("*.gguf"))
        hint = f", or the path of a file: {files[0]}" if files else ""
        raise CheckpointError(f"{folder} has no config.json; expected a checkpoint folder{hint}")
    values = read_json(file)
    is_foreign = "model_type" in values and "format" not in values
    carried = None if is_foreign else parse_config(values, str(file))
    tensors, weights = read_weights(folder, asked.allow_pt)
    optimizer = None if is_foreign else _optimizer(folder)
    names = [CONFIG_FILE, *weights, *([OPTIMIZER_FILE] if optimizer else [])]
    return Opened(
        "folder" if is_foreign else "alibi",
        folder,
        {name: folder / name for name in names},
        tensors,
        carried,
        foreign=values if is_foreign else None,
        left={} if optimizer is None else {OPTIMIZER_FILE: "the optimizer's state, not the model"},
        optimizer=optimizer,
    )


def _optimizer(folder: Path) -> Beside | None:
    path = folder / OPTIMIZER_FILE
    return Beside(path.name, "file", lambda: path) if path.exists() else None


def _require_model(folder: Path) -> None:
    """Raise CheckpointError, naming the base model, for a folder that holds only an adapter."""
    if (folder / ADAPTER_CONFIG_FILE).exists() and not any(map(is_weight_file, folder.iterdir())):
        base = read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds only an adapter, for {base!r}; open that model with adapter= of this "
            "folder (--adapter)"
        )


def write(
    path: Path,
    config: ALiBiConfig,
    tensors: Tensors,
    optimizer: tuple[Tensors, dict[str, str]] | None = None,
    **options: Any,
) -> dict[str, str]:
    """A folder of ours; one that is there already is filled.

    Raises:
        CheckpointError: the tensors are not those of the configuration.
    """
    check_shapes({row.name: row.shape for row in parameter_table(config)}, tensors.shapes)
    hashes = write_files(path, config_json(config), tensors, **options)
    if optimizer is not None:
        hashes[OPTIMIZER_FILE] = write_safetensors(path / OPTIMIZER_FILE, *optimizer)
    return hashes


def write_files(path: Path, config: str, tensors: Tensors, **options: Any) -> dict[str, str]:
    """The text of a `config.json`, and tensors by the names that it goes with."""
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(config, encoding="utf-8")
    return write_tensors(path, tensors, **options)


FORMAT = Format("folder that both backends read", "", write, recognises, read, streams=True)
