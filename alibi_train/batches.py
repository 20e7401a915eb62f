"""Batches in an order that a seed decides, the same for both backends; a run restarts at any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from alibi_convert.machine import require
from alibi_spec.training import masked_lm_batch, next_token_targets
from alibi_train.documents import Documents

Batch = dict[str, Integer[np.ndarray, "batch length"]]


@dataclass(frozen=True)
class Rows:
    """The tokens of documents, cut into sequences of one length; grain reads them by number.

    A document goes on in the next sequence; what is left at the end is not used. Sequences of
    next-token models overlap in one token, so that every token but the first is predicted once.

    Attributes:
        documents: packed, one after the other.
        length: tokens of a sequence.
        vocab_size: tokens are below it.
        has_next: with the token that follows the last.

    Raises:
        ValueError: not one sequence.
    """

    documents: Documents
    length: int
    vocab_size: int
    has_next: bool

    def __post_init__(self) -> None:
        if len(self) < 1:
            found, needed = len(self.documents.tokens), self.length + self.has_next
            raise ValueError(
                f"the documents have {found} tokens, fewer than a sequence needs: {needed}; give "
                "more text or a smaller data.length"
            )

    def __len__(self) -> int:
        return (len(self.documents.tokens) - self.has_next) // self.length

    def __getitem__(self, index: Any) -> dict[str, Integer[np.ndarray, " length"]]:
        start = int(index) * self.length
        end = start + self.length + self.has_next
        tokens = np.asarray(self.documents.tokens[start:end])
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            outside = start + int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            raise ValueError(
                f"token {self.documents.tokens[outside]}, number {outside} of the data, is not in "
                f"the vocabulary of {self.vocab_size}"
            )
        row = {"tokens": tokens.astype(np.int32)}
        if len(self.documents.ends) > 1:
            position = np.arange(start, end)
            document = np.searchsorted(self.documents.ends, position, side="right")
            row["segment_ids"] = (document - document[0]).astype(np.int32)
        return row


@dataclass(frozen=True)
class Batches:
    """Batches of sequences, shuffled anew in every epoch; without end.

    Attributes:
        rows: of which they are made.
        batch_size: sequences of each.
        seed: of the order, and of the masks.
        mask_token_id: of masked-LM training; None for next-token training.
    """

    rows: Rows
    batch_size: int
    seed: int
    mask_token_id: int | None = None

    def __iter__(self) -> Any:
        """Grain's iterator, whose `get_state()` and `set_state()` hold where it is.

        Raises:
            ValueError: grain is not installed.
        """
        require("grain", "train", "reading data in an order that restarts")
        import grain  # which imports JAX where that is installed

        source: Any = grain.MapDataset.source(self.rows)
        order = source.seed(self.seed % 2**32).shuffle().repeat()
        order = order.batch(self.batch_size, drop_remainder=True)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(order.map_with_index(self._as_batch).to_iter_dataset(options))

    def in_order(self, count: int) -> Iterator[Batch]:
        """The first batches, each sequence once, for validation; the last may be smaller."""
        for number, start in enumerate(range(0, len(self.rows), self.batch_size)):
            if number == count:
                return
            several = range(start, min(start + self.batch_size, len(self.rows)))
            rows = [self.rows[each] for each in several]
            arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            yield self._as_batch(number, arrays)

    def _as_batch(
        self, number: int, arrays: dict[str, Integer[np.ndarray, "batch row_length"]]
    ) -> Batch:
        if self.mask_token_id is not None:
            corrupted = masked_lm_batch(
                arrays["tokens"],
                self.mask_token_id,
                self.rows.vocab_size,
                seed=self.seed,
                first_sequence=number * self.batch_size,
            )
            arrays = arrays | corrupted
        else:
            targets = next_token_targets(arrays["tokens"], arrays.get("segment_ids"))
            every = arrays | {"targets": targets}
            arrays = {name: array[:, :-1] for name, array in every.items()}
        return {name: array.astype(np.int32) for name, array in arrays.items()}
