"""Ways to compute causal attention with linear biases in PyTorch, ours and others', as one table.

Each makes a function of query, key and value [1, heads, seq, head_dim] for one sequence length.
Slopes, biases and masks, which do not depend on these, are made beforehand and not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import alibi_torch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way.

    Attributes:
        make: (slopes, seq, dtype) -> the function.
        squares: how many arrays [heads, seq, seq] of float32 it holds at once, at most, with
            gradients; 0 for none.
        has_gradients: it can be differentiated on the CPU.
        needs: the package that must be installed.
        note: a remark for readers of the figures.
    """

    make: Callable[[Tensor, int, torch.dtype], Attend]
    squares: int = 0
    has_gradients: bool = True
    needs: str = "torch"
    note: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether it can run here."""
        return importlib.util.find_spec(self.needs) is not None


def _ours(slopes: Tensor, _seq: int, _dtype: torch.dtype, implementation: str) -> Attend:
    return partial(alibi_torch.attention, slopes=slopes, implementation=implementation)


def _distance(seq: int) -> Tensor:
    position = torch.arange(seq)
    return (position[None, :] - position[:, None]).float()


def _hidden(seq: int) -> Tensor:
    return torch.ones(seq, seq, dtype=torch.bool).triu(1)


def _seed(slopes: Tensor, seq: int, dtype: torch.dtype) -> Attend:
    """As jaketae/alibi does it, without its projections: scores over sqrt(d_model), bias, mask."""
    bias = (slopes[:, None, None] * _distance(seq)).to(dtype)
    hidden = _hidden(seq)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[1] * query.shape[3]) + bias
        return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value

    return attend


def _sdpa_with_bias(slopes: Tensor, seq: int, dtype: torch.dtype) -> Attend:
    bias = slopes[:, None, None] * _distance(seq)
    bias = bias.masked_fill(_hidden(seq), -torch.inf).to(dtype)[None]
    return partial(F.scaled_dot_product_attention, attn_mask=bias)


def _sdpa_causal(_slopes: Tensor, _seq: int, _dtype: torch.dtype) -> Attend:
    return partial(F.scaled_dot_product_attention, is_causal=True)


def _flex(slopes: Tensor, seq: int, _dtype: torch.dtype) -> Attend:
    return compiled_flex(slopes, seq)


def compiled_flex(slopes: Tensor, seq: int) -> Attend:
    """FlexAttention with the bias as a score modification and a causal block mask."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")

    def bias(score: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Tensor:  # noqa: ARG001
        return score - slopes[head] * (query - key)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:  # noqa: ARG001
        return query >= key

    mask = flex.create_block_mask(sees, None, None, seq, seq, device=slopes.device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return partial(compiled, score_mod=bias, block_mask=mask)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _bloom(_slopes: Tensor, seq: int, dtype: torch.dtype) -> Attend:
    bloom: Any = importlib.import_module("transformers.models.bloom.modeling_bloom")

    def attend(query: Tensor, _key: Tensor, _value: Tensor) -> Tensor:
        x = _joined(query)
        return layer(x, torch.zeros_like(x), alibi, mask)[0]

    heads = len(_slopes)
    config = bloom.BloomConfig(
        hidden_size=64 * heads, n_head=heads, attention_dropout=0, hidden_dropout=0
    )
    layer = bloom.BloomAttention(config, layer_idx=0).to(dtype)
    alibi = bloom.build_alibi_tensor(torch.ones(1, seq), heads, dtype)
    mask = torch.zeros(seq, seq, dtype=dtype).masked_fill(_hidden(seq), torch.finfo(dtype).min)
    return attend


def _mpt(_slopes: Tensor, seq: int, dtype: torch.dtype) -> Attend:
    mpt: Any = importlib.import_module("transformers.models.mpt.modeling_mpt")

    heads = len(_slopes)
    layer = mpt.MptAttention(mpt.MptConfig(d_model=64 * heads, n_heads=heads)).to(dtype)
    alibi, hidden = mpt.build_mpt_alibi_tensor(heads, seq).to(dtype), _hidden(seq)
    return lambda query, _key, _value: layer(_joined(query), alibi, None, hidden)[0]


def _x_transformers(slopes: Tensor, seq: int, dtype: torch.dtype) -> Attend:
    attend: Any = importlib.import_module("x_transformers.attend").Attend(causal=True)
    bias = -(slopes[:, None, None] * _distance(seq).abs()).to(dtype)
    return lambda query, key, value: attend(query, key, value, attn_bias=bias)[0]


_PROJECTIONS = "a whole layer: its projections (d_model = heads * 64) are timed too"

PEERS: dict[str, Peer] = {
    "alibi_torch, aten_flash": Peer(partial(_ours, implementation="aten_flash")),
    "alibi_torch, blockwise": Peer(partial(_ours, implementation="blockwise")),
    "alibi_torch, dense": Peer(partial(_ours, implementation="dense"), squares=7),
    "jaketae/alibi": Peer(_seed, squares=6, note="attention alone, without its projections"),
    "sdpa with a materialised bias": Peer(_sdpa_with_bias, squares=3),
    "sdpa, causal, no bias": Peer(_sdpa_causal, note="another function: no bias at all"),
    "FlexAttention, compiled": Peer(_flex, has_gradients=False),
    "transformers BLOOM": Peer(_bloom, 7, needs="transformers", note=_PROJECTIONS),
    "transformers MPT": Peer(_mpt, 7, needs="transformers", note=_PROJECTIONS),
    "x-transformers": Peer(_x_transformers, 7, needs="x_transformers"),
}
