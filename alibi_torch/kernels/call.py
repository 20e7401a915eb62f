"""What a kernel is, and its input: one checked call of `attention`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_spec.checks import beyond_windows
from alibi_torch.kernels.dropout import Dropout


@dataclass(frozen=True)
class Call:
    """The arguments of `alibi_torch.attention`, which documents them.

    Attributes:
        scale: that of the call, or the default.
        query_start: the position of the first query among the keys.
    """

    query: Float[Tensor, "batch heads query_len head_dim"]
    key: Float[Tensor, "batch kv_heads key_len head_dim"]
    value: Float[Tensor, "batch kv_heads key_len value_dim"]
    slopes: Float[Tensor, " heads"]
    causal: bool
    scale: float
    query_start: int
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None
    segment_ids: Integer[Tensor, "batch key_len"] | None
    tolerance: str | float
    distance: str
    dropout: Dropout | None


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
    """The reason why a kernel that computes only -m |i - j| cannot compute a call."""
    return beyond_windows(call.distance, call.causal)


def refuses_dropout(call: Call) -> str | None:
    """The reason why a kernel without dropout cannot compute a call."""
    return None if call.dropout is None else "it has no dropout"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would narrow the products of float32 inputs. Meta tensors know no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
