"""The choice of a next token, as `alibi_spec.sampling` states it, in float32 (SPEC.md §11)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_spec.sampling import Sampling


def chosen_tokens(
    logits: Float[Tensor, "batch vocab"],
    is_there: Bool[Tensor, "batch vocab"] | None,
    uniform: Float[Tensor, " batch"] | None,
    sampling: Sampling,
) -> Integer[Tensor, " batch"]:
    """The likeliest token, or with `do_sample` the one that the uniform draws.

    Args:
        is_there: tokens that the penalty applies to; None without a penalty.
        uniform: None without `do_sample`.
    """
    logits = processed(logits, is_there, sampling)
    return logits.argmax(dim=-1) if uniform is None else _drawn_tokens(logits, uniform)


def processed(
    logits: Float[Tensor, "batch vocab"],
    is_there: Bool[Tensor, "batch vocab"] | None,
    sampling: Sampling,
) -> Float[Tensor, "batch vocab"]:
    """`alibi_spec.sampling.processed`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if is_there is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(is_there, penalised, logits)
    if not sampling.do_sample:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        largest = logits.topk(min(sampling.top_k, logits.shape[1])).values
        logits = _from(logits, largest[:, -1])
    if sampling.top_p is not None and sampling.top_p < 1:  # rounded sums can reach 1 too early
        ranked = logits.sort(dim=-1, descending=True).values
        probabilities = ranked.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = _from(logits, ranked.masked_fill(before >= sampling.top_p, math.inf).amin(dim=-1))
    if sampling.min_p is not None:
        logits = _from(logits, logits.amax(dim=-1) + math.log(sampling.min_p))
    return logits


def _from(
    logits: Float[Tensor, "batch vocab"], least: Float[Tensor, " batch"]
) -> Float[Tensor, "batch vocab"]:
    return logits.masked_fill(logits < least[:, None], -math.inf)


def _drawn_tokens(
    logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]
) -> Integer[Tensor, " batch"]:
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    goal = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    return (cumulative > goal).int().argmax(dim=-1)  # the first of the largest
