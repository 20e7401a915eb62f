"""The passes over tiles in plain torch: any dtype, any device, gradients of the slopes too."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels.call import Call, refuses_bias
from alibi_torch.kernels.dropout import drop
from alibi_torch.kernels.windowed.tiles import Attended, Gradients, Tiles

# Logits are counted in powers of two: exp2 takes half the time of exp.
UNIT = math.log2(math.e)


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def forward(tiles: Tiles) -> Attended:
    """softmax(scale · q·k + bias) times v, and `UNIT` times the logarithm of its denominator."""
    logits = _logits(tiles)
    largest = logits.amax(dim=-1, keepdim=True)
    probabilities = logits.sub_(largest).exp2_()
    total = probabilities.sum(dim=-1, keepdim=True)
    if tiles.dropout is None:
        probabilities *= total.reciprocal()
    else:
        probabilities *= (total * (1 - tiles.dropout.rate)).reciprocal()
        drop(probabilities, tiles.dropout.kept())
    attended = probabilities.to(tiles.value.dtype) @ tiles.value
    return attended, (total.log2() + largest)[..., 0]


def backward(
    tiles: Tiles,
    gradient: Float[Tensor, "tiles heads height value_dim"],
    attended: Float[Tensor, "tiles heads height value_dim"],
    log_total: Float[Tensor, "tiles heads height"],
    distance: Float[Tensor, "1 1 height width"] | None,
) -> Gradients:
    """Gradients of query, key and value, and of the slopes where distances are given."""
    dtype, dropout = tiles.bias.dtype, tiles.dropout
    probabilities = _logits(tiles).sub_(log_total[..., None]).exp2_()
    gradient, attended = gradient.to(dtype), attended.to(dtype)
    # Σ_j p_ij dp_ij, as the product of gradient and result, which takes no pass over the values.
    mean = (gradient * attended).sum(dim=-1, keepdim=True)
    kept = None if dropout is None else dropout.kept()
    if dropout is not None:
        gradient = gradient / (1 - dropout.rate)
    of_logits = gradient @ tiles.value.to(dtype).mT
    if kept is not None:
        drop(of_logits, kept)
    of_logits.sub_(mean).mul_(probabilities)
    if not tiles.is_ordinary:  # 0 times infinity is NaN, and hidden keys have no gradient
        of_logits.masked_fill_(tiles.bias == -math.inf, 0.0)
    if kept is not None:
        drop(probabilities, kept)
    value_gradient = probabilities.mT @ gradient
    of_slopes = None
    if distance is not None:
        of_slopes = -(of_logits * distance).sum(dim=(0, 2, 3))
    query_gradient = tiles.scale * (of_logits @ tiles.key.to(dtype))
    key_gradient = tiles.scale * (of_logits.mT @ tiles.query.to(dtype))
    return query_gradient, key_gradient, value_gradient, of_slopes


def _logits(tiles: Tiles) -> Float[Tensor, "tiles heads height width"]:
    """Biased logits times `UNIT`."""
    bias, shape = tiles.bias, (*tiles.query.shape[:3], tiles.key.shape[2])
    logits = bias.expand(shape).clone(memory_format=torch.contiguous_format)
    query, key = (x.to(bias.dtype).flatten(0, 1) for x in (tiles.query, tiles.key))
    logits = logits.flatten(0, 1).baddbmm_(query, key.mT, alpha=UNIT * tiles.scale).view(shape)
    return logits if tiles.is_ordinary else logits.masked_fill_(bias == -math.inf, -math.inf)
