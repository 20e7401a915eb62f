"""What the files of a checkpoint folder are called, and which of them go along unread."""

from __future__ import annotations

import shutil
from pathlib import Path

CONFIG_FILE = "config.json"
CONVERSION_FILE = "conversion.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
ORBAX_FOLDER = "params"
ORBAX_MARK = "_CHECKPOINT_METADATA"  # a file that orbax puts into every checkpoint

# What belongs to a model without being weights; it goes along from folder to folder.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "dict.txt",
    "generation_config.json",
    "chat_template.jinja",
)

_LFS_POINTER_BYTES = 1024  # no pointer is longer


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy what belongs to the model of one folder into another; the names of the files."""
    names = [name for name in COMPANION_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def lfs_pointers(path: Path) -> list[Path]:
    """Files of a checkpoint that git-LFS has not fetched: a few lines stand where they should."""
    files = path.iterdir() if path.is_dir() else (path, sidecar(path))
    return [file for file in sorted(files) if _is_lfs_pointer(file)]


def _is_lfs_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > _LFS_POINTER_BYTES:
        return False
    return file.read_bytes().startswith(b"version https://git-lfs.github.com/")


def sidecar(path: Path) -> Path:
    """Where the configuration of a .pt or .msgpack file is kept: `<file>.json` beside it."""
    return path.with_name(path.name + ".json")


def is_checkpoint_file(path: Path) -> bool:
    """Whether this entry of a folder may be replaced along with the checkpoint in it."""
    if path.name == ORBAX_FOLDER:
        return (path / ORBAX_MARK).exists()
    is_shard = path.name.startswith("model-") and path.name.endswith(".safetensors")
    return is_shard or path.name in (
        CONFIG_FILE,
        CONVERSION_FILE,
        WEIGHTS_FILE,
        INDEX_FILE,
        *COMPANION_FILES,
    )
