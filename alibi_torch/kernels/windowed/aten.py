"""The passes over tiles by ATen's fused CPU kernel, which scaled_dot_product_attention runs on.

Called directly it takes a float32 bias with narrower inputs, returns the normaliser, and reads keys
and bias through any strides. None of that is public API, so the first call tests whether this torch
does it. The kernel has no gradient of its bias.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels.call import Call, refuses_bias, refuses_dropout
from alibi_torch.kernels.windowed import plain
from alibi_torch.kernels.windowed.tiles import Attended, Gradients, Tiles

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
    if not _is_available():
        return f"torch {torch.__version__} has no fused CPU kernel that works as expected"
    return refuses_dropout(call) or refuses_bias(call)


def forward(tiles: Tiles) -> Attended:
    """As `plain.forward`."""
    arrays = (tiles.query, tiles.key, tiles.value)
    op = getattr(torch.ops.aten, _FORWARD)
    return op(*arrays, 0.0, False, attn_mask=_mask(tiles), scale=tiles.scale)


def backward(
    tiles: Tiles,
    gradient: Float[Tensor, "tiles heads height head_dim"],
    attended: Float[Tensor, "tiles heads height head_dim"],
    log_total: Float[Tensor, "tiles heads height"],
    distance: Tensor | None,  # noqa: ARG001
) -> Gradients:
    """As `plain.backward`, without the slopes."""
    arrays = (gradient, tiles.query, tiles.key, tiles.value, attended, log_total)
    op = getattr(torch.ops.aten, _BACKWARD)
    return *op(*arrays, 0.0, False, attn_mask=_mask(tiles), scale=tiles.scale), None


def _mask(tiles: Tiles) -> Float[Tensor, "tiles heads height width"]:
    return tiles.bias.expand(*tiles.query.shape[:3], tiles.key.shape[2])


def _is_available() -> bool:
    return _tried()


# Same as torch.compiler.assume_constant_result, which would import the whole compiler.
vars(_is_available)["_dynamo_marked_constant"] = True


@cache
def _tried() -> bool:
    """In its own thread, outside the caller's modes: in torch.export's, tensors have no values."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(_agrees_with_plain_torch()))
    thread.start()
    thread.join()
    return found == [True]


def _agrees_with_plain_torch() -> bool:
    """Whether the two operators exist and give the right numbers on overlapping views.

    The first keys are hidden from every query, more of them than the kernel takes at a time.
    """
    if not (hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)):
        return False
    index = torch.arange(4096.0, dtype=torch.float32, device="cpu")
    query, key, value = (
        index[start:].sin().as_strided((2, 1, length, 4), (12, 12, 4, 1))
        for start, length in ((0, 3), (5, 900), (9, 900))
    )
    bias = torch.where(index < 700, -torch.inf, -0.01 * index)
    bias = bias.as_strided((1, 1, 3, 900), (0, 0, 1, 1))
    tiles = Tiles(query, key, value, bias, 0.5, dropout=None, is_ordinary=True)
    in_powers_of_two = replace(tiles, bias=bias * plain.UNIT)
    attended, log_total = plain.forward(in_powers_of_two)
    exact = plain.backward(in_powers_of_two, query, attended, log_total, None)[:3]
    log_total = log_total / plain.UNIT
    try:
        found = forward(tiles)
        found = (*found, *backward(tiles, query, attended, log_total, None)[:3])
    except (RuntimeError, TypeError):  # its arguments have changed
        return False
    pairs = zip(found, (attended, log_total, *exact), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)
