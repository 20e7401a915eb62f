"""Texts as tokens and back: by the tokenizer of a checkpoint's folder, or as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from alibi_convert.checkpoint import Checkpoint

BYTES = 256
_MASKS = ("[MASK]", "<mask>")  # what tokenizers call it whose folders do not say
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


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

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return self.decode([token])

    def special_token(self, text: str) -> int | None:
        """The byte that this text is; None, if it is not one."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


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

    def token_text(self, token: int) -> str:
        """The text of one token, special or not."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def special_token(self, text: str) -> int | None:
        """The token that this text is, now whole wherever it occurs; None, if there is none."""
        token = self.tokenizer.token_to_id(text)
        if token is not None and token not in self.tokenizer.get_added_tokens_decoder():
            self.tokenizer.add_special_tokens([text])  # else it would be cut like any other word
        return token


def tokenizer_of(checkpoint: Checkpoint) -> Bytes | Subwords:
    """The tokenizer of a checkpoint; bytes, if it has none and 256 tokens.

    Raises:
        ValueError: it has neither.
    """
    from alibi_convert import load_tokenizer
    from alibi_convert.writing.layout import TOKENIZER_FILE

    if (checkpoint.path / TOKENIZER_FILE).is_file() or TOKENIZER_FILE in checkpoint.inside():
        return Subwords(load_tokenizer(checkpoint.path))
    if checkpoint.config.vocab_size == BYTES:
        return Bytes()
    raise ValueError(
        f"{checkpoint.path} has no {TOKENIZER_FILE}; add one: its tokens are not bytes"
    )


class MaskToken(NamedTuple):
    """The token that stands for a mask, and its text."""

    text: str
    id: int


def mask_token_of(
    checkpoint: Checkpoint, tokenizer: Bytes | Subwords, given: str | None = None
) -> MaskToken:
    """The mask token that is given, or else that of a checkpoint's tokenizer.

    Raises:
        ValueError: the folder names none, or the text is not one token.
    """
    text = _named_mask(checkpoint.path, tokenizer) if given is None else given
    if text is None:
        raise ValueError(
            f"{checkpoint.path} names no mask token; pass the text of one: --mask-token"
        )
    token = tokenizer.special_token(text)
    if token is None:
        raise ValueError(f"{text!r} is not a token of {checkpoint.path}; pass another --mask-token")
    return MaskToken(text, token)


def _named_mask(folder: Path, tokenizer: Bytes | Subwords) -> str | None:
    """What the settings of a folder call the mask token, or its tokenizer by a usual name."""
    from alibi_convert.files import read_json

    if isinstance(tokenizer, Bytes):
        return None
    for file in (folder / name for name in _SETTINGS):
        named = read_json(file).get("mask_token") if file.is_file() else None
        if named is not None:
            return named.get("content") if isinstance(named, dict) else named
    return next(
        (text for text in _MASKS if tokenizer.tokenizer.token_to_id(text) is not None), None
    )
