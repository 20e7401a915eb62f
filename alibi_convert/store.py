"""The neutral checkpoint folder: `config.json` and safetensors, read lazily, written atomically.

Names and layout are torch's. What a tensor means is decided elsewhere.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alibi_convert.errors import CheckpointError
from alibi_convert.rules import check_shapes
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_spec import ALiBiConfig, parameter_table

FORMAT = "alibi-duo"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ORBAX_FOLDER = "params"
ORBAX_MARK = "_CHECKPOINT_METADATA"  # a file that orbax puts into every checkpoint
MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
    """A JSON object; `origin` names it in errors.

    Raises:
        CheckpointError: not a JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd nesting
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{origin} holds a JSON {type(values).__name__}, expected an object")
    return values


def parse_config(text: str | bytes, origin: str) -> ALiBiConfig:
    """The configuration of a checkpoint of ours; `origin` names it in errors.

    Raises:
        CheckpointError: not our format, of a newer version, or with invalid values.
    """
    values = parse_json(text, origin)
    if values.pop("format", None) != FORMAT:
        kind = f" (model_type {values['model_type']!r})" if "model_type" in values else ""
        raise CheckpointError(
            f'{origin} is not an {FORMAT} configuration{kind}; expected "format": "{FORMAT}"'
        )
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{origin} has format_version {version!r}; this release reads {FORMAT_VERSION}; "
            "upgrade alibi-duo if the checkpoint is newer"
        )
    try:
        return ALiBiConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from None


def read_config(path: Path) -> ALiBiConfig:
    """`parse_config` of a file; a missing one is a CheckpointError too."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a checkpoint folder")
    return parse_config(path.read_bytes(), str(path))


def config_json(config: ALiBiConfig) -> str:
    """The text of `config.json`."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **config.to_dict()}
    return json.dumps(values, indent=2) + "\n"


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one safetensors file, unread, and its metadata.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        file = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from None
    headers = {}
    for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
        view = file.get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {view.get_dtype()}; expected one of {', '.join(_DTYPES)}"
            )

        def read(name: str = name) -> np.ndarray:
            return file.get_tensor(name)

        headers[name] = LazyTensor(tuple(view.get_shape()), _DTYPES[view.get_dtype()], read)
    return Tensors(headers), dict(file.metadata() or {})


def read_folder(folder: Path) -> tuple[ALiBiConfig, Tensors]:
    """The configuration and the tensors, unread, of a folder of ours, sharded or not.

    Raises:
        CheckpointError: a file is missing, broken, or the index and the shards disagree.
    """
    config = read_config(folder / CONFIG_FILE)
    if not (folder / INDEX_FILE).exists():
        return config, read_safetensors(folder / WEIGHTS_FILE)[0]
    weight_map = parse_json((folder / INDEX_FILE).read_bytes(), INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensors to file names")
    headers: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} names {shard!r}, outside the folder")
        tensors, _ = read_safetensors(folder / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if listed != set(tensors):
            odd = sorted(listed ^ set(tensors))
            raise CheckpointError(f"{folder / shard} and the index disagree about {', '.join(odd)}")
        headers.update(tensors.headers)
    return config, Tensors(headers)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file. Arrays are made contiguous: safetensors 0.8.0 garbles strided ones."""
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in tensors}
    path.touch()
    mode = path.stat().st_mode  # as the user's umask wants it; save_file would make it private
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(mode)


def write_folder(
    folder: Path, config: ALiBiConfig, tensors: Tensors, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """`config.json` and one safetensors file, or shards with an index, into an existing folder.

    Raises:
        CheckpointError: the tensors are not those of the configuration.
    """
    check_shapes({row.name: row.shape for row in parameter_table(config)}, tensors.shapes)
    (folder / CONFIG_FILE).write_text(config_json(config), encoding="utf-8")
    shards = _plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_FILE, tensors)
        return
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(header.nbytes for header in tensors.headers.values())
    contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _plan_shards(tensors: Tensors, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in tensors.headers.items():
        if shards[-1] and size + header.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += header.nbytes
    return shards


@contextmanager
def replacing(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to that becomes `destination` if the block succeeds, and vanishes if not.

    The path lies in a temporary folder beside the destination, so that the last step is a rename.
    Files written next to it move along. What was there before comes back if anything fails.

    Raises:
        CheckpointError: the destination exists and `overwrite` is False, or it is a folder with
            files that are not a checkpoint's.
    """
    destination = destination.resolve()
    check_destination(destination, overwrite)
    new_parents = [parent for parent in destination.parents if not parent.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            dir=destination.parent, prefix=f".{destination.name}."
        ) as folder:
            temporary = Path(folder) / destination.name
            yield temporary
            _move_into_place(temporary, destination, overwrite)
    except BaseException:
        for parent in new_parents:
            parent.rmdir()
        raise


def _move_into_place(temporary: Path, destination: Path, overwrite: bool) -> None:
    companions = [path for path in temporary.parent.iterdir() if path != temporary]
    targets = {path: destination.with_name(path.name) for path in (*companions, temporary)}
    for target in targets.values():
        check_destination(target, overwrite)
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    replaced.mkdir()
    try:
        for path, target in targets.items():
            if target.exists():
                os.replace(target, replaced / target.name)
            os.replace(path, target)
    except BaseException:
        for path, target in targets.items():
            if not path.exists():  # it had moved already
                os.replace(target, path)
            if (replaced / target.name).exists():
                os.replace(replaced / target.name, target)
        raise


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written here: see `replacing`."""
    if destination.is_dir():
        contents = sorted(destination.iterdir())
        foreign = [path.name for path in contents if not _is_ours(path)]
        if foreign:
            raise CheckpointError(
                f"{destination} holds other files ({', '.join(foreign[:4])}); choose another folder"
            )
        if not contents:
            return
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination} exists; choose another name or pass overwrite=True (--overwrite)"
        )


def _is_ours(path: Path) -> bool:
    if path.name == ORBAX_FOLDER:
        return (path / ORBAX_MARK).exists()
    is_shard = path.name.startswith("model-") and path.name.endswith(".safetensors")
    return is_shard or path.name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)
