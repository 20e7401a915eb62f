"""Positions divided over devices: each attends with its queries to the keys of its neighbours, too.

A device is sent the keys of as many devices before it as the windows of its heads reach (SPEC.md
§19), of each head its own number; without windows those of all, and for an encoder also of those
behind it. Every call proves anew that a key which was not sent does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from alibi_spec.sharding import neighbours_needed
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.certificate import keys_needed
from alibi_torch.kernels.finite import is_broken
from alibi_torch.positions import Positions

# Heads of keys by how many places before this device they are sent from; behind it, if negative.
_Readers = Mapping[int, list[int]]


def attend(
    attend_here: Callable[[Call], Float[Tensor, "batch some own value_dim"]],
    call: Call,
    positions: Positions,
    windows: Sequence[int] | None,
) -> Float[Tensor, "batch heads own value_dim"]:
    """The attended values of one device's queries; NaN where a key is needed that was not sent.

    Args:
        attend_here: attention of a call, whose first query stands at a position among the keys.
        call: of the device's own positions; but dropout has the hashes of all keys.
        positions: that the device has.
        windows: for each head, how many keys its queries need; -1 is all; None for all heads.
    """
    heads, own, kv_heads = *call.query.shape[1:3], call.key.shape[1]
    devices, group = positions.count, heads // kv_heads
    needed = neighbours_needed(windows, heads, own, devices)
    of_keys = [max(needed[head * group : (head + 1) * group]) for head in range(kv_heads)]
    behind = 0 if call.causal else devices - 1
    readers = {
        hop: [head for head in range(kv_heads) if hop <= of_keys[head]]
        for hop in range(max(of_keys), -behind - 1, -1)
    }
    blocks = _blocks(call, positions, readers)
    is_all = min(of_keys) == devices - 1
    largest = None if is_all else _largest(call, positions)
    parts, order = [], []
    for count in sorted(set(of_keys)):
        keys = [head for head in range(kv_heads) if of_keys[head] == count]
        queries = [head * group + each for head in keys for each in range(group)]
        some = _of_heads(call, keys, queries)
        found = attend_here(_joined(some, keys, blocks, readers, positions, count))
        if largest is not None and count < positions.number:  # else it has all keys before it
            is_proved = _is_proved(some, largest[:, keys], count * own)
            found = torch.where(is_proved, found, math.nan)
        parts.append(found)
        order += queries
    if len(parts) == 1:
        return parts[0]
    place = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts, dim=1)[:, place]


def _of_heads(call: Call, keys: list[int], queries: list[int]) -> Call:
    if len(queries) == call.query.shape[1]:
        return call
    dropout = call.dropout
    if dropout is not None:
        dropout = dropout._replace(query_hashes=dropout.query_hashes[:, queries])
    return replace(
        call,
        query=call.query[:, queries],
        key=call.key[:, keys],
        value=call.value[:, keys],
        slopes=call.slopes[queries],
        dropout=dropout,
    )


def _blocks(call: Call, positions: Positions, readers: _Readers) -> dict[str, dict[int, Tensor]]:
    """What the devices that there are hold, by how many places each is before this one.

    Keys and values stand side by side, of the heads that read them.
    """
    pairs = torch.cat([call.key, call.value], dim=-1)
    there = [hop for hop in readers if hop != 0 and 0 <= positions.number - hop < positions.count]
    own, *received = _Exchange.apply(pairs, positions, readers)
    blocks = {"pairs": dict(zip([0, *there], [own, *received], strict=True))}
    for name, mask in (
        ("attention_mask", call.attention_mask),
        ("segment_ids", call.segment_ids),
    ):
        if mask is not None:
            others = _received(mask[:, None, :, None], positions, {hop: [0] for hop in readers})
            blocks[name] = {0: mask} | {hop: x[:, 0, :, 0] for hop, x in others.items()}
    return blocks


def _joined(
    call: Call,
    keys: list[int],
    blocks: Mapping[str, Mapping[int, Tensor]],
    readers: _Readers,
    positions: Positions,
    count: int,
) -> Call:
    """With the keys of some devices in order. Where there is no device, there are no keys."""
    pairs, own = blocks["pairs"], call.key.shape[2]
    hops = [hop for hop in readers if hop in pairs and hop <= count]
    first, last = (positions.number - hop for hop in (hops[0], hops[-1]))
    several = [_of_readers(pairs[hop], readers[hop], keys) for hop in hops]
    widths = [call.key.shape[3], call.value.shape[3]]
    key, value = torch.cat(several, dim=2).split(widths, dim=3)
    masks: Any = {
        name: torch.cat([of_hop[hop] for hop in hops], dim=1)
        for name, of_hop in blocks.items()
        if name != "pairs"
    }
    dropout = call.dropout
    if dropout is not None:
        dropout = dropout._replace(key_hashes=dropout.key_hashes[first * own : (last + 1) * own])
    return replace(
        *(call,), key=key, value=value, dropout=dropout, query_start=hops[0] * own, **masks
    )


def _of_readers(
    pairs: Float[Tensor, "batch some own pair"], there: list[int], keys: list[int]
) -> Float[Tensor, "batch chosen own pair"]:
    return pairs if keys == there else pairs[:, [there.index(head) for head in keys]]


class _Exchange(torch.autograd.Function):
    """Keys and values of this device, and of others; their gradients return to where they are from.

    Its own are a result too: so every device takes part in the backward pass, also one that is sent
    nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, pairs: Float[Tensor, "batch kv_heads own pair"], positions: Any, readers: Any
    ) -> tuple[Float[Tensor, "batch _ own pair"], ...]:
        ctx.positions, ctx.readers = positions, readers
        return pairs.view_as(pairs), *_received(pairs, positions, readers).values()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Float[Tensor, "batch _ own pair"]
    ) -> tuple[Float[Tensor, "batch kv_heads own pair"], None, None]:
        of_own, *of_received = gradients
        number, count = ctx.positions.number, ctx.positions.count
        hops = [hop for hop in ctx.readers if hop != 0]
        there = [hop for hop in hops if 0 <= number - hop < count]
        outgoing = {-hop: x for hop, x in zip(there, of_received, strict=True)}
        incoming = {
            hop: _empty(of_own, len(ctx.readers[hop])) for hop in hops if 0 <= number + hop < count
        }
        _exchange(ctx.positions, outgoing, incoming)
        total = of_own.clone()
        for hop, gradient in incoming.items():
            total[:, ctx.readers[hop]] += gradient
        return total, None, None


