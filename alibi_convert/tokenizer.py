"""The tokenizer in the folder of a checkpoint, or in a GGUF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_whole
from alibi_convert.formats import gguf
from alibi_convert.hub import resolve
from alibi_convert.machine import require
from alibi_convert.writing.layout import TOKENIZER_FILE

MAX_TOKENIZER_BYTES = 2**28


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint folder, of a GGUF, or of `org/name` on the hub.

    It encodes texts as they are: the file's settings of truncation and padding are turned off.

    Raises:
        CheckpointError: no tokenizer.json there, or a broken one.
        ValueError: the tokenizers library is not installed.
    """
    require("tokenizers", "hub", "reading a tokenizer")
    from tokenizers import Tokenizer

    place = resolve(path, revision=revision)
    contents = _contents(place)
    try:
        tokenizer = Tokenizer.from_buffer(contents)
    except ValueError as error:
        raise CheckpointError(f"{place / TOKENIZER_FILE} is not a tokenizer: {error}") from None
    # The settings of its last use: a long text would be cut, a short one padded, without a warning.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _contents(path: Path) -> bytes:
    if gguf.recognises(path) and path.is_file():
        found = gguf.held(path).get(TOKENIZER_FILE)
        if found is None:
            raise CheckpointError(f"{path} holds no tokenizer that can be rebuilt")
        return found
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; convert the tokenizer with transformers' save_pretrained first"
        )
    return read_whole(file, MAX_TOKENIZER_BYTES)
