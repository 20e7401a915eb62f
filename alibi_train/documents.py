"""Documents as one long row of tokens, mapped from disk where they are tokens already."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Documents:
    """Tokens of documents, one after the other.

    Attributes:
        tokens: perhaps mapped from a file.
        ends: the position behind each document; the last is the number of tokens.
    """

    tokens: Integer[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, " documents"]

    @classmethod
    def of(cls, parts: Iterable[Integer[np.ndarray, " length"]]) -> Documents:
        """From the tokens of each."""
        arrays = [np.asarray(part) for part in parts]
        ends = np.cumsum([len(each) for each in arrays], dtype=np.int64)
        return cls(np.concatenate(arrays), ends)


def files_of(patterns: Sequence[str], folder: Path) -> list[Path]:
    """The files that paths and patterns name, each once, in their order.

    Raises:
        ValueError: one names none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        named = [path] if (folder / path).is_file() else []  # its name may look like a pattern
        names = named or sorted(glob.glob(path, root_dir=folder, recursive=True))
        files = [folder / name for name in names if (folder / name).is_file()]
        if not files:
            raise ValueError(f"{pattern!r} in {folder} names no file")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(
    files: Sequence[Path], encode: Encode | None, end_token_id: int | None, token_dtype: str
) -> Documents:
    """The documents of files, texts or tokens.

    Args:
        encode: the tokens of a text; None for the bytes of UTF-8.
        end_token_id: is appended to every document of a text; ends documents of tokens.
        token_dtype: of .bin files.

    Raises:
        ValueError: a file of an unknown kind, texts and tokens together, an empty text, or one
            that is not UTF-8.
    """
    kinds = {file.suffix in _TOKENS for file in files}
    unknown = [file for file in files if file.suffix not in (*_TOKENS, *_TEXTS)]
    if unknown:
        expected = ", ".join((*_TEXTS, *_TOKENS))
        raise ValueError(f"{unknown[0]} is of an unknown kind; expected {expected}")
    if len(kinds) > 1:
        raise ValueError("texts and tokens together; give only one kind of files")
    if kinds == {True}:
        parts = [_mapped(file, token_dtype) for file in files]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Documents(tokens, _ends(tokens, end_token_id))
    texts = (text for file in files for text in _TEXTS[file.suffix](file))
    ending = [] if end_token_id is None else [end_token_id]
    return Documents.of(_encoded(text, encode, ending) for text in texts)


def texts_of(files: Sequence[Path]) -> Iterator[str]:
    """The texts of files, for training a tokenizer.

    Raises:
        ValueError: files of tokens, or as for `read_documents`.
    """
    for file in files:
        if file.suffix not in _TEXTS:
            raise ValueError(f"{file} is no text; expected {', '.join(_TEXTS)}")
        yield from _TEXTS[file.suffix](file)


def _encoded(text: str, encode: Encode | None, ending: list[int]) -> Integer[np.ndarray, " length"]:
    if encode is None:
        found = np.frombuffer(text.encode(), np.uint8)
        return np.append(found, np.array(ending, np.int32)) if ending else found
    return np.array([*encode(text), *ending], np.uint32)


def _text(file: Path) -> Iterator[str]:
    yield _required(_decoded(file), file)


def _lines(file: Path) -> Iterator[str]:
    # Not splitlines(): a JSON text may hold other ends of lines than this one.
    for number, line in enumerate(_decoded(file).removesuffix("\n").split("\n"), 1):
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'line {number} of {file} is no JSON object with a "text"')
        yield _required(text, f"line {number} of {file}")


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def _required(text: str, place: Any) -> str:
    if not text:
        raise ValueError(f"{place} is empty; expected a text")
    return text


def _mapped(file: Path, token_dtype: str) -> Integer[np.ndarray, " tokens"]:
    """The tokens of a file, which the system reads when they are needed."""
    if file.suffix == ".npy":
        try:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{file} is no array of NumPy: {error}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{file} holds {tokens.dtype}{list(tokens.shape)}; expected one axis of integers"
            )
        return tokens
    size, width = file.stat().st_size, np.dtype(token_dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(f"{file} has {size} bytes; expected tokens of {token_dtype}, {width} each")
    return np.memmap(file, token_dtype, "r")


def _ends(
    tokens: Integer[np.ndarray, " tokens"], end_token_id: int | None
) -> Int64[np.ndarray, " documents"]:
    """Behind every end token, and behind the last token."""
    step, found = 2**24, []
    if end_token_id is not None:
        for start in range(0, len(tokens), step):  # the file may be larger than the memory
            found.append(np.flatnonzero(tokens[start : start + step] == end_token_id) + start + 1)
    return np.unique(np.concatenate([*found, [len(tokens)]]).astype(np.int64))


_TEXTS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _text, ".jsonl": _lines}
_TOKENS = (".npy", ".bin")
