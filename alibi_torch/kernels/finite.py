"""Numbers that are not finite: what a query may not see cannot change its result (SPEC.md §4.2).

0 times such a number is NaN, in results and in all gradients. So they become 0 before anything is
computed, and the queries that see one become NaN after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from alibi_torch.kernels.call import Call


def guarded(
    attend: Callable[[Call], Float[Tensor, "batch heads query_len value_dim"]],
) -> Callable[[Call], Float[Tensor, "batch heads query_len value_dim"]]:
    """A kernel that multiplies hidden values by 0, made correct for numbers that are not finite."""

    def attention(call: Call) -> Float[Tensor, "batch heads query_len value_dim"]:
        arrays = (call.query, call.key, call.value)
        if has_values_on_host(*arrays) and are_ordinary(*arrays):
            return attend(call)
        return attend(cleaned(call)).masked_fill(broken_queries(call), math.nan)

    return attention


def are_ordinary(*arrays: Tensor) -> bool:
    """Whether the values are so small that no product or sum of them overflows."""
    dtype = torch.promote_types(arrays[0].dtype, torch.float32)
    limit = 2.0**400 if dtype == torch.float64 else 2.0**50
    norms = (float(torch.linalg.vector_norm(x.detach(), dtype=dtype)) for x in arrays)
    return all(norm < limit for norm in norms)


def has_values_on_host(*arrays: Tensor) -> bool:
    """Whether the values of all can be read without waiting for a device."""
    if torch.compiler.is_compiling():
        return False
    for x in arrays:
        is_plain = type(x) in (Tensor, torch.nn.Parameter)  # no fake tensor
        if not is_plain or not x.is_cpu or is_functorch_wrapped_tensor(x):
            return False
    return True


def cleaned(call: Call) -> Call:
    """The same call, 0 where a number is not finite, and all 0 where the mask hides a key."""
    query, key, value = (finite_or_zero(x) for x in (call.query, call.key, call.value))
    if call.attention_mask is not None:
        hidden = ~_shown(call)[..., None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    return dataclasses.replace(call, query=query, key=key, value=value)


def finite_or_zero(x: Tensor) -> Tensor:
    """The same numbers, 0 where one is not finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def is_broken(x: Float[Tensor, "batch heads seq width"]) -> Bool[Tensor, "batch heads seq"]:
    """Which positions hold a number that is not finite."""
    return ~x.isfinite().all(dim=-1)


def broken_queries(call: Call) -> Bool[Tensor, "batch heads query_len 1"]:
    """Which queries see a number that is not finite: in a key or its value, or in themselves.

    A query that sees no key is not one of them.
    """
    shown, query = _shown(call), call.query
    key_is_broken = is_broken(call.key) | is_broken(call.value)
    places = slice(call.query_start, call.query_start + query.shape[2])
    sees_broken = _counted(key_is_broken & shown, call)[:, :, places] > 0
    sees_broken = sees_broken.repeat_interleave(query.shape[1] // call.key.shape[1], dim=1)
    sees_any = _counted(shown, call)[:, :, places] > 0  # the same for all heads
    return (sees_broken | (is_broken(query) & sees_any))[..., None]


def _shown(call: Call) -> Bool[Tensor, "batch 1 key_len"]:
    if call.attention_mask is None:
        return torch.ones_like(call.key[:, :1, :, 0], dtype=torch.bool)
    return call.attention_mask.to(torch.bool)[:, None]


def _counted(
    marks: Bool[Tensor, "batch heads key_len"], call: Call
) -> Integer[Tensor, "batch heads key_len"]:
    """How many of the marked keys a query at each position sees."""
    causal, segment_ids = call.causal, call.segment_ids
    if segment_ids is None:
        return marks.cumsum(-1) if causal else marks.sum(-1, keepdim=True).expand(marks.shape)
    segments, order = segment_ids.sort(dim=-1, stable=True)
    order, segments = order[:, None].expand(marks.shape), segments.contiguous()
    first = torch.searchsorted(segments, segments)
    last = torch.searchsorted(segments, segments, right=True)
    if causal:
        last = torch.arange(1, marks.shape[2] + 1, device=marks.device).expand(first.shape)
    before = torch.nn.functional.pad(marks.gather(-1, order).cumsum(-1), (1, 0))
    first, last = (index[:, None].expand(marks.shape) for index in (first, last))
    counts = before.gather(-1, last) - before.gather(-1, first)
    return torch.zeros_like(counts).scatter(-1, order, counts)
