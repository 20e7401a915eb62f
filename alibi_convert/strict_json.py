"""JSON objects from files that nobody vouches for: strictly parsed, with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.regular_file import read_whole


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
    """A JSON object; `origin` names it in errors.

    Raises:
        CheckpointError: not a JSON object, or one that says two things under one key.
    """
    try:
        values = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd nesting
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{origin} holds a JSON {type(values).__name__}, expected an object")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file; one that cannot be read, or is huge, is a CheckpointError too."""
    return parse_json(read_whole(path), str(path))


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs; ValueError where two have one key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r}; one of the two must go")
    return values
