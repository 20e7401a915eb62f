"""Texts as tokens and back: by the tokenizer of a checkpoint's folder, or as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from alibi_convert.checkpoint import Checkpoint

BYTES = 256


@dataclass(frozen=True)
class Bytes:
    """The tokenizer of a model of bytes: a token is a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def encode_file(self, path: Path) -> list[int]:
        """The bytes of any file."""
        return list(path.read_bytes())

    def decode(self, ids: list[int]) -> str:
        """The text of bytes; invalid UTF-8 becomes a replacement character."""
        return bytes(ids).decode(errors="replace")


@dataclass(frozen=True)
class Subwords:
    """A `tokenizers.Tokenizer`."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer.encode(text).ids

    def encode_file(self, path: Path) -> list[int]:
        """The tokens of a file of UTF-8."""
        return self.encode(path.read_text(encoding="utf-8"))

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(ids)


def tokenizer_of(checkpoint: Checkpoint) -> Bytes | Subwords:
    """The tokenizer of a checkpoint's folder; bytes, if it has none and 256 tokens.

    Raises:
        ValueError: it has neither.
    """
    from alibi_convert import load_tokenizer
    from alibi_convert.tokenizer import TOKENIZER_FILE

    if (checkpoint.path / TOKENIZER_FILE).is_file():
        return Subwords(load_tokenizer(checkpoint.path))
    if checkpoint.config.vocab_size == BYTES:
        return Bytes()
    raise ValueError(
        f"{checkpoint.path} has no {TOKENIZER_FILE}; add one: its tokens are not bytes"
    )
