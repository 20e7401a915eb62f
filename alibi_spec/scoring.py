"""How a long text is cut to be scored, and what its score is (SPEC.md §13)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Window(NamedTuple):
    """A stretch that is read at once.

    Attributes:
        start, end: the tokens that are read; those after each of them are predicted.
        first: the first token whose prediction counts; the last is the one at `end`.
    """

    start: int
    end: int
    first: int


def score_windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows in which every token but the first is predicted, and counts, once.

    With a stride of `length` they do not overlap (Press et al. 2021, "nonoverlapping"). With a
    shorter one every token, but for those of the first window, sees at least `length - stride`
    tokens before it ("sliding window").

    Raises:
        ValueError: fewer than two tokens, or a stride outside of 1 … length.
    """
    if num_tokens < 2:
        raise ValueError(f"a text of {num_tokens} tokens has none to predict; expected at least 2")
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} is not valid; expected 1 … length={length}")
    last, first, end = num_tokens - 1, 1, 0
    while end < last:
        end = min(length if end == 0 else end + stride, last)
        yield Window(max(0, end - length), end, first)
        first = end + 1


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
        tokens: that were predicted.
        text_bytes: of the whole text.
        negative_log_likelihood: of all these tokens together, in nats.
    """

    tokens: int
    text_bytes: int
    negative_log_likelihood: float

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood of a token."""
        mean = self.negative_log_likelihood / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The negative log-likelihood in bits, over the bytes of the text."""
        return self.negative_log_likelihood / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the fields."""
        follows = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | follows
