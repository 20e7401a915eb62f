"""The certificate in NumPy: never more dropped than allowed, and not much less than needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alibi_spec
from alibi_spec.budgets import AGREEMENTS
from alibi_spec.certificate import TOLERANCES, AttentionPlan, attention_plan, dropped_mass
from alibi_spec.reference import biased_logits, masked_softmax
from parity_tests.compare import assert_bitwise

SEQ, HEAD_DIM, BLOCK = 200, 8, 16


def _draw(
    rng: np.random.Generator, heads: int, kv_heads: int, query_len: int
) -> tuple[np.ndarray, ...]:
    query = rng.standard_normal((2, heads, query_len, HEAD_DIM))
    key, value = rng.standard_normal((2, 2, kv_heads, SEQ, HEAD_DIM))
    return query, key, value


def _draw_shape(shape: str, rng: np.random.Generator, query_len: int, kv_heads: int) -> Any:
    """Queries, keys and values [2, heads, seq, head_dim], made hostile."""
    query, key, value = _draw(rng, 4, kv_heads, query_len)
    if shape == "giant far key":
        key[:, :, 3] *= 60
    elif shape == "huge":
        query, key = 100 * query, 100 * key
    elif shape == "equal keys":
        key[:] = key[:, :, :1]
    elif shape == "zeros":
        query[:] = 0
    elif shape == "opposed":  # every query shuns its own key and wants the first one
        key[:, :, -query_len:] = -query[:, :: 4 // kv_heads]
        key[:, :, 0] = 9
    elif shape == "one wild query":
        query[:, :, query_len // 2] *= 1e3
    return query, key, value


SHAPES = (
    "normal",
    "giant far key",
    "huge",
    "equal keys",
    "zeros",
    "opposed",
    "one wild query",
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    causal=st.booleans(),
    query_len=st.sampled_from([SEQ, 1, 37]),
    kv_heads=st.sampled_from([1, 2, 4]),
    is_masked=st.booleans(),
    packing=st.sampled_from(["none", "packed", "interleaved"]),
    slope=st.sampled_from([3.0, 0.5, 0.04, 1e-4, 0.0, -0.01]),
    tolerance=st.sampled_from(["dtype", 1e-3, 0.25, 0.0]),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**16),
)
def test_no_row_loses_more_than_the_tolerance(
    shape: str,
    causal: bool,
    query_len: int,
    kv_heads: int,
    is_masked: bool,
    packing: str,
    slope: float,
    tolerance: str | float,
    dtype: str,
    seed: int,
) -> None:
    """By brute force in float64, for every row, and the output moves by twice that at most."""
    rng = np.random.default_rng(seed)
    query, key, value = _draw_shape(shape, rng, query_len, kv_heads)
    query, key = query.astype(dtype), key.astype(dtype)
    slopes = (slope * np.array([1.0, 0.7, 0.4, 0.1])).astype(np.float32)
    options: dict[str, Any] = {"causal": causal}
    if is_masked:
        options["attention_mask"] = rng.random((2, SEQ)) < 0.8
        options["attention_mask"][0, : rng.integers(SEQ)] = False
    if packing != "none":
        segments = rng.integers(0, 4, (2, SEQ))
        options["segment_ids"] = np.sort(segments) if packing == "packed" else segments
    plan = attention_plan(query, key, slopes, **options, tolerance=tolerance, block_size=BLOCK)
    limit = TOLERANCES[dtype] if tolerance == "dtype" else float(tolerance)
    mass = dropped_mass(plan, query, key, slopes, **options)
    assert (mass <= limit).all()
    logits = biased_logits(query, key, slopes, **options)
    change = _attend(logits, value) - _attend(
        np.where(_inside(plan, query_len), logits, -np.inf), value
    )
    rounding = AGREEMENTS["float64 sums"].relative * np.abs(value).max()
    assert (np.abs(change).max(axis=-1) <= 2 * mass * np.abs(value).max() + rounding).all()
    assert ((plan.share >= 0) & (plan.share <= 1)).all()


def _inside(plan: AttentionPlan, query_len: int) -> np.ndarray:
    block, row = np.arange(SEQ) // plan.block_size, np.arange(query_len) // plan.block_size
    return (block >= plan.first[:, :, row, None]) & (block < plan.last[:, :, row, None])


def _attend(logits: np.ndarray, value: np.ndarray) -> np.ndarray:
    value = np.repeat(value, logits.shape[1] // value.shape[1], axis=1)
    return masked_softmax(logits) @ value


def _loss(
    far: float, near: float, own: float, slope: float, gap: int, causal: bool, tolerance: float
) -> float:
    """What the middle query of one head loses: its logits with far, near and its own keys."""
    middle, seq = 400, 801
    logits = np.full(seq, near)
    logits[np.abs(np.arange(seq) - middle) > gap] = far
    logits[middle] = own
    query, key, slopes = np.ones((1, 1, seq, 1)), logits[None, None, :, None], np.array([slope])
    options: dict[str, Any] = {"scale": 1.0, "causal": causal}
    plan = attention_plan(query, key, slopes, tolerance=tolerance, block_size=1, **options)
    return dropped_mass(plan, query, key, slopes, **options)[0, 0, middle]


@pytest.mark.parametrize("causal", [True, False])
def test_many_far_keys_add_up(causal: bool) -> None:
    """Where the bound is all but reached: keys as good as the query's own, beyond a gap of bad."""
    losses = [_loss(8.0, -8.0, 8.0, 0.05, gap, causal, tolerance=0.1) for gap in range(60, 150)]
    assert 0.08 < max(losses) <= 0.1


