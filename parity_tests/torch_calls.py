"""Calls of torch's kernels on tensors, for what only torch is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import alibi_spec
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_torch.kernels.call import Call
from parity_tests import kernel_calls
from parity_tests.kernel_calls import WIDTH

each_fused = pytest.mark.parametrize("implementation", ["aten_flash", "blockwise"])
each_windowed = pytest.mark.parametrize(
    ("implementation", "dropout"), [("aten_flash", 0.0), ("blockwise", 0.0), ("blockwise", 0.3)]
)


def draw(query_len: int, key_len: int, *heads: int, **options: Any) -> dict[str, torch.Tensor]:
    """query, key, value [2, heads, seq, width]."""
    arrays = kernel_calls.draw(query_len, key_len, *heads, **options)
    return {name: as_torch(arrays[name]) for name in ("query", "key", "value")}


def slopes_of(heads: int = 4) -> torch.Tensor:
    return as_torch(alibi_spec.slopes(heads))


SLOPES = slopes_of()


def masks_of(kind: str, key_len: int) -> dict[str, torch.Tensor]:
    return {name: as_torch(mask) for name, mask in kernel_calls.masks_of(kind, key_len).items()}


def with_gradients(
    arrays: dict[str, torch.Tensor], slopes: torch.Tensor, **options: Any
) -> dict[str, np.ndarray]:
    """Attended values and the gradients of a fixed sum of them, in NumPy.

    The gradient of the slopes is among them where every device has one. Dropout has one seed.
    """
    leaves = {name: array.clone().requires_grad_() for name, array in arrays.items()}
    if options["implementation"] in ("dense", "blockwise"):
        leaves["slopes"] = slopes.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    attended = alibi_torch.attention(
        **{"slopes": slopes, **leaves}, **{"dropout_rng": generator, **options}
    )
    rng = np.random.default_rng(2)
    cotangent = as_torch(rng.standard_normal(attended.shape)).to(attended)
    gradients = torch.autograd.grad(attended, list(leaves.values()), cotangent)
    named = dict(zip(leaves, gradients, strict=True)) | {"attended": attended}
    return {name: as_numpy(array.detach().cpu()) for name, array in named.items()}


def loss_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """Dropout draws from torch's own generator, as in models."""
    attended = alibi_torch.attention(query, key, value, SLOPES, **options)
    return attended.square().mean()


def call_of(**changes: Any) -> Call:
    arrays: dict[str, Any] = {**draw(300, 300, dtype="float32"), "slopes": slopes_of()}
    options = {"attention_mask": None, "segment_ids": None, "dropout": None}
    shared = {"causal": True, "scale": WIDTH**-0.5, "distance": "absolute", "tolerance": "dtype"}
    named = arrays | options | shared | changes
    return Call(**named, query_start=named["key"].shape[2] - named["query"].shape[2])
