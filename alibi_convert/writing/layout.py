"""Names of the files in a checkpoint folder, and which of them are copied unread."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

CONFIG_FILE = "config.json"
CONVERSION_FILE = "conversion.json"
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"
INDEX_FILE = "model.safetensors.index.json"
TRAINING_FILE = "training.json"
TOKENIZER_FILE = "tokenizer.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
ORBAX_FOLDER = "params"
ORBAX_MARK = "_CHECKPOINT_METADATA"  # a file that orbax puts into every checkpoint

# Companions: files of a model that are not weights; they are copied from folder to folder.
_CHAT_TEMPLATES = "additional_chat_templates"
COMPANIONS = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "dict.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{_CHAT_TEMPLATES}/*.jinja",
)


def companions(folder: Path) -> list[str]:
    """Names, with slashes, of the companions in a folder."""
    found = (path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)))
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def copy_companion(source: Path, folder: Path, name: str) -> None:
    """Copy one of `companions` into another folder."""
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / name, folder / name)


def sidecar(path: Path) -> Path:
    """Where the configuration of a .pt or .msgpack file is kept: `<file>.json` next to it."""
    return path.with_name(path.name + ".json")


def is_weight_file(path: Path) -> bool:
    """Whether this entry of a folder is weights or their index."""
    is_shard = re.fullmatch(r"(model|pytorch_model)-.*\.(safetensors|bin)", path.name)
    names = (WEIGHTS_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE)
    return is_shard is not None or path.name in names


def is_model_file(path: Path) -> bool:
    """Whether this entry of a folder is weights of ours, or what goes with these very weights."""
    if path.name == ORBAX_FOLDER:
        return (path / ORBAX_MARK).exists()
    is_shard = path.name.startswith("model-") and path.name.endswith(".safetensors")
    names = (CONFIG_FILE, CONVERSION_FILE, WEIGHTS_FILE, INDEX_FILE, OPTIMIZER_FILE, TRAINING_FILE)
    return is_shard or path.name in names


def is_checkpoint_file(path: Path) -> bool:
    """Whether this entry of a folder may be replaced along with the checkpoint in it."""
    if path.name == _CHAT_TEMPLATES and path.is_dir():
        return all(each.suffix == ".jinja" and each.is_file() for each in path.iterdir())
    return is_model_file(path) or path.name in COMPANIONS
