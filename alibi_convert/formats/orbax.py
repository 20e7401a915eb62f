"""Flax params in what orbax writes: one tree, a step of a CheckpointManager, or all its steps.

A tree is a folder with `_METADATA`; the data is a small database. The library reads its manifest
without a limit of size, and a damaged one has ended the process: it is checked first.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json, read_whole, require_regular
from alibi_convert.formats.config_file import config_json, read_config
from alibi_convert.formats.format import Asked, Beside, Format, Opened, no_steps
from alibi_convert.formats.train_state import Found, at, beside_params, find_params, placed
from alibi_convert.machine import require
from alibi_convert.rules import canonical_tensors, check_tree, flax_tree
from alibi_convert.tensors import Tensors
from alibi_convert.writing.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    ORBAX_FOLDER,
    ORBAX_MARK,
    WEIGHTS_FILE,
)
from alibi_spec import ALiBiConfig

_TREE_FILE = "_METADATA"
_JSON_FILES = (_TREE_FILE, "_sharding", "array_metadatas/process_*", ORBAX_MARK)
_MANIFEST = "manifest.ocdbt"
_MANIFEST_MAGIC = 0x0CDB3A2A
_MAX_MANIFEST_BYTES = 2**20  # it names the root of each version
_NAMES = ("params", "state", "train_state", "model", "default")  # of trees, the likeliest first

# What orbax and tensorstore raise for broken files.
_ERRORS = (
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def recognises(path: Path) -> bool:
    """Whether orbax wrote weights into a folder: a tree, a step, or the steps of a manager."""
    if not path.is_dir() or any((path / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return False
    folders = (path, *_folders(path))
    return bool(_steps(path)) or any(
        _is_tree(each) or (each / ORBAX_MARK).exists() for each in folders
    )


def find_tree(folder: Path, step: int | None = None) -> Path:
    """The folder of the one tree that holds params.

    Args:
        folder: a tree, a step, or the folder of a CheckpointManager.
        step: of the manager's; None is its latest.

    Raises:
        CheckpointError: no such step, broken, or several trees that could be meant.
    """
    if step is None and _is_tree(folder):
        return folder
    names = [path.name for path in _folders(folder) if _is_tree(path)]
    if step is None and names:
        likely = [name for name in _NAMES if name in names]
        if len(names) > 1 and not likely:
            raise CheckpointError(
                f"{folder} holds the trees {', '.join(names)}; give the path of one of them"
            )
        return folder / (likely or names)[0]
    steps = _steps(folder)
    if not steps and step is not None:
        raise no_steps(folder, step)
    if not steps:
        raise CheckpointError(
            f"{folder} is not a complete orbax checkpoint: {_TREE_FILE} does not exist"
        )
    if step is not None and step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"{folder} has no step {step}; it has {known}")
    return find_tree(steps[max(steps) if step is None else step])


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _steps(folder: Path) -> dict[int, Path]:
    """The finished steps of a manager, by their numbers."""
    return {int(found[0]): path for path in _folders(folder) if (found := _step(path))}


def _is_tree(folder: Path) -> bool:
    return (folder / _TREE_FILE).exists()


def _step(folder: Path) -> re.Match[str] | None:
    """The number that ends the name of a finished step; it may follow a prefix and a _."""
    has_tree = any(map(_is_tree, _folders(folder)))
    return re.search(r"(?:(?<=_)|^)\d+$", folder.name) if has_tree or _is_tree(folder) else None


def _find(tree_folder: Path) -> tuple[Found, dict[str, str], Any]:
    """Where the params are in the folder of one tree, the other keys, and the shapes of all.

    Raises:
        CheckpointError: broken.
    """
    _check_files(tree_folder)
    require("orbax.checkpoint", "flax", "reading orbax")
    with _handler(tree_folder) as (handler, folder):
        tree: Any = handler.metadata(folder).tree
        return *find_params(tree, tree_folder), tree


def _restored(tree_folder: Path, tree: Any, keys: Sequence[str]) -> Any:
    """The arrays that some keys lead to."""
    import jax
    import orbax.checkpoint as ocp

    # As NumPy arrays: the devices that wrote it need not be here.
    one = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = placed(at(tree, keys), keys)
    arguments = ocp.args.PyTreeRestore(
        wanted, restore_args=jax.tree.map(lambda _: one, wanted), partial_restore=True
    )
    with _handler(tree_folder) as (handler, folder):
        return at(handler.restore(folder, args=arguments), keys)


@contextmanager
def _handler(tree_folder: Path) -> Iterator[tuple[Any, Any]]:
    """What reads a tree, and its folder; errors of the libraries become ours."""
    import orbax.checkpoint as ocp
    from etils import epath

    handler = ocp.PyTreeCheckpointHandler()
    try:
        yield handler, epath.Path(tree_folder.absolute())
    except _ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{tree_folder} is not a complete orbax checkpoint: {cause}"
        ) from None
    finally:
        handler.close()


def _check_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_dir():
            require_regular(path)
    for pattern in _JSON_FILES:
        for path in folder.glob(pattern):
            read_json(path)
    for path in folder.rglob(_MANIFEST):
        _check_manifest(path)


def _check_manifest(path: Path) -> None:
    """Magic number, length and CRC-32C of a manifest, as tensorstore's format has them."""
    contents = read_whole(path, _MAX_MANIFEST_BYTES)
    if len(contents) >= 16:
        (magic,), (length,) = struct.unpack(">I", contents[:4]), struct.unpack("<Q", contents[4:12])
        (crc,) = struct.unpack("<I", contents[-4:])
        if (magic, length, crc) == (_MANIFEST_MAGIC, len(contents), _crc32c(contents[:-4])):
            return
    raise CheckpointError(f"{path} is damaged: the checkpoint is not a complete orbax checkpoint")


