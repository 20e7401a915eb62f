"""One query for each sequence, against the keys of a cache: the step of generation.

Its cost is reading the keys and values once. On the CPU a fused kernel does that; elsewhere, and
for what it cannot compute, dense attention, which is linear for one query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels import dense
from alibi_torch.kernels.call import Call, refuses_bias, without_autocast

_FUSED = (torch.float32, torch.float64, torch.bfloat16)


def attention(call: Call, slot: int) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attention of the query that stands at the key in this slot.

    The keys may lie in a ring: those after the slot are then older than all before it.
    """
    query, key, value = call.query, call.key, call.value
    key_len = key.shape[2]
    is_fused = query.device.type == "cpu" and query.dtype in _FUSED and refuses_bias(call) is None
    if not is_fused:
        return dense.attention(_in_order(call, slot))
    (batch, heads, _, head_dim), kv_heads = query.shape, key.shape[1]
    # The heads that share keys are queries of one head: they read the keys together.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    dtype = torch.promote_types(query.dtype, torch.float32)
    distance = torch.arange(1 - key_len, 1, dtype=dtype, device=query.device)
    if slot + 1 < key_len:
        distance = distance.roll(slot + 1)
    bias = (call.slopes.to(dtype)[:, None] * distance).view(1, *grouped.shape[1:3], key_len)
    if call.attention_mask is not None:
        hidden = ~call.attention_mask.to(torch.bool)[:, None, None]
        # A query that sees no key gives zeros, here too: the kernel promises that for -inf.
        bias = bias.masked_fill(hidden, -torch.inf)
    options: Any = {"attn_mask": bias, "scale": call.scale}
    with without_autocast(query.device):
        attended = F.scaled_dot_product_attention(grouped, key, value, **options)
    return attended.reshape(batch, heads, 1, value.shape[3])


def _in_order(call: Call, slot: int) -> Call:
    """The same call with the oldest key first."""
    after = call.key.shape[2] - 1 - slot
    if after == 0:
        return call
    mask = call.attention_mask
    return replace(
        call,
        key=call.key.roll(after, dims=2),
        value=call.value.roll(after, dims=2),
        attention_mask=None if mask is None else mask.roll(after, dims=1),
    )
