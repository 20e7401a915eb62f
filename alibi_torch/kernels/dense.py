"""Dense attention: slow, obvious, and the yardstick for every other kernel.

It holds the whole [query, key] matrix, follows SPEC.md §2-§4 line by line, and knows nothing of
models. The bias stays in float32 (float64 for float64 inputs) whatever the inputs are: bfloat16
cannot count past 256.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_torch.kernels.call import Call
from alibi_torch.kernels.finite import finite_or_zero, is_broken

# Queries times keys below which "auto" takes dense attention. On one AVX-512 core with 8 heads of
# 64 in float32, aten_flash draws level at 192 queries and keys, forward and backward; with 512
# it is 4 and 2 times faster. With 2 heads of 16 the two draw level at 400.
PAYS_BELOW = 256 * 256


def biased_logits(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    causal: bool,
    scale: float,
    query_start: int,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
    distance: str,
) -> Float[Tensor, "batch heads query_len key_len"]:
    """scale · q·k + bias, -inf where a query may not see a key (SPEC.md §3)."""
    relative = _relative_position(query, key, query_start)
    visible = _visible_keys(relative, causal, query_start, attention_mask, segment_ids)
    arrays = (finite_or_zero(query), finite_or_zero(key))  # 0 times infinity would reach gradients
    logits = _logits(*arrays, slopes, scale, relative, attention_mask, distance)
    key_is_broken = is_broken(_shared_heads(key, query.shape[1]))
    logits = logits.masked_fill(is_broken(query)[..., None] | key_is_broken[:, :, None], math.nan)
    return torch.where(visible, logits, -math.inf)


def refuses(call: Call) -> str | None:  # noqa: ARG001
    """Dense attention computes every call."""
    return None


def attention(call: Call) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Softmax of the biased logits over keys, times the values (SPEC.md §4)."""
    query, key, attention_mask, value = call.query, call.key, call.attention_mask, call.value
    relative = _relative_position(query, key, call.query_start)
    visible = _visible_keys(
        relative, call.causal, call.query_start, attention_mask, call.segment_ids
    )
    # A query that sees no key gives zeros. It attends to all keys alike at first and is cleared at
    # the end, because the softmax of nothing but -inf is NaN, in gradients too.
    no_key = ~visible.any(dim=-1, keepdim=True)
    logits = _logits(query, key, call.slopes, call.scale, relative, attention_mask, call.distance)
    hidden = torch.where(no_key, 0.0, -math.inf).to(logits.dtype)
    probabilities = torch.softmax(torch.where(visible, logits, hidden), dim=-1)
    if call.dropout is not None:
        scaled = probabilities / (1 - call.dropout.rate)
        probabilities = torch.where(call.dropout.kept() == 1, scaled, 0.0)
    with _without_autocast(query.device):
        value = _shared_heads(value, query.shape[1])
        attended = torch.matmul(probabilities.to(value.dtype), value)
    return attended.masked_fill(no_key, 0.0)


def _logits(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    slopes: Float[Tensor, " heads"],
    scale: float,
    relative: Integer[Tensor, "query_len key_len"],
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    distance: str,
) -> Float[Tensor, "batch heads query_len key_len"]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = _shared_heads(key, query.shape[1])
    with _without_autocast(query.device):
        products = torch.matmul(query.to(dtype), key.to(dtype).mT)
    if distance == "bfloat16":
        return scale * (products + _rounded_bias(slopes, key.shape[2], attention_mask).to(dtype))
    return scale * products + _bias(slopes.to(dtype), relative, distance)[None]


def _shared_heads(
    x: Float[Tensor, "batch kv_heads key_len width"], num_heads: int
) -> Float[Tensor, "batch heads key_len width"]:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _bias(
    slopes: Float[Tensor, " heads"],
    relative: Integer[Tensor, "query_len key_len"],
    distance: str,
) -> Float[Tensor, "heads query_len key_len"]:
    if distance == "absolute":
        relative = -relative.abs()
    return slopes[:, None, None] * relative.to(slopes.dtype)[None]


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
    rounded = slopes.bfloat16()[None, :, None] * position.bfloat16()[:, None, :]
    return rounded[:, :, None, :]


def _relative_position(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    query_start: int,
) -> Integer[Tensor, "query_len key_len"]:
    """j - i for every query i and key j."""
    device = query.device
    position = torch.arange(query_start, query_start + query.shape[2], device=device)
    return torch.arange(key.shape[2], device=device)[None, :] - position[:, None]


def _visible_keys(
    relative: Integer[Tensor, "query_len key_len"],
    causal: bool,
    query_start: int,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
) -> Bool[Tensor, "#batch 1 query_len key_len"]:
    seen = relative <= 0 if causal else torch.ones_like(relative, dtype=torch.bool)
    visible = seen[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.to(torch.bool)[:, None, None, :]
    if segment_ids is not None:
        query_segment = segment_ids[:, query_start : query_start + relative.shape[0]]
        visible = visible & (query_segment[:, None, :, None] == segment_ids[:, None, None, :])
    return visible


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # Autocast would narrow the products of float32 inputs. Meta tensors know no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