def _crc32c(contents: bytes) -> int:
    """The CRC of Castagnoli's polynomial, which Python's libraries lack."""
    table, crc = _crc32c_table(), 2**32 - 1
    for byte in contents:
        crc = crc >> 8 ^ table[crc & 255 ^ byte]
    return crc ^ 2**32 - 1


@cache
def _crc32c_table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


def read(folder: Path, asked: Asked) -> Opened:
    """The params of one tree, and the other keys; of ours, with a config.json.

    Raises:
        CheckpointError: broken, or not the params of this configuration.
    """
    tree = find_tree(folder, asked.step)
    is_ours = (folder / CONFIG_FILE).exists()
    config = asked.settle(read_config(folder / CONFIG_FILE) if is_ours else None)
    found, left, shapes = _find(tree)
    check_tree(found.params, config)  # a wrong shape costs no memory
    params = _restored(tree, shapes, found.keys)
    tensors = Tensors.of(canonical_tensors(params, config))
    optimizer = None
    if found.optimizer:
        name = "/".join(found.optimizer)
        optimizer = Beside(name, "optax", lambda: _restored(tree, shapes, found.optimizer))
    place = folder if is_ours else tree
    files = {str(f.relative_to(place)): f for f in sorted(place.rglob("*")) if f.is_file()}
    return Opened("orbax", place, files, tensors, config, left=left, optimizer=optimizer)


def write(
    path: Path, config: ALiBiConfig, tensors: Tensors, optimizer: Any = None, **_: Any
) -> dict[str, str]:
    """Flax params, and our config.json in the same folder.

    With an optimizer's state they are in the tree of a `TrainState`.
    """
    require("orbax.checkpoint", "flax", "writing orbax")
    import orbax.checkpoint as ocp

    path.mkdir()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = beside_params(flax_tree(tensors, config), optimizer)
            checkpointer.save(path.absolute() / ORBAX_FOLDER, tree)
    except ValueError as error:  # tensorstore's, for a full disk, too
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    (path / CONFIG_FILE).write_text(config_json(config), encoding="utf-8")
    return {}


FORMAT = Format(
    *("Flax params, orbax folder", "", write, recognises, read),
    library=("orbax.checkpoint", "flax"),
)
