"""How likely a model finds the tokens of a text (SPEC.md §13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from alibi_flax.model import ALiBiLM, AttentionMask, checked_tokens
from alibi_spec.checks import check_scoring, require_vocabulary

CHUNK = 256  # positions whose logits are in memory at once


def token_log_probabilities(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    attention_mask: AttentionMask | None = None,
) -> Float[Array, "batch targets"]:
    """log p of every token but the first, given those before it: float32 (float64).

    The last token is not read. Logits are never held for more than a few positions at a time.

    Raises:
        ValueError: as for the model's own call; an encoder, or fewer than two tokens.
    """
    check_scoring(model.config.causal, model.config.head, tokens.shape)
    tokens = checked_tokens(tokens, require_vocabulary(model.config.vocab_size))
    return _scored(model, params, jnp.asarray(tokens), attention_mask)


@partial(jax.jit, static_argnums=0)
def _scored(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    attention_mask: AttentionMask | None,
) -> Float[Array, "batch targets"]:
    def scored(model: ALiBiLM) -> Float[Array, "batch targets"]:
        mask = None if attention_mask is None else attention_mask[:, :-1]
        hidden = model.transformer(model.embed(tokens[:, :-1]), mask)
        found = []
        for start in range(0, tokens.shape[1] - 1, CHUNK):
            targets = tokens[:, start + 1 : start + 1 + CHUNK]
            logits = model.head(hidden[:, start : start + targets.shape[1]])
            wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            every = jax.nn.log_softmax(wide, axis=-1)
            found.append(jnp.take_along_axis(every, targets[..., None], axis=2)[..., 0])
        return jnp.concatenate(found, axis=1)

    call: Any = partial(model.apply, {"params": params}, method=scored)
    return call()
