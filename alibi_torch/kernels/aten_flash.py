"""Tiles of attention by ATen's fused CPU kernel, which scaled_dot_product_attention runs on.

Called directly it takes a float32 bias beside narrower inputs, returns the normaliser, and reads
keys and bias through any strides. None of that is public API: on import it is tried whether this
torch does so. The kernel knows no gradient of its bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels import blockwise
from alibi_torch.kernels.call import Call, refuses_bias, refuses_dropout

UNIT = 1.0  # the kernel counts logits in powers of e
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    if call.query.device.type != "cpu":
        return f"it runs on the CPU, and the query is on {call.query.device.type}"
    if call.query.shape[3] != call.value.shape[3]:
        return f"value width {call.value.shape[3]} differs from head_dim {call.query.shape[3]}"
    if call.slopes.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the slopes"
    if not _IS_AVAILABLE:
        return f"torch {torch.__version__} has no fused CPU kernel that works as expected"
    return refuses_dropout(call) or refuses_bias(call)


def forward(
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    value: Float[Tensor, "tiles heads width head_dim"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
    dropout: None,  # noqa: ARG001
    is_ordinary: bool,  # noqa: ARG001
) -> tuple[
    Float[Tensor, "tiles heads rows head_dim"],
    Float[Tensor, "tiles heads rows"],
]:
    """As `blockwise.forward`."""
    op = getattr(torch.ops.aten, _FORWARD)
    bias = bias.expand(*query.shape[:3], key.shape[2])
    return op(query, key, value, 0.0, False, attn_mask=bias, scale=scale)


def backward(
    gradient: Float[Tensor, "tiles heads rows head_dim"],
    query: Float[Tensor, "tiles heads rows head_dim"],
    key: Float[Tensor, "tiles heads width head_dim"],
    value: Float[Tensor, "tiles heads width head_dim"],
    attended: Float[Tensor, "tiles heads rows head_dim"],
    log_total: Float[Tensor, "tiles heads rows"],
    bias: Float[Tensor, "#tiles #heads rows width"],
    scale: float,
    distance: None,  # noqa: ARG001
    dropout: None,  # noqa: ARG001
    is_ordinary: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, None]:
    """As `blockwise.backward`, without the slopes."""
    op = getattr(torch.ops.aten, _BACKWARD)
    bias = bias.expand(*query.shape[:3], key.shape[2])
    inputs = (gradient, query, key, value, attended, log_total)
    return *op(*inputs, 0.0, False, attn_mask=bias, scale=scale), None


def _agrees_with_plain_torch() -> bool:
    """Whether the two operators exist and give the right numbers on overlapping views.

    The first keys are hidden from every query, more of them than the kernel takes at a time.
    """
    if not (hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)):
        return False
    index = torch.arange(4096.0, device="cpu")
    query, key, value = (
        index[start:].sin().as_strided((2, 1, length, 4), (12, 12, 4, 1))
        for start, length in ((0, 3), (5, 900), (9, 900))
    )
    bias = torch.where(index < 700, -torch.inf, -0.01 * index)
    bias = bias.as_strided((1, 1, 3, 900), (0, 0, 1, 1))
    in_its_unit = (bias * blockwise.UNIT, 0.5)
    attended, log_total = blockwise.forward(query, key, value, *in_its_unit, None, True)
    arguments = (query, query, key, value, attended)
    options = (None, None, True)
    exact = blockwise.backward(*arguments, log_total, *in_its_unit, *options)[:3]
    log_total = log_total / blockwise.UNIT
    try:
        found = forward(query, key, value, bias, 0.5, None, True)
        found = (*found, *backward(*arguments, log_total, bias, 0.5, *options)[:3])
    except (RuntimeError, TypeError):  # the arguments are others than we know
        return False
    pairs = zip(found, (attended, log_total, *exact), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


_IS_AVAILABLE = _agrees_with_plain_torch()
