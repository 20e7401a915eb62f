"""Which blocks kernels compute: the certificates of both backends, sound and no wider than the
specification's (test_windows.py), and what covers them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

import alibi_flax
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_flax.kernels.certificate import query_block_ranges
from alibi_spec import certificate as spec
from alibi_spec.budgets import BUDGETS
from alibi_torch.kernels.windowed import tiles
from parity_tests import torch_calls
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.kernel_calls import BLOCK, draw, masks_of
from parity_tests.torch_calls import slopes_of

RANGES = ("first", "last", "share")
each_backend = pytest.mark.parametrize("backend", ["torch", "flax"])


def _plan(
    backend: str, query: np.ndarray, key: np.ndarray, slopes: np.ndarray, **options: Any
) -> spec.AttentionPlan:
    """In NumPy, from arrays [batch, heads, seq, head_dim]."""
    place = as_torch if backend == "torch" else jnp.asarray
    named = {name: place(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    if backend == "torch":
        found: Any = alibi_torch.attention_plan(place(query), place(key), place(slopes), **named)
        return spec.AttentionPlan(*(as_numpy(getattr(found, x)) for x in RANGES), found.block_size)
    arrays = [place(array.swapaxes(1, 2)) for array in (query, key)]
    found = alibi_flax.attention_plan(*arrays, place(slopes), **named)
    return spec.AttentionPlan(*(np.asarray(getattr(found, x)) for x in RANGES), found.block_size)


def _check(
    backend: str, query: np.ndarray, key: np.ndarray, slopes: np.ndarray, **options: Any
) -> None:
    """No query loses more than the tolerance; in float64 the ranges are the specification's."""
    dtype = str(query.dtype)
    limits = {"tolerance": options.pop("tolerance", "dtype"), "block_size": BLOCK}
    found = _plan(backend, query, key, slopes, **options, **limits)
    wide = (query.astype(np.float64), key.astype(np.float64), slopes)
    mass = spec.dropped_mass(found, *wide, **options)
    assert (mass <= spec.tolerance_of(limits["tolerance"], dtype)).all()
    exact = spec.attention_plan(query, key, slopes, **options, **limits)
    if dtype == "float64":
        integers = "int64" if backend == "torch" else "int32"
        for name in ("first", "last"):
            assert_bitwise(getattr(found, name), getattr(exact, name).astype(integers), name)
        share = str(found.share.dtype)  # torch's is float32
        assert_within(found.share, exact.share, BUDGETS[share, "cpu"].forward, name, dtype=share)
    elif backend == "flax":  # rounding widens a range by one block at the most
        assert (found.first >= exact.first - 1).all()
        assert (found.last <= exact.last + 1).all()


