"""One vector for a sequence, from the hidden states of its positions (SPEC.md §14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.checks import check_count

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

POOLINGS = ("mean", "cls", "last")


def check_pooling(pooling: str, batch_size: int) -> None:
    """Raise ValueError unless the options of `encode` are known."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not known; expected one of {POOLINGS}")
    check_count("batch_size", batch_size)


def pooled(
    hidden: Float[np.ndarray, "batch seq embed"],
    visible: Bool[np.ndarray, "batch seq"],
    pooling: str = "mean",
    normalize: bool = True,
) -> Float64[np.ndarray, "batch embed"]:
    """The mean over visible positions, or the first ("cls") or last one; of length 1 if asked."""
    weights = visible.astype(np.float64)
    if pooling != "mean":
        order = visible if pooling == "cls" else visible[:, ::-1]
        place = order.argmax(axis=1)
        place = place if pooling == "cls" else visible.shape[1] - 1 - place
        weights = (np.arange(visible.shape[1]) == place[:, None]).astype(np.float64)
    vectors = np.einsum("bn,bnd->bd", weights, hidden.astype(np.float64))
    vectors = vectors / weights.sum(axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors
