"""BERT's WordPiece in a GGUF: what llama.cpp has of it, and its tokens as both files spell them.

llama.cpp marks the pieces that begin a word, tokenizer.json those that do not. llama.cpp writes
every text in small letters and without accents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

NAME, KIND = "WordPiece", "bert"  # in tokenizer.json, in a GGUF
# What llama.cpp takes where a file does not say it; every text is between the first two.
PLACES = {"bos": 101, "sep": 102, "unk": 100, "pad": 0, "mask": 103}

_FIRST, _LATER = "\N{LOWER ONE EIGHTH BLOCK}", "##"
_NORMALIZER = {
    **{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
    **{"strip_accents": None, "lowercase": True},
}
_PRE_TOKENIZER = {"type": "BertPreTokenizer"}
_LETTERS = 100  # of the longest word that tokenizer.json cuts; llama.cpp has no such limit


def reasons(
    values: Mapping[str, Any], around: Mapping[str, Any], pieces: Mapping[str, str]
) -> Iterator[str]:
    """What a tokenizer.json has that llama.cpp does not.

    Args:
        values: its contents.
        around: the tokens before and after every text.
        pieces: its tokens as llama.cpp spells them.
    """
    prefix = values["model"].get("continuing_subword_prefix", _LATER)
    if prefix != _LATER:
        yield f"has continuing_subword_prefix={prefix!r}"
    normalizer = values.get("normalizer") or {}
    if normalizer.get("strip_accents"):  # as small letters bring with them
        normalizer = {**normalizer, "strip_accents": None}
    for name, found, wanted in (
        ("normalizer", normalizer, _NORMALIZER),
        ("pre_tokenizer", values.get("pre_tokenizer"), _PRE_TOKENIZER),
    ):
        if found != wanted:
            yield f"has the {name} {json.dumps(values.get(name), ensure_ascii=False)}"
    for each in values.get("added_tokens") or ():
        if each.get("normalized"):
            yield f"has the token {each['content']!r} with normalized"
    if len(around) != 2:
        yield "does not put a token before and one after every text"
    spelled: set[str] = set()
    for token, piece in pieces.items():
        if piece in spelled or not token or token.startswith(f"{_LATER}{_FIRST}"):
            yield f"has the token {token!r}, which is spelled like another"
        spelled.add(piece)


def to_piece(token: str) -> str:
    """A token of the model as llama.cpp spells it."""
    is_later = token.startswith(_LATER) and token != _LATER
    return token.removeprefix(_LATER) if is_later else f"{_FIRST}{token}"


def from_piece(piece: str) -> str:
    """The inverse of `to_piece`."""
    return piece.removeprefix(_FIRST) if piece.startswith(_FIRST) else f"{_LATER}{piece}"


def parts(vocab: Mapping[str, int], unknown: str) -> dict[str, Any]:
    """The parts of a tokenizer.json that are BERT's."""
    return {
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "decoder": {"type": NAME, "prefix": _LATER, "cleanup": True},
        "model": {
            **{"type": NAME, "unk_token": unknown, "continuing_subword_prefix": _LATER},
            **{"max_input_chars_per_word": _LETTERS, "vocab": vocab},
        },
    }