def test_equal_weight_needs_every_key() -> None:
    """Without a slope far keys add up without end, however small each is beside the query's own."""
    assert _loss(0.0, 0.0, 2.5, 0.0, gap=20, causal=True, tolerance=0.25) == 0


@pytest.mark.parametrize("causal", [True, False])
def test_windows_do_not_grow_with_the_sequence(causal: bool) -> None:
    """Twice the keys, the same blocks per query: the cost is linear."""
    rng = np.random.default_rng(0)
    slopes = alibi_spec.slopes(8)[:4]
    widths = []
    for seq in (2048, 4096):
        query, key = rng.standard_normal((2, 1, 4, seq, 64)).astype(np.float32)
        plan = attention_plan(query, key, slopes, causal=causal, block_size=64)
        widths.append((plan.last - plan.first)[0, :, seq // 128].astype(float))
    assert (widths[1] <= widths[0] + 1).all()  # the largest norm of more keys is a little larger
    assert (widths[1] < np.array([6, 8, 12, 20]) * (1 if causal else 2)).all()


def test_windows_are_not_wasteful() -> None:
    """What the certificate keeps is within a factor of three of what any method must keep."""
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 1, 4, 3000, 64)).astype(np.float32)
    slopes = alibi_spec.slopes(8)[:4]
    plan = attention_plan(query, key, slopes, block_size=1)
    probabilities = masked_softmax(biased_logits(query, key, slopes))
    needed = (np.cumsum(probabilities, axis=-1) <= 2.0**-24).sum(axis=-1)
    rows = np.arange(2000, 3000)
    kept, least = rows - plan.first[:, :, rows] + 1, rows - needed[:, :, rows] + 1
    assert (kept >= least).all()
    assert (kept <= 3 * least).all()


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_other_segments_prove_nothing(causal: bool) -> None:
    """A query whose own key is hidden, with a key of another segment beside it, sees far ones."""
    query, key, slopes = np.ones((1, 1, 64, 2)), np.ones((1, 1, 64, 2)), np.ones(1, np.float32)
    segments = np.where(np.arange(64) < 16, 0, 1)[None]
    segments[0, 63] = 0
    masks: dict[str, Any] = {"segment_ids": segments, "attention_mask": np.arange(64)[None] < 63}
    plan = attention_plan(query, key, slopes, causal=causal, **masks, block_size=8)
    mass = dropped_mass(plan, query, key, slopes, causal=causal, **masks)
    assert (mass <= TOLERANCES["float64"]).all()


def test_padding_costs_nothing() -> None:
    """Queries that see no key need no blocks, and a zero tolerance drops nothing else."""
    query, key, _ = _draw(np.random.default_rng(2), 4, 4, SEQ)
    mask = np.ones((2, SEQ), dtype=np.int64)
    mask[0, : 5 * BLOCK] = 0
    mask[1] = 0
    plan = attention_plan(
        *(query, key, alibi_spec.slopes(4)), attention_mask=mask, tolerance=0, block_size=BLOCK
    )
    blocks = -(-SEQ // BLOCK)
    width = plan.last - plan.first
    assert (width[0, :, :5] == 0).all()
    assert (width[0, :, 5:] == np.arange(1, blocks - 4)).all()
    assert (width[1] == 0).all()


def test_no_certificate_means_everything() -> None:
    """Slopes that do not fall, numbers that are no numbers: the full causal range."""
    query, key, _ = _draw(np.random.default_rng(3), 4, 4, SEQ)
    everything = np.broadcast_to(np.arange(1, -(-SEQ // BLOCK) + 1), (2, 4, -(-SEQ // BLOCK)))
    for slopes, spoiled in (
        (np.zeros(4, np.float32), key),
        (-alibi_spec.slopes(4), key),
        (np.full(4, np.nan, np.float32), key),
        (alibi_spec.slopes(4), np.where(np.arange(SEQ)[:, None] == 0, np.inf, key)),
        (alibi_spec.slopes(4), np.where(np.arange(SEQ)[:, None] == 0, np.nan, key)),
    ):
        plan = attention_plan(query, spoiled, slopes, block_size=BLOCK)
        assert (plan.first == 0).all()
        assert_bitwise(plan.last, everything, "last")
