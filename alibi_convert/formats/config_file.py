"""Our `config.json`: in a folder, next to a file, or in the metadata of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.writing.layout import sidecar
from alibi_spec import ALiBiConfig

OURS = "alibi-duo"  # what `format` says, and `model_type` for other libraries
VERSION = 1
# What transformers writes beside a model's own options, and that changes no number here.
OF_TRANSFORMERS = frozenset(
    {
        *("architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id"),
        *("is_decoder", "model_type", "pad_token_id", "tie_word_embeddings", "torch_dtype"),
        *("transformers_version", "use_cache"),
    }
)


def parse_config(values: dict[str, Any], origin: str) -> ALiBiConfig:
    """The configuration that a config.json of ours holds; `origin` names it in errors.

    Raises:
        CheckpointError: not our format, of a newer version, or with invalid values.
    """
    values = dict(values)
    if values.pop("format", None) != OURS:
        kind = f" (model_type {values['model_type']!r})" if "model_type" in values else ""
        raise CheckpointError(
            f'{origin} is not an {OURS} configuration{kind}; expected "format": "{OURS}"'
        )
    version = values.pop("format_version", None)
    if version != VERSION:
        raise CheckpointError(
            f"{origin} has format_version {version!r}; this release reads {VERSION}; "
            "upgrade alibi-duo if the checkpoint is newer"
        )
    try:
        return ALiBiConfig.from_dict(
            {name: value for name, value in values.items() if name not in OF_TRANSFORMERS}
        )
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from None


def read_config(path: Path) -> ALiBiConfig:
    """`parse_config` of a file; a missing one is a CheckpointError too."""
    return parse_config(read_json(path), str(path))


def config_json(config: ALiBiConfig) -> str:
    """The text of `config.json`."""
    head = {"format": OURS, "format_version": VERSION, "model_type": OURS}
    values = head | config.to_dict()
    return json.dumps(values, indent=2) + "\n"


def with_sidecar(path: Path) -> dict[str, Path]:
    """A file, and the file of its configuration if there is one, by name."""
    return {each.name: each for each in (path, sidecar(path)) if each.exists()}


def read_sidecar(path: Path) -> ALiBiConfig | None:
    """The configuration next to a .pt or .msgpack file, if there is one."""
    return read_config(sidecar(path)) if sidecar(path).exists() else None


def write_sidecar(path: Path, config: ALiBiConfig) -> None:
    """The configuration, next to a .pt or .msgpack file."""
    sidecar(path).write_text(config_json(config), encoding="utf-8")
