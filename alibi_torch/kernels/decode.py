"""One query for each sequence, against all keys of a cache: the step of generation.

Its cost is reading the keys and values once. On the CPU a fused kernel does that; elsewhere, and
for what it cannot compute, dense attention, which is linear for one query.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels import dense
from alibi_torch.kernels.call import Call, refuses_bias, without_autocast

_FUSED = (torch.float32, torch.float64, torch.bfloat16)


def attention(call: Call) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attention of the query that stands at the last key."""
    query, key, value = call.query, call.key, call.value
    is_fused = query.device.type == "cpu" and query.dtype in _FUSED and refuses_bias(call) is None
    if not is_fused:
        return dense.attention(call)
    (batch, heads, _, head_dim), (kv_heads, key_len) = query.shape, key.shape[1:3]
    # The heads that share keys are queries of one head: they read the keys together.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    dtype = torch.promote_types(query.dtype, torch.float32)
    distance = torch.arange(1 - key_len, 1, dtype=dtype, device=query.device)
    bias = (call.slopes.to(dtype)[:, None] * distance).view(1, *grouped.shape[1:3], key_len)
    if call.attention_mask is not None:
        hidden = ~call.attention_mask.to(torch.bool)[:, None, None]
        # A query that sees no key gives zeros, here too: the kernel promises that for -inf.
        bias = bias.masked_fill(hidden, -torch.inf)
    options: Any = {"attn_mask": bias, "scale": call.scale}
    with without_autocast(query.device):
        attended = F.scaled_dot_product_attention(grouped, key, value, **options)
    return attended.reshape(batch, heads, 1, value.shape[3])
