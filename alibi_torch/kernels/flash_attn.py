"""The flash-attn package on CUDA, which has ALiBi slopes but neither masks nor windows."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_torch.kernels.call import Call, refuses_bias, refuses_dropout

_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    if call.query.device.type != "cuda":
        return f"it runs on CUDA, and the query is on {call.query.device.type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    if call.query.dtype not in _DTYPES:
        return f"it computes float16 and bfloat16, not {call.query.dtype}"
    if call.attention_mask is not None or call.segment_ids is not None:
        return "it takes neither attention_mask nor segment_ids"
    if call.query.shape[3] > _LARGEST_HEAD or call.query.shape[3] != call.value.shape[3]:
        return f"it needs one width up to {_LARGEST_HEAD} for queries, keys and values"
    if call.slopes.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the slopes"
    return refuses_dropout(call) or refuses_bias(call)


def attention(call: Call) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Attention of one call; flash-attn, too, puts the last query at the last key."""
    package: Any = importlib.import_module("flash_attn")
    attended = package.flash_attn_func(
        *(x.transpose(1, 2) for x in (call.query, call.key, call.value)),
        softmax_scale=call.scale,
        causal=call.causal,
        alibi_slopes=call.slopes.float(),
        deterministic=True,
    )
    return attended.transpose(1, 2)
