"""The choice of a next token, as `alibi_spec.sampling` states it, in float32 (SPEC.md §11)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from alibi_spec.sampling import Sampling


def chosen_tokens(
    logits: Float[Array, "batch vocab"],
    is_there: Bool[Array, "batch vocab"] | None,
    uniform: Float[Array, " batch"] | None,
    sampling: Sampling,
) -> Integer[Array, " batch"]:
    """The likeliest token, or with `do_sample` the one that the uniform draws.

    Args:
        is_there: tokens that the penalty applies to; None without a penalty.
        uniform: None without `do_sample`.
    """
    logits = processed(logits, is_there, sampling)
    return logits.argmax(axis=-1) if uniform is None else _drawn_tokens(logits, uniform)


def processed(
    logits: Float[Array, "batch vocab"],
    is_there: Bool[Array, "batch vocab"] | None,
    sampling: Sampling,
) -> Float[Array, "batch vocab"]:
    """`alibi_spec.sampling.processed`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if is_there is not None:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(is_there, penalised, logits)
    if not sampling.do_sample:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        largest, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[1]))
        logits = _from(logits, largest[:, -1])
    if sampling.top_p is not None and sampling.top_p < 1:  # rounded sums can reach 1 too early
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = probabilities.cumsum(axis=-1) - probabilities
        logits = _from(logits, jnp.where(before >= sampling.top_p, math.inf, ranked).min(axis=-1))
    if sampling.min_p is not None:
        logits = _from(logits, logits.max(axis=-1) + math.log(sampling.min_p))
    return logits


def _from(
    logits: Float[Array, "batch vocab"], least: Float[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    return jnp.where(logits < least[:, None], -math.inf, logits)


def _drawn_tokens(
    logits: Float[Array, "batch vocab"], uniform: Float[Array, " batch"]
) -> Integer[Array, " batch"]:
    cumulative = jax.nn.softmax(logits, axis=-1).cumsum(axis=-1)
    goal = uniform.astype(cumulative.dtype)[:, None] * cumulative[:, -1:]
    return (cumulative > goal).argmax(axis=-1)  # the first of the largest
