"""What models read to be compared: random tokens or embeddings, and padding on either side."""

from __future__ import annotations

import numpy as np

from alibi_convert.tensors import DTYPES, Tensors
from alibi_convert.values import cast_tensor
from alibi_spec import ALiBiConfig, parameter_table


def random_inputs(
    config: ALiBiConfig, batch: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Tokens [batch, length], or embeddings [batch, length, d_model] without a vocabulary."""
    if config.vocab_size is None:
        return rng.standard_normal((batch, length, config.d_model))
    return rng.integers(0, config.vocab_size, (batch, length))


def padding_of(batch: int, length: int) -> np.ndarray:
    """A mask that pads the first of several sequences on the left and the last on the right."""
    attention_mask = np.ones((batch, length), dtype=np.int64)
    if batch > 1:
        attention_mask[0, : length // 5] = 0
        attention_mask[-1, length - length // 4 :] = 0
    return attention_mask


def narrowed(config: ALiBiConfig, tensors: Tensors, dtype: str) -> Tensors:
    """Parameters as a model in `dtype` holds them, rounded when they are looked up."""
    wide = {row.name for row in parameter_table(config) if row.is_wide}
    return Tensors(
        {
            name: header if name in wide else cast_tensor(header, DTYPES[dtype])
            for name, header in tensors.headers.items()
        }
    )
