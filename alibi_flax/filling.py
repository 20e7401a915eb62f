"""Which tokens a masked language model finds likely in masked places (SPEC.md §15)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Integer

from alibi_flax.model import ALiBiLM, AttentionMask, checked_tokens
from alibi_spec.cache import bucket
from alibi_spec.checks import check_filling, require_vocabulary
from alibi_spec.filling import masked_positions


@dataclass(frozen=True)
class Filled:
    """The result of `fill_masks`: a row for each mask, in reading order.

    Attributes:
        positions: the sequence and the place of each mask.
        tokens: the likeliest first; of equally likely ones the lower id first.
        probabilities: of these tokens: float32 (float64).
    """

    positions: Int[Array, "masks 2"]
    tokens: Int[Array, "masks top_k"]
    probabilities: Float[Array, "masks top_k"]


def fill_masks(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    mask_token_id: int,
    *,
    attention_mask: AttentionMask | None = None,
    top_k: int = 5,
) -> Filled:
    """The likeliest tokens of every masked place, each place by itself.

    Logits are held for the masked places alone. One compiled program serves tokens of one shape,
    however many masks they hold, and another all numbers of masks in a bucket.

    Args:
        tokens: with `mask_token_id` where a token is to be found.
        attention_mask: 0 for padding on either side, 1 elsewhere; a mask in padding is passed over.
        top_k: how many tokens of each place.

    Raises:
        ValueError: as for the model's own call; a decoder, a model without a head, no mask, or
            `mask_token_id` or `top_k` outside the vocabulary.
    """
    config = model.config
    vocab_size = require_vocabulary(config.vocab_size)
    check_filling(config.causal, config.head, vocab_size, mask_token_id, top_k)
    tokens = checked_tokens(tokens, vocab_size)
    hidden = _hidden_states(model, params, tokens, attention_mask)
    visible = None if attention_mask is None else np.asarray(attention_mask)
    positions = masked_positions(np.asarray(tokens), mask_token_id, visible)
    masks = len(positions)
    padded = np.pad(positions, ((0, bucket(masks) - masks), (0, 0)))
    found, probabilities = _likeliest(model, params, hidden, padded, top_k)
    return Filled(jnp.asarray(positions), found[:masks], probabilities[:masks])


@partial(jax.jit, static_argnums=0)
def _hidden_states(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    attention_mask: AttentionMask | None,
) -> Float[Array, "batch seq embed"]:
    def hidden_states(model: ALiBiLM) -> Float[Array, "batch seq embed"]:
        return model.transformer(model.embed(tokens), attention_mask)

    call: Any = partial(model.apply, {"params": params}, method=hidden_states)
    return call()


@partial(jax.jit, static_argnums=(0, 4))
def _likeliest(
    model: ALiBiLM,
    params: dict[str, Any],
    hidden: Float[Array, "batch seq embed"],
    positions: Int[Array, "masks 2"],
    top_k: int,
) -> tuple[Int[Array, "masks top_k"], Float[Array, "masks top_k"]]:
    masked = hidden[positions[:, 0], positions[:, 1]]
    call: Any = partial(model.apply, {"params": params}, method=ALiBiLM.head)
    logits = call(masked[None])[0]
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    tokens = jnp.argsort(wide, axis=1, descending=True, stable=True)[:, :top_k]
    return tokens, jnp.take_along_axis(jax.nn.softmax(wide, axis=1), tokens, axis=1)
