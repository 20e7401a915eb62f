"""Dense attention: slow, obvious, and the yardstick for every other kernel.

It holds the whole [query, key] matrix, follows SPEC.md §2-§4 line by line, and does not depend
on models. The bias is float32 for inputs of any dtype (float64 for float64 inputs): bfloat16 cannot
count past 256.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_torch.kernels.call import Call, without_autocast
from alibi_torch.kernels.finite import finite_or_zero, is_broken

# Queries times keys below which "auto" takes dense attention. On one AVX-512 core with 8 heads of
# 64 in float32, aten_flash draws level at 192 queries and keys, forward and backward; with 512
# it is 4 and 2 times faster. With 2 heads of 16 the two draw level at 400.
PAYS_BELOW = 256 * 256


def biased_logits(call: Call) -> Float[Tensor, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    query, key = call.query, call.key
    arrays = (finite_or_zero(query), finite_or_zero(key))  # 0 times infinity would reach gradients
    logits = _logits(*arrays, call)
    key_is_broken = is_broken(_shared_heads(key, query.shape[1]))
    logits = logits.masked_fill(is_broken(query)[..., None] | key_is_broken[:, :, None], math.nan)
    return torch.where(_visible_keys(call), logits, -math.inf)


def refuses(call: Call) -> str | None:  # noqa: ARG001
    """Dense attention computes every call."""
    return None


def attention(call: Call) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Softmax of the biased logits over keys, times the values (SPEC.md §4)."""
    visible, value = _visible_keys(call), call.value
    # A query that sees no key gives zeros. It first attends to all keys equally, and its result is
    # set to zero at the end: a softmax of only -inf is NaN, in gradients too.
    no_key = ~visible.any(dim=-1, keepdim=True)
    logits = _logits(call.query, call.key, call)
    hidden = torch.where(no_key, 0.0, -math.inf).to(logits.dtype)
    probabilities = torch.softmax(torch.where(visible, logits, hidden), dim=-1)
    if call.dropout is not None:
        scaled = probabilities / (1 - call.dropout.rate)
        probabilities = torch.where(call.dropout.kept() == 1, scaled, 0.0)
    with without_autocast(value.device):
        value = _shared_heads(value, call.query.shape[1])
        attended = torch.matmul(probabilities.to(value.dtype), value)
    return attended.masked_fill(no_key, 0.0)


def _logits(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    call: Call,
) -> Float[Tensor, "batch heads query_len key_len"]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = _shared_heads(key, query.shape[1])
    with without_autocast(query.device):
        products = torch.matmul(query.to(dtype), key.to(dtype).mT)
    if call.distance == "bfloat16":
        bias = _rounded_bias(call.slopes, key.shape[2], call.attention_mask)
        return call.scale * (products + bias.to(dtype))
    relative = _relative_position(call)
    if call.distance == "absolute":
        relative = -relative.abs()
    bias = call.slopes.to(dtype)[:, None, None] * relative.to(dtype)
    return call.scale * products + bias


def _shared_heads(
    x: Float[Tensor, "batch kv_heads key_len width"], num_heads: int
) -> Float[Tensor, "batch heads key_len width"]:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _rounded_bias(
    slopes: Float[Tensor, " heads"],
    key_len: int,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
) -> Float[Tensor, "#batch heads 1 key_len"]:
    if attention_mask is None:
        position = torch.arange(key_len, device=slopes.device)[None]
    else:
        visible = attention_mask.to(torch.bool).long()
        position = (visible.cumsum(dim=-1) - 1) * visible

    def rounded(x: Tensor) -> Tensor:
        # Products of such numbers are exact in float32, and ONNX has none of bfloat16.
        return x.bfloat16().float()

    slopes, position = rounded(slopes), rounded(position)
    return rounded(slopes[None, :, None] * position[:, None, :])[:, :, None, :]


def _relative_position(call: Call) -> Integer[Tensor, "query_len key_len"]:
    """j - i for every query i and key j."""
    start, device = call.query_start, call.query.device
    query_position = torch.arange(start, start + call.query.shape[2], device=device)
    return torch.arange(call.key.shape[2], device=device)[None, :] - query_position[:, None]


def _visible_keys(call: Call) -> Bool[Tensor, "#batch 1 query_len key_len"]:
    relative, segments = _relative_position(call), call.segment_ids
    seen = relative <= 0 if call.causal else torch.ones_like(relative, dtype=torch.bool)
    visible = seen[None, None]
    if call.attention_mask is not None:
        visible = visible & call.attention_mask.to(torch.bool)[:, None, None, :]
    if segments is not None:
        query_segment = segments[:, call.query_start : call.query_start + relative.shape[0]]
        visible = visible & (query_segment[:, None, :, None] == segments[:, None, None, :])
    return visible
