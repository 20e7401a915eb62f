"""Which keys a query may see, and the result of a query without keys (SPEC.md §4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.biases import query_positions, relative_position

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Integer

    AttentionMask = Integer[np.ndarray, "batch key_len"] | Bool[np.ndarray, "batch key_len"]


def visible_keys(
    query_len: int,
    key_len: int,
    causal: bool,
    attention_mask: AttentionMask | None = None,
    segment_ids: Integer[np.ndarray, "batch key_len"] | None = None,
) -> Bool[np.ndarray, "#batch 1 query_len key_len"]:
    """True where query i may attend to key j: not in the future, not padding, the same segment."""
    visible = np.ones((1, 1, query_len, key_len), dtype=bool)
    if causal:
        visible = visible & (relative_position(query_len, key_len) <= 0)
    if attention_mask is not None:
        visible = visible & (attention_mask != 0)[:, None, None, :]
    if segment_ids is not None:
        query_segment = segment_ids[:, query_positions(query_len, key_len)]
        visible = visible & (query_segment[:, None, :, None] == segment_ids[:, None, None, :])
    return visible


def masked_softmax(
    logits: Float[np.ndarray, "batch heads query_len key_len"],
) -> Float[np.ndarray, "batch heads query_len key_len"]:
    """Softmax over keys; a query that sees no key, whose logits are all -inf, gives zeros."""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - np.where(np.isfinite(largest), largest, 0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total > 0, total, 1)
