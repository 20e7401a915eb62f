"""alibi_torch's kernels for GPUs: their parts on any machine, the whole where there is a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec.budgets import BUDGETS
from alibi_torch.dispatch import attention_plan
from alibi_torch.kernels import KERNELS, flex
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.torch_calls import (
    call_of,
    draw,
    masks_of,
    slopes_of,
    with_gradients,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("masks", ["none", "mask", "segments"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_len", "key_len"), [(300, 300), (200, 333), (1, 130)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on purpose
def test_flex_attention_unfused(causal: bool, masks: str, query_len: int, key_len: int) -> None:
    """Score modification and mask give dense attention's numbers."""
    arrays, options = draw(query_len, key_len, dtype="float32"), masks_of(masks, key_len)
    call = call_of(**arrays, causal=causal, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on older versions
        found = flex.flex_attention(
            *arrays.values(), score_mod=flex.bias_of(call), block_mask=flex.block_mask_of(call)
        )
    exact = alibi_torch.attention(
        **{name: each.double() for name, each in arrays.items()},
        slopes=slopes_of(),
        causal=causal,
        implementation="dense",
        **options,
    )
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(as_numpy(found), as_numpy(exact), limit, "flex", dtype="float32")


@pytest.mark.parametrize("masks", ["none", "mask"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_len", "key_len"), [(700, 700), (300, 633)])
def test_flex_block_mask_is_the_plan(
    causal: bool, masks: str, query_len: int, key_len: int
) -> None:
    """Its blocks are the plan's, and where it does not ask the mask, every query sees every key."""
    options = masks_of(masks, key_len)
    slopes = torch.tensor([2.0, 0.5, 0.2, 0.01])
    call = call_of(
        **draw(query_len, key_len, dtype="float32"), slopes=slopes, causal=causal, **options
    )
    plan = attention_plan(call.query, call.key, slopes, causal=causal, **options)
    mask = flex.block_mask_of(call)
    block = torch.arange(-(-key_len // 128))
    expected = (block >= plan.first[..., None]) & (block < plan.last[..., None])
    assert_bitwise(as_numpy(mask.to_dense().bool()), as_numpy(expected), "blocks")
    query, key = torch.arange(query_len)[:, None], torch.arange(key_len)
    everything = torch.ones(query_len, key_len, dtype=torch.bool)
    sees = [everything & mask.mask_mod(torch.tensor(b), 0, query, key) for b in range(2)]
    is_full = torch.zeros_like(expected)
    counts, lists = mask.full_kv_num_blocks, mask.full_kv_indices
    for where in np.ndindex(*counts.shape):
        is_full[where][lists[where][: counts[where]].long()] = True
    full = is_full.repeat_interleave(128, 2)[:, :, :query_len].repeat_interleave(128, 3)
    assert torch.stack(sees)[:, None].expand(2, 4, -1, -1)[full[..., :key_len]].all()
    assert (masks == "none") == bool(is_full.any())


@needs_cuda
@pytest.mark.parametrize("implementation", ["flex", "flash_attn", "blockwise"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", ["none", "mask", "segments"])
@pytest.mark.parametrize(("kv_heads", "query_len"), [(4, 1000), (2, 300)])
def test_on_a_gpu(
    implementation: str, dtype: str, causal: bool, masks: str, kv_heads: int, query_len: int
) -> None:
    """Values and gradients against float64 dense attention of the same numbers."""
    drawn = draw(query_len, 1000, 4, kv_heads, width=64)
    narrow = {name: each.cuda().to(getattr(torch, dtype)) for name, each in drawn.items()}
    options: dict[str, Any] = {"slopes": slopes_of().cuda(), "causal": causal}
    options |= {name: each.cuda() for name, each in masks_of(masks, 1000).items()}
    reason = KERNELS[implementation].refuses(call_of(**narrow, **options))
    if reason is not None:
        pytest.skip(reason)
    exact, found = (
        with_gradients(arrays, implementation=name, **options)
        for name, arrays in (
            ("dense", {name: each.double() for name, each in narrow.items()}),
            (implementation, narrow),
        )
    )
    budget = BUDGETS["float32" if dtype == "float32" else "bfloat16", "gpu"]
    found = {name: found[name] for name in ("attended", *drawn)}
    exact = {name: exact[name] for name in found}
    assert_within(found["attended"], exact["attended"], budget.forward, dtype, dtype=dtype)
    assert_gradients_within(found, exact, budget.gradient, dtype, dtype=dtype)