@settings(max_examples=60, deadline=None)
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
def test_the_certificate_of_torch(
    hostility: str,
    causal: bool,
    query_len: int,
    kv_heads: int,
    masks: str,
    slope: float,
    tolerance: str | float,
    dtype: str,
) -> None:
    arrays = draw(query_len, 130, 4, kv_heads)
    query, key = arrays["query"], arrays["key"]
    if hostility == "giant key":
        key[:, :, 3] *= 60
    elif hostility == "huge":
        query, key = 100 * query, 100 * key
    elif hostility == "equal keys":
        key[:] = key[:, :, :1]
    elif hostility == "wild query":
        query[:, :, query_len // 2] *= 1e3
    elif hostility == "zeros":
        query = np.zeros_like(query)
    narrow = [array.astype(jnp.dtype(dtype)) for array in (query, key)]
    slopes = np.float32(slope * np.array([1.0, 0.7, 0.4, 0.1]))
    _check("torch", *narrow, slopes, causal=causal, tolerance=tolerance, **masks_of(masks, 130))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize(
    ("query_len", "kv_heads", "masks", "dtype"),
    [
        *((37, 4, "none", "float64"), (300, 1, "none", "float64"), (300, 4, "mask", "float64")),
        *((280, 2, "mask and segments", dtype) for dtype in ("float64", "float32", "bfloat16")),
    ],
)
def test_the_certificate_of_flax(
    query_len: int, kv_heads: int, masks: str, dtype: str, causal: bool
) -> None:
    arrays = draw(query_len, 300, 4, kv_heads, dtype=dtype)
    for factor in (0.25, 1.5, 100):
        arrays["query"] = (factor * arrays["query"]).astype(arrays["query"].dtype)
        slopes = arrays["slopes"].astype(np.float32)
        _check(
            "flax", arrays["query"], arrays["key"], slopes, causal=causal, **masks_of(masks, 300)
        )


@each_backend
def test_nothing_is_proved(backend: str) -> None:
    """Slopes that do not fall, and numbers that are none: the full causal range."""
    arrays = draw(300, 300, dtype="float32")
    query, key, slopes = arrays["query"], arrays["key"], np.ones(4, np.float32)
    everything = np.broadcast_to(np.arange(1, 4), (2, 4, 3))
    cases = [(0 * slopes, key), (-slopes, key)]
    for number in (np.inf, np.nan, 1e30):
        spoiled = key.copy()
        spoiled[:, :, 0] = number
        cases.append((slopes, spoiled))
    for slopes_, key_ in cases:
        plan = _plan(backend, query, key_, slopes_)
        assert (plan.first == 0).all()
        assert (plan.last == everything).all()
        assert (plan.share == 1).all()
    assert (_plan(backend, query, key, slopes, tolerance=0).first == 0).all()


@each_backend
def test_bad_plans_say_why(backend: str) -> None:
    arrays = draw(4, 9)
    query, key, slopes = arrays["query"], arrays["key"], arrays["slopes"]
    with pytest.raises(ValueError, match="key does not fit query"):
        _plan(backend, query, key[..., :3], slopes)
    with pytest.raises(ValueError, match="tolerance=2 is not valid"):
        _plan(backend, query, key, slopes, tolerance=2)
    with pytest.raises(ValueError, match="block_size=0 is not valid; expected an integer"):
        _plan(backend, query, key, slopes, block_size=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize(("batch", "query_len"), [(0, 70), (2, 0), (0, 0)])
def test_plans_of_nothing(batch: int, query_len: int, is_masked: bool, causal: bool) -> None:
    """No block is needed, and the share of none is 0; dtypes are those of any plan."""
    query, key = (np.zeros((batch, 5, length, 6), np.float32) for length in (query_len, 80))
    slopes, options = np.ones(5, np.float32), {"causal": causal, "block_size": BLOCK}
    one = np.zeros((1, 5, 9, 6), np.float32), np.zeros((1, 5, 80, 6), np.float32), slopes
    mask = {"attention_mask": np.ones((batch, 80), np.int64)} if is_masked else {}
    blocks = -(-query_len // BLOCK)
    for backend in ("spec", "torch", "flax"):
        if backend == "spec":
            plan = spec.attention_plan(query, key, slopes, **mask, **options)
            other = spec.attention_plan(*one, **options)
        else:
            plan = _plan(backend, query, key, slopes, **mask, **options)
            other = _plan(backend, *one, **options)
        assert plan.first.shape == plan.last.shape == (batch, 5, blocks)
        assert plan.share.shape == (batch, 5)
        assert not plan.share.any()
        for name in RANGES:
            assert getattr(plan, name).dtype == getattr(other, name).dtype, name


@settings(max_examples=80, deadline=None)
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
    windows = tiles.windows_of(torch_calls.call_of(**arrays, scale=0.25, tolerance=2**-24), 128)
    return tiles.strips_of(windows, 0, seq, seq, 128, group=1, key_elements=128)


def test_work_grows_linearly() -> None:
    """In torch: four times the sequence, four times the products."""
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


def test_queries_of_a_block_of_keys() -> None:
    """In JAX: no block of queries is missed, and the hull is as tight as a hull can be."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, 10, (2, 3, 9))
    last = np.minimum(first + rng.integers(0, 4, first.shape), 10)
    found = query_block_ranges(*(jnp.asarray(x, jnp.int32) for x in (first, last)), 10)
    begins, ends = (np.asarray(x) for x in found)
    for b, h, j in np.ndindex(2, 3, 10):
        inside = np.flatnonzero((first[b, h] <= j) & (j < last[b, h]))
        for block in inside:
            assert begins[b, h, j] <= block < ends[b, h, j]
    rising = np.sort(first, axis=2), np.sort(first, axis=2) + 1
    begins, ends = (
        np.asarray(x) for x in query_block_ranges(*map(jnp.asarray, map(np.int32, rising)), 10)
    )
    for b, h, j in np.ndindex(2, 3, 10):
        assert ends[b, h, j] - begins[b, h, j] == (rising[0][b, h] == j).sum()


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_memory_grows_linearly(dropout: float) -> None:
    """What programs of JAX need apart from inputs and outputs, at twice the length."""

    def temporary(key_len: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, key_len, 2, 16), jnp.float32)] * 3
        slopes = jax.ShapeDtypeStruct((2,), jnp.float32)

        def total(*arrays: Array) -> Array:
            options = {"dropout": dropout, "dropout_rng": jax.random.key(3)}
            attended = alibi_flax.attention(*arrays, implementation="blockwise", **options)
            return attended.sum()

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(*shapes, slopes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2**15) <= 2.2 * temporary(2**14)
