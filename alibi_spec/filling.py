"""Which tokens a masked language model finds likely in masked places (SPEC.md §15)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.reference import log_softmax

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Integer


def masked_positions(
    tokens: Integer[np.ndarray, "batch seq"],
    mask_token_id: int,
    attention_mask: Integer[np.ndarray, "batch seq"] | Bool[np.ndarray, "batch seq"] | None = None,
) -> Int[np.ndarray, "masks 2"]:
    """The sequence and the place of every mask that is not padding, in reading order.

    Raises:
        ValueError: there is none.
    """
    masked = tokens == mask_token_id
    if attention_mask is not None:
        masked = masked & (attention_mask != 0)
    if not masked.any():
        raise ValueError(
            f"tokens hold no mask (token {mask_token_id}); put it where a token is to be found"
        )
    return np.argwhere(masked)


def likeliest(
    logits: Float[np.ndarray, "masks vocab"], top_k: int
) -> tuple[Int[np.ndarray, "masks top_k"], Float64[np.ndarray, "masks top_k"]]:
    """The tokens with the largest logits, of equal ones the lower id first; their probabilities."""
    logits = logits.astype(np.float64)
    tokens = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return tokens, np.exp(np.take_along_axis(log_softmax(logits), tokens, axis=1))
