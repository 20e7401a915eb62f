"""FlexAttention on CUDA: the bias as a score modification, the windows as its block mask.

Written against torch's public API; not measured on a GPU yet. Its block mask lists the blocks of
keys for every block of queries, (N / 128)² small integers per head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from alibi_spec.certificate import BLOCK_SIZE
from alibi_torch.kernels.call import Call, refuses_bias, refuses_dropout
from alibi_torch.kernels.certificate import attention_plan


def refuses(call: Call) -> str | None:
    """Why a call cannot be computed here; None if it can."""
    if call.query.device.type != "cuda":
        return (
            f"FlexAttention has gradients only on CUDA, and the query is on "
            f"{call.query.device.type}"
        )
    if call.query.dtype == torch.float64:
        return "FlexAttention has no float64"
    if call.slopes.requires_grad and torch.is_grad_enabled():
        return "its gradient of the slopes is a sum in no fixed order"
    return refuses_dropout(call) or refuses_bias(call)


def attention(call: Call) -> Float[Tensor, "batch heads query_len value_dim"]:
    """Attention of one call, in one fused kernel."""
    is_compiling = torch.compiler.is_compiling()
    attend = flex_attention if is_compiling else _compiled()
    return attend(
        *(call.query, call.key, call.value),
        score_mod=bias_of(call),
        block_mask=block_mask_of(call),
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )


def bias_of(call: Call) -> Callable[..., Tensor]:
    """score, indices -> score - m |i - j|, in float32."""
    query_start, slopes = call.query_start, call.slopes.float()

    def bias(
        score: Tensor,
        batch: Tensor,  # noqa: ARG001
        head: Tensor,
        query: Tensor,
        key: Tensor,
    ) -> Tensor:
        return score - slopes[head] * (query + query_start - key).abs()

    return bias


def block_mask_of(call: Call) -> BlockMask:
    """The certified windows, and which keys of their blocks a query sees (SPEC.md §4, §9)."""
    with torch.no_grad():
        plan = attention_plan(call, BLOCK_SIZE)
    query_len, key_len = call.query.shape[2], call.key.shape[2]
    # Every query of a block sees all keys of the blocks before `whole`: these need no mask.
    whole = torch.full_like(plan.first[0, 0], key_len // BLOCK_SIZE)
    if call.causal:
        position = torch.arange(0, query_len, BLOCK_SIZE, device=whole.device)
        whole = torch.minimum(whole, (position + call.query_start + 1) // BLOCK_SIZE)
    if call.attention_mask is not None or call.segment_ids is not None:
        whole = torch.zeros_like(whole)
    blocks = -(-key_len // BLOCK_SIZE)
    whole = torch.minimum(torch.maximum(whole, plan.first), plan.last)
    return BlockMask.from_kv_blocks(
        *_listed(whole, plan.last, blocks),
        *_listed(plan.first, whole, blocks),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=_visible(call),
        seq_lengths=(query_len, key_len),
    )


def _listed(
    first: Integer[Tensor, "batch heads query_blocks"],
    last: Integer[Tensor, "batch heads query_blocks"],
    blocks: int,
) -> tuple[
    Integer[Tensor, "batch heads query_blocks"],
    Integer[Tensor, "batch heads query_blocks key_blocks"],
]:
    """How many blocks a range has, and a list that begins with them."""
    index = first[..., None] + torch.arange(blocks, device=first.device)
    return (last - first).int(), (index % blocks).int().contiguous()


def _visible(call: Call) -> Callable[..., Tensor]:
    query_start, causal = call.query_start, call.causal
    shown = None if call.attention_mask is None else call.attention_mask.to(torch.bool)
    segments = call.segment_ids

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        sees = key <= query + query_start if causal else key >= 0
        if shown is not None:
            sees = sees & shown[batch, key]
        if segments is not None:
            sees = sees & (segments[batch, query + query_start] == segments[batch, key])
        return sees

    return visible


@cache
def _compiled() -> Callable[..., Tensor]:
    # Not for fixed lengths: torch would compute the ninth of them unfused, with all N² scores.
    return torch.compile(flex_attention)
