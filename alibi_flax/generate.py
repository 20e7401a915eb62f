"""Greedy continuation of a prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from alibi_flax.model import ALiBiLM, checked_tokens
from alibi_spec.bias import interpolation
from alibi_spec.checks import check_generation, require_vocabulary


def generate(
    model: ALiBiLM,
    params: dict[str, Any],
    prompt: Integer[Array, "batch prompt_len"],
    max_new_tokens: int,
) -> Integer[Array, "batch total_len"]:
    """The prompt followed by the likeliest next token, `max_new_tokens` times.

    Every step reads the whole sequence again: this is the plain definition, not the fast one. The
    sequence may outgrow `max_len`.

    Raises:
        ValueError: the model is an encoder, or the prompt or `max_new_tokens` is not valid.
    """
    check_generation(model.config.causal, model.config.head, max_new_tokens)
    tokens = checked_tokens(prompt, require_vocabulary(model.config.vocab_size))
    return _generate(model, params, jnp.asarray(tokens), max_new_tokens)


@partial(jax.jit, static_argnums=(0, 3))
def _generate(
    model: ALiBiLM,
    params: dict[str, Any],
    prompt: Integer[Array, "batch prompt_len"],
    max_new_tokens: int,
) -> Integer[Array, "batch total_len"]:
    # One compilation for all steps: the buffer has its final length from the start, and a causal
    # model never looks at what is still empty. Its slopes are those of the keys that are there.
    prompt_len = prompt.shape[1]
    tokens = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
    steps = range(max(max_new_tokens, 1))  # an index into nothing would be refused when traced
    factors = [interpolation(model.config, prompt_len + step) for step in steps]

    def next_logits(
        model: ALiBiLM, tokens: Array, position: Integer[Array, ""]
    ) -> Float[Array, "batch vocab"]:
        factor = jnp.asarray(factors, float)[position - prompt_len]
        hidden = model.transformer.hidden_states(model.embed(tokens), factor)
        return model.head(hidden[:, position - 1, None])[:, 0]

    def step(position: Integer[Array, ""], tokens: Array) -> Array:
        logits: Any = model.apply({"params": params}, tokens, position, method=next_logits)
        return tokens.at[:, position].set(logits.argmax(axis=-1).astype(tokens.dtype))

    return jax.lax.fori_loop(prompt_len, prompt_len + max_new_tokens, step, tokens)
