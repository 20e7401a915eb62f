"""Where a converted checkpoint comes from: `conversion.json`, written next to its weights."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.families import family_named
from alibi_convert.files import read_json, read_whole
from alibi_convert.report import Report
from alibi_convert.tokenizer import MAX_TOKENIZER_BYTES
from alibi_convert.writing.layout import CONFIG_FILE, CONVERSION_FILE, companions, copy_companion

SPEC_VERSION = 1  # of docs/SPEC.md: what a configuration means
TABLE_VERSION = 1  # of the names and layouts of parameters
_LIBRARIES = ("alibi-duo", "numpy", "ml_dtypes", "safetensors")
# Keys of a foreign configuration that are wrong once a model has been converted.
_STALE_KEYS = frozenset(("_name_or_path", "auto_map", "dtype", "torch_dtype"))


def write_provenance(folder: Path, report: Report, source: Checkpoint) -> None:
    """`conversion.json`: the report, and the foreign configuration that the model once had."""
    values = report.to_dict()
    for name in ("destination", "kept", "seconds"):
        del values[name]
    write_record(folder, values | family_record(source))


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """`conversion.json`: these values, and by what they were written."""
    contents = {
        "spec_version": SPEC_VERSION,
        "table_version": TABLE_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
        **values,
    }
    text = json.dumps(contents, indent=2, default=str) + "\n"  # options of fairseq may be anything
    (folder / CONVERSION_FILE).write_text(text, encoding="utf-8")


def family_record(source: Checkpoint) -> dict[str, Any]:
    """The foreign configuration that a model has or once had, and its family."""
    if source.foreign_config is not None:
        return {"source_config": dict(source.foreign_config), "source_family": source.family}
    return recorded_family(source.path)


def recorded_family(folder: Path) -> dict[str, Any]:
    """What the conversion.json of a folder says about the family that its model comes from."""
    record = _record(folder)
    kept = ("source_config", "source_family")
    return {name: record[name] for name in kept if name in record}


def reader_of_companions(source: Checkpoint) -> Callable[[str], bytes | None]:
    """What reads the companions of a source by name; None for those that it lacks."""
    inside = source.inside()

    def read(name: str) -> bytes | None:
        path = source.path / name
        if source.path.is_dir() and path.is_file():
            return read_whole(path, MAX_TOKENIZER_BYTES)
        return inside.get(name)

    return read


def bring_along(
    source: Checkpoint, folder: Path, to: str, held: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """Copy the companions of a source to the folder of the destination.

    A model that stays in its family, or returns to it, keeps the keys that we have no use for.

    Args:
        source: what is converted.
        folder: of the destination, or its file.
        to: the format.
        held: companions that the destination keeps in itself.

    Returns:
        names of the files that were copied, and of the others that the source has.
    """
    _restore_neutral_keys(folder, family_record(source), to)
    names = companions(source.path) if source.path.is_dir() and folder.is_dir() else []
    for name in names:
        copy_companion(source.path, folder, name)
    if source.path.is_dir():
        return names, _left_behind(source, [*names, *held])
    inside = source.inside()
    if not folder.is_dir():
        return [], [] if held else [*inside]
    for name, contents in inside.items():
        (folder / name).write_bytes(contents)
    return [*inside], []


def _left_behind(source: Checkpoint, copied: Iterable[str]) -> list[str]:
    """Names in a folder of what was neither read nor copied, but for its conversion.json."""
    taken = (CONVERSION_FILE, *source.files, *copied)
    known = {name.split("/")[0] for name in taken}
    others = sorted(path for path in source.path.iterdir() if path.name not in known)
    return [f"{path.name}/" if path.is_dir() else path.name for path in others]


def _restore_neutral_keys(folder: Path, known: Mapping[str, Any], to: str) -> None:
    """The keys of its old config.json that have no meaning for us, such as ids of special tokens.

    The `conversion.json` of a folder of ours remembers them.
    """
    family, written = family_named(to), folder / CONFIG_FILE
    before = known.get("source_config")
    if family is None or known.get("source_family") != family.name:
        return
    if not (isinstance(before, dict) and written.exists()):
        return
    neutral = family.neutral_keys - _STALE_KEYS
    kept = {name: value for name, value in before.items() if name in neutral}
    text = json.dumps(kept | read_json(written), indent=2) + "\n"
    written.write_text(text, encoding="utf-8")


def _record(folder: Path) -> dict[str, Any]:
    """The conversion.json of a folder; empty where there is none."""
    path = folder / CONVERSION_FILE
    return read_json(path) if folder.is_dir() and path.exists() else {}


def library_versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a conversion writes."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **versions}
