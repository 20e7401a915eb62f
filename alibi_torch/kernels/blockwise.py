"""Tiles of attention in plain torch: any dtype, any device, gradients of the slopes too."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels.call import Call, refuses_bias


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    return refuses_bias(call)


def forward(
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    value: Float[Tensor, "tiles heads width value_dim"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
) -> tuple[
    Float[Tensor, "tiles heads rows value_dim"],
    Float[Tensor, "tiles heads rows"],
]:
    """softmax(scale · q·k + bias) times v, and the logarithm of what the softmax divides by."""
    logits = _logits(query, key, bias, scale)
    log_total = logits.logsumexp(dim=-1)
    probabilities = logits.sub_(log_total[..., None]).exp_()
    return probabilities.to(value.dtype) @ value, log_total


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
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, " heads"] | None]:
    """Gradients of query, key and value, and of the slopes where distances are given."""
    dtype = bias.dtype
    probabilities = _logits(query, key, bias, scale).sub_(log_total[..., None]).exp_()
    gradient, attended = gradient.to(dtype), attended.to(dtype)
    value_gradient = probabilities.mT @ gradient
    of_logits = gradient @ value.to(dtype).mT
    of_logits -= (gradient * attended).sum(dim=-1, keepdim=True)
    of_logits *= probabilities
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
) -> Float[Tensor, "tiles heads rows width"]:
    products = query.to(bias.dtype) @ key.to(bias.dtype).mT
    return products.mul_(scale).add_(bias)
