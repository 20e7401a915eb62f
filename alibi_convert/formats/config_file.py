"""Our `config.json`: in a folder, beside a file, or in the metadata of one."""

from __future__ import annotations

import json
from pathlib import Path

from alibi_convert.errors import CheckpointError
from alibi_convert.files import parse_json, read_whole
from alibi_convert.writing.layout import sidecar
from alibi_spec import ALiBiConfig

OURS = "alibi-duo"  # what `format` says, where other libraries say `model_type`
VERSION = 1


def parse_config(text: str | bytes, origin: str) -> ALiBiConfig:
    """The configuration of a checkpoint of ours; `origin` names it in errors.

    Raises:
        CheckpointError: not our format, of a newer version, or with invalid values.
    """
    values = parse_json(text, origin)
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
        return ALiBiConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from None


def read_config(path: Path) -> ALiBiConfig:
    """`parse_config` of a file; a missing one is a CheckpointError too."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a checkpoint folder")
    return parse_config(read_whole(path), str(path))


def config_json(config: ALiBiConfig) -> str:
    """The text of `config.json`."""
    values = {"format": OURS, "format_version": VERSION, **config.to_dict()}
    return json.dumps(values, indent=2) + "\n"


def read_sidecar(path: Path) -> ALiBiConfig | None:
    """The configuration beside a .pt or .msgpack file, if there is one."""
    return read_config(sidecar(path)) if sidecar(path).exists() else None


def write_sidecar(path: Path, config: ALiBiConfig) -> None:
    """The configuration, beside a .pt or .msgpack file."""
    sidecar(path).write_text(config_json(config), encoding="utf-8")
