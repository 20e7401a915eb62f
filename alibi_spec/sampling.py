"""How a next token is chosen: logits processors, the uniforms of a seed, endings (SPEC.md §11).

The backends compute the same in float32. Names, defaults and the order of the processors are those
of transformers' generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_spec.checks import check_prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Integer

UNIFORM_BITS = 23


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        do_sample: draw from the distribution; else the likeliest token is taken.
        temperature: divides the logits.
        top_k: how many of the likeliest tokens stay.
        top_p: the likeliest tokens stay that reach this probability together.
        min_p: tokens stay whose probability is at least this share of the largest.
        repetition_penalty: divides positive logits of tokens that are there already, in the prompt
            too, and multiplies negative ones.

    Raises:
        ValueError: an option out of its range, or one that only `do_sample` gives a meaning.
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
                    f"{name}={getattr(self, name)!r} changes nothing where the likeliest token is "
                    "taken; pass do_sample=True"
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
    """The logits that a token is chosen by, -inf for those that cannot be.

    Every cut is a threshold, so that tokens of one logit stay or go together: penalty, temperature,
    `top_k`, `top_p`, `min_p`, in this order.

    Args:
        is_there: the tokens of the prompt, padding aside, and those generated so far.
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


def uniforms(seed: int, steps: int, rows: int) -> Float32[np.ndarray, "steps rows"]:
    """The numbers in [0, 1) by which tokens are drawn: each of a seed, a step and a row alone.

    Each row has a stream of its own, Philox4x64-10 (Salmon et al. 2011, NumPy's) of the key
    (seed, row), of which step t takes the t-th number, cut to 23 bits: a float32 total times it is
    less than the total.

    Raises:
        ValueError: a seed outside of 0 … 2^64 - 1.
    """
    if not (_is_number(seed) and isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} is not valid; expected an integer in 0 … 2^64 - 1")
    streams = (np.random.Philox(key=np.array([seed, row], np.uint64)) for row in range(rows))
    drawn = [np.random.Generator(stream).random(steps) for stream in streams]
    cut = np.floor(np.array(drawn).reshape(rows, steps).T * 2**UNIFORM_BITS) / 2**UNIFORM_BITS
    return cut.astype(np.float32)


def drawn_tokens(
    logits: Float[np.ndarray, "batch vocab"], uniform: Float[np.ndarray, " batch"]
) -> Int[np.ndarray, " batch"]:
    """The first token, in the order of ids, whose cumulative probability exceeds the uniform."""
    cumulative = _softmax(logits.astype(np.float64)).cumsum(axis=-1)
    return (cumulative > uniform[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def boundary_distance(
    logits: Float[np.ndarray, "batch vocab"], uniform: Float[np.ndarray, " batch"]
) -> Float64[np.ndarray, " batch"]:
    """How far each uniform is from where another token begins, as a probability.

    Within the rounding of a backend's cumulative sums it may draw the neighbour.
    """
    cumulative = _softmax(logits.astype(np.float64)).cumsum(axis=-1)
    return np.abs(cumulative / cumulative[:, -1:] - uniform[:, None]).min(axis=-1)


def left_padded(
    tokens: Integer[np.ndarray, "batch prompt_len"],
    attention_mask: Integer[np.ndarray, "batch prompt_len"] | Bool[np.ndarray, "batch prompt_len"],
) -> tuple[Integer[np.ndarray, "batch prompt_len"], Bool[np.ndarray, "batch prompt_len"]]:
    """Prompts and their mask, moved so that each ends in the last column, where new tokens follow.

    Raises:
        ValueError: a prompt of nothing but padding.
    """
    visible = attention_mask != 0
    check_prompts(visible.sum(axis=1).tolist())
    position = np.arange(tokens.shape[1])
    behind = visible[:, ::-1].argmax(axis=1)  # padding behind the last token
    source = (position[None] - behind[:, None]) % tokens.shape[1]
    return np.take_along_axis(tokens, source, 1), np.take_along_axis(visible, source, 1)


@dataclass
class Endings:
    """Which sequences have ended, and why: kept while tokens are generated.

    Attributes:
        eos: the ids that end a sequence.
        pad: the id that stands behind an ended sequence.
        stop_strings: texts that end a sequence.
        decode: the text of tokens; None where nobody asks for it.
        lengths: of each sequence: its new tokens, the one that ended it among them.
        reasons: of each sequence: "eos", "stop_string", or "length" as long as it goes on.
    """

    eos: frozenset[int]
    pad: int
    stop_strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    lengths: list[int]
    reasons: list[str]
    _taken: list[list[int]]

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
        """Of sequences that have just begun; without `pad_token_id` the first eos id pads, or 0.

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
        """Whether a sequence can end before its time, so that tokens must be looked at."""
        return bool(self.eos or self.stop_strings)

    @property
    def are_all(self) -> bool:
        """Whether no sequence goes on."""
        return "length" not in self.reasons

    def count(self) -> None:
        """One new token for each sequence, which cannot end."""
        self.lengths = [length + 1 for length in self.lengths]

    def take(self, tokens: Sequence[int]) -> list[int]:
        """One new token for each sequence: those that have ended take `pad` in its place."""
        return [self._take(row, token) for row, token in enumerate(tokens)]

    def _take(self, row: int, token: int) -> int:
        if self.reasons[row] != "length":
            return self.pad
        self.lengths[row] += 1
        self._taken[row].append(token)
        if token in self.eos:
            self.reasons[row] = "eos"
        elif self.decode is not None:
            text = self.decode(self._taken[row])
            if any(each in text for each in self.stop_strings):
                self.reasons[row] = "stop_string"
        return token
