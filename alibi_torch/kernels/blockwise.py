"""Tiles of attention in plain torch: any dtype, any device, gradients of the slopes too."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels.call import Call, refuses_bias
from alibi_torch.kernels.dropout import Dropout, drop

# Logits are counted in powers of two: exp2 takes half the time of exp.
UNIT = math.log2(math.e)


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def forward(
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    value: Float[Tensor, "tiles heads width value_dim"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
    dropout: Dropout | None,
    is_ordinary: bool,
) -> tuple[
    Float[Tensor, "tiles heads rows value_dim"],
    Float[Tensor, "tiles heads rows"],
]:
    """softmax(scale · q·k + bias) times v, and the logarithm of what the softmax divides by.

    Bias and logarithm are times `UNIT`. Unless all numbers are ordinary, products with hidden keys
    may be infinite.
    """
    logits = _logits(query, key, bias, scale, is_ordinary)
    largest = logits.amax(dim=-1, keepdim=True)
    probabilities = logits.sub_(largest).exp2_()
    total = probabilities.sum(dim=-1, keepdim=True)
    if dropout is None:
        probabilities *= total.reciprocal()
    else:
        probabilities *= (total * (1 - dropout.rate)).reciprocal()
        drop(probabilities, dropout.kept())
    return probabilities.to(value.dtype) @ value, (total.log2() + largest)[..., 0]


def backward(
    gradient: Float[Tensor, "tiles heads rows value_dim"],
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    value: Float[Tensor, "tiles heads width value_dim"],
    attended: Float[Tensor, "tiles heads rows value_dim"],
    log_total: Float[Tensor, "tiles heads rows"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
    distance: Float[Tensor, "1 1 rows width"] | None,
    dropout: Dropout | None,
    is_ordinary: bool,
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, " heads"] | None]:
    """Gradients of query, key and value, and of the slopes where distances are given."""
    dtype = bias.dtype
    logits = _logits(query, key, bias, scale, is_ordinary)
    probabilities = logits.sub_(log_total[..., None]).exp2_()
    gradient, attended = gradient.to(dtype), attended.to(dtype)
    mean = (gradient * attended).sum(dim=-1, keepdim=True)
    kept = None if dropout is None else dropout.kept()
    if dropout is not None:
        gradient = gradient / (1 - dropout.rate)
    of_logits = gradient @ value.to(dtype).mT
    if kept is not None:
        drop(of_logits, kept)
    of_logits.sub_(mean).mul_(probabilities)
    if not is_ordinary:
        of_logits.masked_fill_(bias == -math.inf, 0.0)
    if kept is not None:
        drop(probabilities, kept)
    value_gradient = probabilities.mT @ gradient
    of_slopes = None
    if distance is not None:
        of_slopes = -(of_logits * distance).sum(dim=(0, 2, 3))
    query_gradient = scale * (of_logits @ key.to(dtype))
    key_gradient = scale * (of_logits.mT @ query.to(dtype))
    return query_gradient, key_gradient, value_gradient, of_slopes


def _logits(
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
    is_ordinary: bool,
) -> Float[Tensor, "tiles heads rows width"]:
    """Biased logits times `UNIT`."""
    shape = (*query.shape[:3], key.shape[2])
    logits = bias.expand(shape).clone(memory_format=torch.contiguous_format)
    query, key = (x.to(bias.dtype).flatten(0, 1) for x in (query, key))
    logits = logits.flatten(0, 1).baddbmm_(query, key.mT, alpha=UNIT * scale).view(shape)
    return logits if is_ordinary else logits.masked_fill_(bias == -math.inf, -math.inf)
