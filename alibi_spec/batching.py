"""Sequences of any lengths in batches whose padding changes nothing (SPEC.md §14)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int

    _Batch = Int[np.ndarray, " batch"]


def batches_by_length(
    sequences: Sequence[Sequence[int]], batch_size: int, slope_interpolation: int | None
) -> Iterator[tuple[_Batch, Int[np.ndarray, "batch seq"], _Batch]]:
    """Sequences of like length together: their places, tokens padded on the right, and lengths.

    Padding counts as keys where slopes are interpolated (SPEC.md §2.1): sequences longer than that
    limit share a batch only with those of equal length.

    Args:
        slope_interpolation: of the model's configuration.

    Raises:
        ValueError: a sequence without tokens.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    if not lengths.all():
        raise ValueError(
            f"sequence {int((lengths == 0).argmax())} has no tokens; expected at least one"
        )
    # The longest first: too little memory shows at once.
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        places, longest = order[:batch_size], int(lengths[order[0]])
        if slope_interpolation is not None and longest > slope_interpolation:
            places = places[lengths[places] == longest]
        tokens = np.zeros((len(places), longest), np.int64)
        for row, place in enumerate(places):
            tokens[row, : lengths[place]] = sequences[place]
        yield places, tokens, lengths[places]
        order = order[len(places) :]
