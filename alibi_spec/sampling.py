"""How a next token is chosen: logits processors, the uniforms of a seed, endings (SPEC.md §11).

The backends compute the same in float32. Names, defaults and the order of the processors are those
of transformers' generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_spec.checks import check_prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Integer

UNIFORM_BITS = 23
_MARKS = 16  # tokens without text, or whose text depends on those before, next to a stop string


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        do_sample: draw from the distribution; else the likeliest token is taken.
        temperature: divides the logits.
        top_k: keep this many of the likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this.
        min_p: keep tokens whose probability is at least this share of the largest.
        repetition_penalty: divides positive logits of tokens that have occurred, prompt included,
            and multiplies negative ones.

    Raises:
        ValueError: an option out of its range, or one that has no effect without `do_sample`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (
                _is_number(self.temperature) and self.temperature > 0,
                "a number above 0",
            ),
            "top_k": (self.top_k is None or _is_count(self.top_k), "an integer of at least 1"),
            "top_p": (self.top_p is None or _is_share(self.top_p), "a number in (0, 1]"),
            "min_p": (self.min_p is None or _is_share(self.min_p), "a number in (0, 1]"),
            "repetition_penalty": (
                _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
                "a number above 0",
            ),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not valid; expected {expected}"
                )
        drawn = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
        for name, default in drawn.items():
            if not self.do_sample and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without sampling; pass "
                    "do_sample=True"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def processed(
    logits: Float[np.ndarray, "batch vocab"],
    is_there: Bool[np.ndarray, "batch vocab"],
    sampling: Sampling,
) -> Float64[np.ndarray, "batch vocab"]:
    """The logits that a token is chosen by; -inf for a token that cannot be chosen.

    In this order: penalty, temperature, `top_k`, `top_p`, `min_p`. Every cut is a threshold, so
    that tokens with equal logits stay or go together.

    Args:
        is_there: tokens that occur in the prompt (padding excluded) or were generated.
    """
    logits = logits.astype(np.float64)
    penalty = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    logits = np.where(is_there, logits * penalty, logits)
    if not sampling.do_sample:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        ranked = -np.sort(-logits, axis=-1)
        logits = _from(logits, ranked[:, min(sampling.top_k, logits.shape[1]) - 1])
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked = -np.sort(-logits, axis=-1)
        probabilities = _softmax(ranked)
        before = probabilities.cumsum(axis=-1) - probabilities
        kept = np.where(before < sampling.top_p, ranked, np.inf)
        logits = _from(logits, kept.min(axis=-1))
    if sampling.min_p is not None:
        logits = _from(logits, logits.max(axis=-1) + math.log(sampling.min_p))
    return logits


def _from(
    logits: Float64[np.ndarray, "batch vocab"], least: Float64[np.ndarray, " batch"]
) -> Float64[np.ndarray, "batch vocab"]:
    return np.where(logits >= least[:, None], logits, -np.inf)


def _softmax(logits: Float64[np.ndarray, "batch vocab"]) -> Float64[np.ndarray, "batch vocab"]:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def uniforms(seed: int, rows: int) -> Iterator[Float32[np.ndarray, " rows"]]:
    """The numbers in [0, 1) that draw the tokens of each step, without end.

    Each depends only on seed, step and row of the batch. Each row has its own stream: NumPy's
    Philox4x64-10 (Salmon et al. 2011) with the key (seed, row). Step t takes its t-th number, cut
    to 23 bits, so that its product with a float32 total is less than the total.

    Raises:
        ValueError: a seed outside of 0 … 2^64 - 1.
    """
    if not (_is_number(seed) and isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} is not valid; expected an integer in 0 … 2^64 - 1")
    keys = [np.array([seed, row], np.uint64) for row in range(rows)]
    return _uniforms([np.random.Generator(np.random.Philox(key=key)) for key in keys])


def _uniforms(streams: list[np.random.Generator]) -> Iterator[Float32[np.ndarray, " rows"]]:
    while True:
        drawn = np.array([stream.random() for stream in streams])
        yield (np.floor(drawn * 2**UNIFORM_BITS) / 2**UNIFORM_BITS).astype(np.float32)


def drawn_tokens(
    logits: Float[np.ndarray, "batch vocab"], uniform: Float[np.ndarray, " batch"]
) -> Int[np.ndarray, " batch"]:
    """The first token, in the order of ids, whose cumulative probability exceeds the uniform."""
    cumulative = _softmax(logits.astype(np.float64)).cumsum(axis=-1)
    return (cumulative > uniform[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def boundary_distance(
    logits: Float[np.ndarray, "batch vocab"], uniform: Float[np.ndarray, " batch"]
) -> Float64[np.ndarray, " batch"]:
    """Distance of each uniform from the nearest boundary between two tokens, as a probability.

    Within the rounding of its cumulative sums, a backend can draw the neighbouring token.
    """
    cumulative = _softmax(logits.astype(np.float64)).cumsum(axis=-1)
    return np.abs(cumulative / cumulative[:, -1:] - uniform[:, None]).min(axis=-1)


def left_padded(
    tokens: Integer[np.ndarray, "batch prompt_len"],
    attention_mask: Integer[np.ndarray, "batch prompt_len"] | Bool[np.ndarray, "batch prompt_len"],
) -> tuple[Integer[np.ndarray, "batch prompt_len"], Bool[np.ndarray, "batch prompt_len"]]:
    """Prompts and their mask, moved so that each ends in the last column, where new tokens follow.

    Raises:
        ValueError: a prompt that is only padding.
    """
    visible = attention_mask != 0
    check_prompts(visible.sum(axis=1).tolist())
    position = np.arange(tokens.shape[1])
    behind = visible[:, ::-1].argmax(axis=1)  # padding after the last token
    source = (position[None] - behind[:, None]) % tokens.shape[1]
    return np.take_along_axis(tokens, source, 1), np.take_along_axis(visible, source, 1)


@dataclass
class Endings:
    """Which sequences have ended, and why: kept while tokens are generated.

    Attributes:
        eos: the ids that end a sequence.
        pad: the id that follows an ended sequence.
        stop_strings: texts that end a sequence.
        decode: the text of tokens; None without stop strings.
        lengths: number of new tokens of each sequence, including the one that ended it.
        reasons: of each sequence: "eos", "stop_string", or "length" while it has not ended.
    """

    eos: frozenset[int]
    pad: int
    stop_strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    lengths: list[int]
    reasons: list[str]
    _recent: list[list[int]]

    @classmethod
    def of(
        cls,
        rows: int,
        vocab_size: int,
        *,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int | None,
        stop_strings: str | Sequence[str] | None,
        tokenizer: Any,
    ) -> Endings:
        """Before the first new token. The default of `pad_token_id` is the first eos id, or 0.

        Raises:
            ValueError: an id that is not in the vocabulary, or stop strings without a tokenizer, or
                empty ones.
        """
        eos = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
        pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
        for name, token in (*(("eos_token_id", each) for each in eos), ("pad_token_id", pad)):
            if not (isinstance(token, int) and 0 <= token < vocab_size):
                raise ValueError(
                    f"{name}={token!r} is not a token; expected an integer in 0 … {vocab_size - 1}"
                )
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings or ()
        if not all(isinstance(each, str) and each for each in stop_strings):
            raise ValueError(f"stop_strings={stop_strings!r} is not valid; expected texts")
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, to decode tokens; pass tokenizer=")
        decode = tokenizer.decode if stop_strings else None
        return cls(
            *(frozenset(eos), pad, tuple(stop_strings), decode),
            *([0] * rows, ["length"] * rows, [[] for _ in range(rows)]),
        )

    @property
    def can_come(self) -> bool:
        """Whether a sequence can end early, so that tokens must be read."""
        return bool(self.eos or self.stop_strings)

    @property
    def are_all(self) -> bool:
        """Whether all sequences have ended."""
        return "length" not in self.reasons

    def count(self) -> None:
        """Count one new token for each sequence, if none can end early."""
        self.lengths = [length + 1 for length in self.lengths]

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Take one new token for each sequence; an ended sequence gets `pad` instead."""
        return [self._take(row, token) for row, token in enumerate(tokens)]

    def _take(self, row: int, token: int) -> int:
        if self.reasons[row] != "length":
            return self.pad
        self.lengths[row] += 1
        if token in self.eos:
            self.reasons[row] = "eos"
        elif self.decode is not None:
            # Only what can hold a stop string that this token completes, so that a step costs the
            # same after any number of them: a token is a byte or more, but for a few marks.
            reach = max(len(each.encode()) for each in self.stop_strings) + _MARKS
            self._recent[row] = [*self._recent[row], token][-reach:]
            text = self.decode(self._recent[row])
            if any(each in text for each in self.stop_strings):
                self.reasons[row] = "stop_string"
        return token
