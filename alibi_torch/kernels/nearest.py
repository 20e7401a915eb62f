"""A long cache on the CPU, read from the newest key on, and no farther than needed (SPEC.md §16).

Of one query for each sequence, the logits with the newest keys prove how many more keys each head
needs, and the logits with these, how many values. Heads that are read together read as many as the
neediest. Half precision is converted to float32 for as many heads at a time as there are threads.

For a chunk of queries the other kernels are given the keys from `first_needed` on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from alibi_spec.certificate import keys_needed_after, tolerance_of
from alibi_torch.kernels.call import Call, refuses_bias, without_autocast
from alibi_torch.kernels.certificate import keys_needed
from alibi_torch.kernels.finite import has_values_on_host

# Keys from which this is faster than to read all, by bytes of a number. The fused kernel reads
# half precision at a fraction of the memory's speed.
PAYS_FROM = {2: 2048, 4: 8192, 8: 8192}
NEAREST = 1024  # keys of every head that are read before the proof


def refuses(call: Call) -> str | None:
    """The reason why a call of the newest queries cannot read only a part, or not faster."""
    if not has_values_on_host(call.query, call.key):
        return "how much is read depends on values, for which a device would stand still"
    if call.key.shape[2] < PAYS_FROM[call.key.itemsize]:
        return "few keys are read sooner than proved superfluous"
    if len(call.query) == 0:
        return "there is no query"
    mask = call.attention_mask
    if mask is not None and not bool(mask[:, call.query_start :].all()):
        return "nothing can be proved for a query that does not see its own key"
    return refuses_bias(call)


def first_needed(call: Call, largest: Float[Tensor, "batch kv_heads"]) -> int:
    """The oldest key that some query needs; each stands at a key of its own, not padding.

    Args:
        largest: the largest norm of a key of each head.
    """
    own_key = call.key[:, :, call.query_start :]
    needed = keys_needed(call.query, own_key, largest, call.slopes, call.scale)
    end = torch.arange(call.query_start + 1, call.key.shape[2] + 1)
    return int(max(0.0, (end - needed).amin().item()))


def attention(
    call: Call, largest: Float[Tensor, "batch kv_heads"]
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attention of the query at the last key, which is not padding, over keys in order.

    Args:
        largest: the largest norm of a key of each head.
    """
    with without_autocast(call.query.device):
        return _attention(call, largest)


def _attention(
    call: Call, largest: Float[Tensor, "batch kv_heads"]
) -> Float[Tensor, "batch heads 1 value_dim"]:
    batch, heads, _, head_dim = call.query.shape
    kv_heads, key_len = call.key.shape[1:3]
    group, near = heads // kv_heads, min(NEAREST, key_len)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    # The heads of all sequences are one axis; those that share keys are queries of one head.
    query = call.query.to(dtype).reshape(batch * kv_heads, group, head_dim)
    key, value = call.key.flatten(0, 1), call.value.flatten(0, 1)
    slope = call.slopes.to(dtype).expand(batch, -1).reshape(batch * kv_heads, group, 1)
    hidden = None
    if call.attention_mask is not None:
        hidden = ~call.attention_mask.to(torch.bool).repeat_interleave(kv_heads, dim=0)[:, None]

    def logits(rows: slice, count: int) -> Float[Tensor, "rows group {count}"]:
        bias = slope[rows] * torch.arange(1 - count, 1, dtype=dtype)
        if hidden is not None:
            bias = bias.masked_fill(hidden[rows, :, key_len - count :], -math.inf)
        keys = key[rows, key_len - count :].to(dtype)
        return torch.baddbmm(bias, query[rows], keys.mT, alpha=call.scale)

    # Half of the tolerance for keys, and half for values.
    allowed_mass = tolerance_of("dtype", str(call.query.dtype).removeprefix("torch.")) / 2
    limit = query.new_full((len(query), group, 1), allowed_mass)
    nearest = logits(slice(None), near)
    shares = nearest.softmax(dim=2)
    needed = _needed(nearest, shares, query, slope, largest, call.scale, allowed_mass)
    parts = []
    for rows, count in _runs(needed, near, key_len):
        weights, unread = shares[rows], 0
        if count > near:
            weights = logits(rows, count).softmax(dim=2)
            # The oldest whose weights sum to almost nothing.
            sums = weights.cumsum(dim=2)
            unread = min(torch.searchsorted(sums, limit[rows]).flatten().tolist())
            unread = min(unread, count - near)  # some are read in any case: a sum can be NaN
            weights = weights[:, :, unread:]
        parts.append(torch.bmm(weights, value[rows, key_len - count + unread :].to(dtype)))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended.view(batch, heads, 1, value.shape[2]).to(call.query.dtype)


def _needed(
    nearest: Float[Tensor, "rows group near"],
    shares: Float[Tensor, "rows group near"],
    query: Float[Tensor, "rows group head_dim"],
    slope: Float[Tensor, "rows group 1"],
    largest: Float[Tensor, "batch kv_heads"],
    scale: float,
    allowed_mass: float,
) -> list[float]:
    """How many keys each row needs: the neediest of the queries that share them.

    Args:
        nearest: biased logits with the newest keys.
        shares: their softmax.
    """
    (_, group, head_dim), count = query.shape, nearest.shape[2]
    # The largest share cannot underflow, and gives the log-sum sooner than `logsumexp`.
    facts = (nearest.amax(dim=2), shares.amax(dim=2), torch.linalg.vector_norm(query, dim=2))
    top, share, norm, m, bound = (x.flatten().tolist() for x in (*facts, slope, largest))
    needed = [
        keys_needed_after(
            *(top[head] - math.log(share[head]), scale * norm[head], bound[head // group], m[head]),
            count=count,
            head_dim=head_dim,
            epsilon=torch.finfo(query.dtype).eps,
            allowed_mass=allowed_mass,
        )
        for head in range(len(top))
    ]
    return [max(needed[head : head + group]) for head in range(0, len(needed), group)]


def _runs(needed: list[float], near: int, key_len: int) -> Iterator[tuple[slice, int]]:
    """Neighbours among the rows, and how many keys they are read with.

    All that the nearest keys suffice for; of the others as many as there are threads, each of which
    multiplies a matrix.
    """
    counts = [max(near, math.ceil(min(each, key_len))) for each in needed]
    together, start = torch.get_num_threads(), 0
    for is_near, run in groupby(counts, key=near.__eq__):
        several = list(run)
        step = len(several) if is_near else together
        for place in range(0, len(several), step):
            some = several[place : place + step]
            yield slice(start, start + len(some)), max(some)
            start += len(some)