def _received(
    x: Shaped[Tensor, "batch some own width"], positions: Positions, readers: _Readers
) -> dict[int, Shaped[Tensor, "batch _ own width"]]:
    """The heads of other devices that are read here, by how many places each is before this one."""
    number, count = positions.number, positions.count
    hops = [hop for hop in readers if hop != 0]
    outgoing = {hop: x[:, readers[hop]] for hop in hops if 0 <= number + hop < count}
    found = {hop: _empty(x, len(readers[hop])) for hop in hops if 0 <= number - hop < count}
    _exchange(positions, outgoing, {-hop: each for hop, each in found.items()})
    return found


def _empty(x: Tensor, heads: int) -> Tensor:
    return x.new_empty((len(x), heads, *x.shape[2:]))


def _exchange(
    positions: Positions, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]
) -> None:
    """Send to and receive from the devices that are so many places behind this one."""
    group = positions.mesh.get_group()
    sent = {place: x.contiguous() for place, x in outgoing.items()}
    several = [(dist.isend, sent), (dist.irecv, incoming)]
    operations = [
        dist.P2POp(way, x, group=group, group_peer=positions.number + place)
        for way, arrays in several
        for place, x in arrays.items()
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


@torch.no_grad()
def _largest(call: Call, positions: Positions) -> Float[Tensor, "batch kv_heads"]:
    """The largest norm of a visible key of any device; inf where one or its value is not finite."""
    dtype = torch.promote_types(call.key.dtype, torch.float32)
    norms = torch.linalg.vector_norm(call.key, dim=-1, dtype=dtype)
    norms = norms.masked_fill(is_broken(call.key) | is_broken(call.value), math.inf)
    if call.attention_mask is not None:
        norms = norms.masked_fill(~call.attention_mask.to(torch.bool)[:, None], 0.0)
    largest = norms.amax(dim=-1).to(torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, positions.mesh.get_group())
    return largest


@torch.no_grad()
def _is_proved(
    call: Call, largest: Float[Tensor, "batch kv_heads"], before: int
) -> Bool[Tensor, ""]:
    """Whether no query of this device needs a key that is there, and not among its own.

    Those are the keys of this device, and of `before` positions before them.
    """
    needed = keys_needed(call.query, call.key, largest, call.slopes, call.scale)
    here = torch.arange(call.query.shape[2], device=needed.device) + 1 + before
    is_enough = needed <= here
    if call.attention_mask is not None:  # nothing is promised for queries that are padding
        is_enough = is_enough | ~call.attention_mask.to(torch.bool)[:, None]
    return is_enough.all()
