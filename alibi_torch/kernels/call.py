"""What a kernel is, and what it is asked: the facts of one checked call of `attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_spec.checks import beyond_windows


@dataclass(frozen=True)
class Call:
    """The arguments of `alibi_torch.attention`, which documents them."""

    query: Float[Tensor, "batch heads query_len head_dim"]
    key: Float[Tensor, "batch kv_heads key_len head_dim"]
    value: Float[Tensor, "batch kv_heads key_len value_dim"]
    slopes: Float[Tensor, " heads"]
    causal: bool
    scale: float
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None
    segment_ids: Integer[Tensor, "batch key_len"] | None
    tolerance: str | float
    distance: str
    dropout: float
    dropout_rng: torch.Generator | None


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    Attributes:
        run: computes a call that is not refused.
        refuses: why a call cannot be computed here, as the rest of a sentence; None if it can.
    """

    run: Callable[[Call], Float[Tensor, "batch heads query_len value_dim"]]
    refuses: Callable[[Call], str | None]


def refuses_bias(call: Call) -> str | None:
    """The reason why a kernel that knows only -m |i - j| and no dropout cannot compute a call."""
    if call.dropout > 0:
        return "it has no dropout"
    return beyond_windows(call.distance, call.causal)


def default_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q·k: 1/sqrt(head_dim) unless one is given."""
    return 1 / math.sqrt(head_dim) if scale is None else float(scale)
