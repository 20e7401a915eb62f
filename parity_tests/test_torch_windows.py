"""torch's certificates, and the strips of tiles that cover their windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_convert.tensors import as_numpy
from alibi_spec import windows as spec
from alibi_spec.budgets import BUDGETS
from alibi_torch.attention import attention_plan
from alibi_torch.kernels.windowed import tiles
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.torch_calls import (
    BLOCK,
    call_of,
    draw,
    masks_of,
    slopes_of,
)


@settings(max_examples=150, deadline=None)
@given(
    hostility=st.sampled_from(["none", "giant key", "huge", "equal keys", "wild query", "zeros"]),
    causal=st.booleans(),
    query_len=st.sampled_from([130, 1, 37]),
    kv_heads=st.sampled_from([1, 2, 4]),
    masks=st.sampled_from(["none", "mask", "segments", "mask and segments"]),
    slope=st.sampled_from([3.0, 0.5, 0.04, 0.0, -0.01]),
    tolerance=st.sampled_from(["dtype", 1e-3, 0.25, 0.0]),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
)
def test_the_certificate_is_the_specifications(
    hostility: str,
    causal: bool,
    query_len: int,
    kv_heads: int,
    masks: str,
    slope: float,
    tolerance: str | float,
    dtype: str,
) -> None:
    """No query loses more than the tolerance; in float64 the ranges are the same."""
    arrays = draw(query_len, 130, 4, kv_heads)
    query, key = arrays["query"], arrays["key"]
    if hostility == "giant key":
        key[:, :, 3] *= 60
    elif hostility == "huge":
        query, key = 100 * query, 100 * key
    elif hostility == "equal keys":
        key = key[:, :, :1].expand(key.shape)
    elif hostility == "wild query":
        query[:, :, query_len // 2] *= 1e3
    elif hostility == "zeros":
        query = torch.zeros_like(query)
    query, key = (array.to(getattr(torch, dtype)) for array in (query, key))
    slopes = slope * torch.tensor([1.0, 0.7, 0.4, 0.1])
    options = {"causal": causal, **masks_of(masks, 130)}
    limits = {"tolerance": tolerance, "block_size": BLOCK}
    plan = attention_plan(query, key, slopes, **options, **limits)
    in_numpy = {name: each if causal is each else as_numpy(each) for name, each in options.items()}
    found = spec.AttentionPlan(
        *(as_numpy(each) for each in (plan.first, plan.last, plan.share)), plan.block_size
    )
    q, k, m = (as_numpy(array) for array in (query, key, slopes))
    limit = spec.TOLERANCES[dtype] if tolerance == "dtype" else tolerance
    assert (spec.dropped_mass(found, q, k, m, **in_numpy) <= limit).all()
    if dtype == "float64":
        exact = spec.attention_plan(q, k, m, **in_numpy, **limits)
        for name in ("first", "last"):
            assert_bitwise(getattr(found, name), getattr(exact, name), name)
        assert_within(found.share, exact.share, BUDGETS["float32", "cpu"].forward, "share")


def test_no_certificate_means_everything() -> None:
    query, key, _ = draw(130, 130).values()
    spoiled = key.clone()
    spoiled[:, :, 0] = torch.nan
    for slopes, keys in ((-slopes_of(), key), (slopes_of(), spoiled)):
        assert (attention_plan(query, keys, slopes).share == 1).all()


def test_bad_plans_say_why() -> None:
    query, key, _ = draw(4, 9).values()
    with pytest.raises(ValueError, match="key does not fit query"):
        attention_plan(query, key[..., :3], slopes_of())
    with pytest.raises(ValueError, match="tolerance=2 is not valid"):
        attention_plan(query, key, slopes_of(), tolerance=2)


@settings(max_examples=200, deadline=None)
@given(
    query_len=st.integers(1, 150),
    offset=st.integers(0, 60),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4)]),
    shape=st.sampled_from(["random", "sliding", "from the first key"]),
    limit=st.sampled_from([1, 2**9, 2**23]),
    seed=st.integers(0, 2**16),
)
def test_strips_cover_every_window_once(
    query_len: int, offset: int, heads: tuple[int, int], shape: str, limit: int, seed: int
) -> None:
    """Every block of every head lies in one tile, with all of its keys and none beyond the last."""
    rng, key_len, blocks = np.random.default_rng(seed), query_len + offset, -(-query_len // BLOCK)
    end = np.minimum(np.arange(1, blocks + 1) * BLOCK, query_len) + offset
    width = rng.integers(0, 60, (heads[0], blocks)) if shape == "random" else 40
    first = np.maximum(end - width - (0 if shape == "random" else BLOCK), 0)
    first = np.zeros_like(first) if shape == "from the first key" else first
    windows = np.broadcast_arrays(first * np.ones((heads[0], 1), int), end)
    group, covered = heads[0] // heads[1], np.zeros((heads[0], query_len), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_PRODUCT_ELEMENTS", limit)
        found = tiles.strips_of(
            *(torch.from_numpy(np.stack(windows)), offset, query_len, key_len, BLOCK),
            group=group,
            key_elements=1,
        )
    for strip in found:
        assert group == 1 or strip.heads.start // group == (strip.heads.stop - 1) // group
        for tile in range(strip.tiles):
            moved = tile * strip.height
            start, query = strip.first_key + moved, strip.first_query + moved
            covered[strip.heads, query : query + strip.height] += 1
            assert 0 <= start <= start + strip.width <= key_len
            for block in range(query // BLOCK, -(-(query + strip.height) // BLOCK)):
                first, last = (each[strip.heads, block] for each in windows)
                has_keys = first < last
                assert (start <= first[has_keys]).all()
                assert (last[has_keys] <= start + strip.width).all()
    query_has_keys = np.repeat(windows[0] < windows[1], BLOCK, axis=1)[:, :query_len]
    assert (covered[query_has_keys] == 1).all()
    assert (covered <= 1).all()


def _strips(seq: int, heads: int) -> list[tiles.Strip]:
    """The strips of the first so many of eight heads, for normal numbers."""
    array = torch.randn(1, heads, seq, 16, generator=torch.Generator().manual_seed(0))
    arrays = {"query": array, "key": array, "value": array, "slopes": slopes_of(8)[:heads]}
    windows = tiles.windows_of(call_of(**arrays, scale=0.25, tolerance=2**-24), 128)
    return tiles.strips_of(windows, 0, seq, seq, 128, group=1, key_elements=128)


def test_work_grows_linearly() -> None:
    """Four times the sequence, four times the products."""
    short, long = (sum(strip.products for strip in _strips(seq, 4)) for seq in (4096, 16_384))
    assert long < 4.4 * short


def test_calls_are_few() -> None:
    """Tiles slide along in one call, grow tall near the beginning, and are shared by heads."""
    found = _strips(16_384, 8)
    assert len(found) <= 130
    assert max(strip.products for strip in found) <= 2**21
    assert [strip.products for strip in found] == sorted(
        (strip.products for strip in found), reverse=True
    )
