"""A step of a long cache reads from the newest key on, and no more than it needs (SPEC.md §16)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import alibi_torch.cache
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_spec.certificate import TOLERANCES, keys_needed, keys_needed_after
from alibi_spec.memory import in_huge_pages
from alibi_torch import KVCache, attention
from alibi_torch.kernels import dense, nearest
from alibi_torch.kernels.call import Call
from parity_tests.compare import assert_within

KEYS = 700
FACTS: Any = {"head_dim": 16, "epsilon": 2.0**-23}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nearest, "PAYS_FROM", dict.fromkeys((2, 4, 8), 64))
    monkeypatch.setattr(nearest, "NEAREST", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # as many heads are read together
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("slope", [1.0, 0.25, 0.03])
def test_keys_that_are_not_needed_carry_no_mass(slope: float, count: int) -> None:
    """Brute force, with the worst keys that there can be, behind nearest ones that are drawn."""
    rng, length, tolerance = np.random.default_rng(0), 6000, TOLERANCES["float32"]
    logits = np.full(length, 3.0 * 7.0)
    logits[:count] = rng.standard_normal(count)
    weights = np.exp(logits - slope * np.arange(length))
    known = weights[:count].sum()  # the bound's denominator
    needed = partial(keys_needed_after, math.log(known), count=count, **FACTS)
    here = math.ceil(needed(3.0, 7.0, slope, allowed_mass=tolerance))
    assert count < here < length
    assert 0 < weights[here:].sum() / known <= tolerance
    assert weights[here - 2 :].sum() / known > tolerance
    for wrong in (-slope, 0.0, math.nan):
        assert needed(3.0, 7.0, wrong, allowed_mass=tolerance) == math.inf
    for reach in (math.nan, math.inf, 1e300):
        assert needed(reach, 1e9, slope, allowed_mass=0.5) == math.inf


@pytest.mark.parametrize(
    ("reach", "slope", "count"), [(3e4, 1.0, 1), (1e-3, 0.5, 4000), (1e-3, 3.0, 4000)]
)
def test_rounding_is_part_of_the_proof(reach: float, slope: float, count: int) -> None:
    """Whatever float32 makes of logits, biases and norms, no fewer keys than without rounding.

    The cases: large products, a long sum, large biases.
    """
    largest, allowed_mass, floor, ulp = 7.0, 2.0**-25, -3.0, FACTS["epsilon"] / 2
    above = reach * largest - floor - math.log1p(-math.exp(-slope))
    exact = (above - math.log(allowed_mass)) / slope
    # Every operation rounds by at most half an epsilon: of 16 products, their sum and its scale;
    # of a bias and its addition; of a sum of `count` terms.
    of_products = (16 + 2) * ulp
    error = of_products * reach * largest + ulp * (2 * slope * count + abs(floor) + count)
    computed = floor + error, reach, largest * (1 - of_products), slope
    given = {**FACTS, "count": count, "allowed_mass": allowed_mass}
    assert keys_needed_after(*computed, **given) >= exact > 1


@pytest.mark.parametrize("is_padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 5, 5), (3, 6, 2), (2, 3, 1)])
def test_it_gives_what_all_keys_give(
    batch: int, heads: int, kv_heads: int, dtype: str, is_padded: bool
) -> None:
    """Against dense attention in float64; one head's slope does not fall, another's hardly."""
    call, largest = _call(batch, heads, kv_heads, dtype)
    if is_padded:
        mask = torch.ones(batch, KEYS, dtype=torch.int64)
        mask[0, :600], mask[-1, 660:690] = 0, 0
        call = dataclasses.replace(call, attention_mask=mask)
    assert nearest.refuses(call) is None
    _assert_like_dense(nearest.attention(call, largest), call, dtype)


def test_what_is_not_needed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is where nothing may be read: in keys beyond the proof, in values of no weight."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    call, largest = _call(1, 4, 4, "float32", slopes=(1.0, 0.3, 0.3, 0.1))
    exact = _dense(call)
    logits = (call.query[0, :, 0, None].double() * call.key[0].double()).sum(-1) * call.scale
    biased = logits + call.slopes.double()[:, None] * torch.arange(1 - KEYS, 1)
    last_weight = (biased.softmax(-1).cumsum(-1) <= 2.0**-25).sum(-1)
    key, value = call.key.clone(), call.value.clone()
    for head, slope in enumerate(call.slopes.tolist()):
        reach = call.scale * call.query[0, head].norm().item()
        bound, floor = largest[0, head].item(), biased[head, -32:].logsumexp(0).item()
        needed = (reach * bound - floor + 25 * math.log(2) - math.log1p(-math.exp(-slope))) / slope
        unread = KEYS - max(32, math.ceil(needed + 1))
        key[0, head, :unread] = math.nan
        if head == 3:
            assert 0 < unread < last_weight[head] - 5
            value[0, head, : last_weight[head] - 5] = math.nan
    assert key.isnan().any(dim=-1).sum(dim=-1).min() > 100
    poisoned = dataclasses.replace(call, key=key, value=value)
    found = nearest.attention(poisoned, largest)
    assert_within(found.numpy(), exact, BUDGETS["float32", "cpu"].forward, "", dtype="float32")


@pytest.mark.parametrize("place", ["query", "newest key", "key", "value"])
def test_a_number_that_is_not_finite_is_seen(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is read; a NaN in a key is in the largest norm too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # no other head reads with it
    call, _ = _call(2, 3, 3, "float32")
    arrays = {"query": call.query, "key": call.key, "value": call.value}
    name, position = place.split()[-1], -1 if place != "key" else 5
    arrays[name] = arrays[name].clone()
    arrays[name][1, 2, position, 0] = math.nan
    broken = dataclasses.replace(call, **arrays)
    found = nearest.attention(broken, broken.key.norm(dim=-1).amax(dim=-1))
    is_nan = found.isnan()
    assert is_nan[1, 2].any()
    assert not is_nan[0].any()
    assert not is_nan[1, :2].any()


@pytest.mark.parametrize("reads", ["eagerly", "in a compiled program"])
def test_a_large_key_long_ago_is_seen(reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a step of a cache, which remembers the largest norm that was read, however it was."""
    call, _ = _call(2, 3, 3, "float32", slopes=(0.9, 0.5, 0.3))
    call.key[:, :, 3] = call.query[:, :, 0] * 200
    config = ALiBiConfig(num_layers=1, d_model=24, num_heads=3)
    cache = KVCache.empty(config, 2, KEYS)
    given: Any = {name: getattr(call, name) for name in ("slopes", "causal", "scale", "distance")}
    given |= {"attention_mask": None, "segment_ids": None}
    found = torch.empty(0)
    for start, end in ((0, 400), (400, KEYS - 1), (KEYS - 1, KEYS)):
        cache = cache.grown(cache.config, (2, end - start), None)
        part = {name: getattr(call, name)[:, :, start:end] for name in ("key", "value")}
        query = call.query.expand(-1, -1, end - start, -1)
        is_compiled = reads != "eagerly" and end < KEYS
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda is_it=is_compiled: is_it)
        found = cache.attend(0, {"query": query, **part, **given}, "dense")
    exact = _dense(call)
    assert np.abs(exact - call.value[:, :, 3:4].numpy()).max() < 1e-6  # all mass is on that key
    _assert_like_dense(found, call, "float32")


CHUNKS = (400, 420, 640, KEYS)  # ends of the chunks that a cache is read in


def _read_in_chunks(
    call: Call, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[int]]:
    """The values that the queries of a cache attend to, and how many keys each chunk was given."""
    config = ALiBiConfig(num_layers=1, d_model=24, num_heads=3)
    cache, mask = KVCache.empty(config, 2, KEYS), call.attention_mask
    names = ("slopes", "causal", "scale", "distance", "segment_ids")
    rest: Any = {name: getattr(call, name) for name in names}
    given, found = [], []

    def attend(**inputs: Any) -> torch.Tensor:
        given.append(inputs["key"].shape[2])
        return attention(**inputs)

    monkeypatch.setattr(alibi_torch.cache, "attention", attend)
    for start, end in itertools.pairwise((0, *CHUNKS)):
        new_mask = None if mask is None else mask[:, start:end]
        cache = cache.grown(cache.config, (2, end - start), new_mask)
        part = {name: getattr(call, name)[:, :, start:end] for name in ("query", "key", "value")}
        inputs = part | rest | {"attention_mask": new_mask}
        found.append(cache.attend(0, inputs, implementation))
    return torch.cat(found, dim=2), given


@pytest.mark.parametrize("is_padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("implementation", ["auto", "dense"])
def test_a_chunk_is_given_the_keys_that_it_needs(
    implementation: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are; a chunk with padding is given all."""
    call, _ = _call(2, 3, 3, "float32", slopes=(0.9, 0.5, 0.3))
    call.key[1, 2, 7] *= 3  # the largest, long ago
    query = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, KEYS, 8))).float()
    call = dataclasses.replace(call, query=query, query_start=0)
    if is_padded:
        mask = torch.ones(2, KEYS, dtype=torch.int64)
        mask[0, :30], mask[1, 410:415], mask[1, -1] = 0, 0, 0
        call = dataclasses.replace(call, attention_mask=mask)
    found, given = _read_in_chunks(call, implementation, monkeypatch)
    _assert_like_dense(found, call, "float32")
    expected, norms = [], call.key.double().norm(dim=-1)
    if is_padded:
        norms[0, :, :30] = 0
    for start, end in itertools.pairwise((0, *CHUNKS)):
        chunk, largest = slice(start, end), norms[:, :, :end].amax(dim=-1).numpy()
        arrays = (query[:, :, chunk].numpy(), call.key[:, :, chunk].numpy(), largest)
        needed = keys_needed(*arrays, call.slopes.numpy(), scale=call.scale)
        first = (np.arange(start + 1, end + 1) - needed).min()
        has_padding = is_padded and end != 640
        reads_all = implementation == "dense" or has_padding
        expected.append(end if reads_all else end - max(0, math.floor(first)))
    assert given == expected
    if implementation == "auto":
        assert given[2] < 300 + 220


@pytest.mark.parametrize("slope", [0.0, -0.1])
def test_a_chunk_is_given_all_keys_where_nothing_is_provable(
    slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, _ = _call(2, 3, 3, "float32", slopes=(0.9, 0.5, slope))
    call = dataclasses.replace(call, query=call.key.flip(2), query_start=0)
    found, given = _read_in_chunks(call, "auto", monkeypatch)
    assert given == [*CHUNKS]
    _assert_like_dense(found, call, "float32")


def test_logits_so_large_that_nothing_is_provable() -> None:
    call, largest = _call(1, 3, 3, "float64")
    call = dataclasses.replace(call, query=call.query * 300)
    _assert_like_dense(nearest.attention(call, largest), call, "float64")


def test_what_it_refuses() -> None:
    call, _ = _call(2, 3, 3, "float32")
    mask = torch.ones(2, KEYS, dtype=torch.bool)
    mask[1, -1] = False
    refused = [
        ({"attention_mask": mask}, "does not see its own key"),
        ({"distance": "bfloat16"}, "distance"),
        ({name: getattr(call, name)[:0] for name in ("query", "key", "value")}, "no query"),
        ({name: getattr(call, name)[:, :, -63:] for name in ("key", "value")}, "few keys"),
        ({"query": call.query.to("meta")}, "stand still"),
    ]
    for change, reason in refused:
        given: Any = change
        assert reason in str(nearest.refuses(dataclasses.replace(call, **given)))


def test_memory_begins_with_a_huge_page() -> None:
    for nbytes in (2**21, 2**21 + 5, 5 * 2**20):
        memory = in_huge_pages(nbytes)
        assert memory.shape == (nbytes,)
        assert memory.ctypes.data % 2**21 == 0
    assert in_huge_pages(0).shape == (0,)
    assert in_huge_pages(12).view(np.float32).shape == (3,)


def _call(
    batch: int, heads: int, kv_heads: int, dtype: str, slopes: tuple[float, ...] = ()
) -> tuple[Call, torch.Tensor]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.standard_normal(shape)).to(getattr(torch, dtype))

    slopes = slopes or (0.9, -0.01, 0.2, 0.001, 0.5, 0.3)[:heads]
    key = draw(batch, kv_heads, KEYS, 8)
    call = Call(
        query=2 * draw(batch, heads, 1, 8),
        key=key,
        value=draw(batch, kv_heads, KEYS, 8),
        slopes=torch.tensor(slopes),
        causal=True,
        scale=0.5,
        query_start=KEYS - 1,
        attention_mask=None,
        segment_ids=None,
        tolerance=0.0,
        distance="absolute",
        dropout=None,
    )
    return call, key.double().norm(dim=-1).amax(dim=-1).float()


def _dense(call: Call) -> np.ndarray:
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value", "slopes")}
    return dense.attention(dataclasses.replace(call, **wide)).numpy()


def _assert_like_dense(found: torch.Tensor, call: Call, dtype: str) -> None:
    assert str(found.dtype) == f"torch.{dtype}"
    budget = BUDGETS[dtype, "cpu"].forward
    assert_within(as_numpy(found), _dense(call), budget, "", dtype=dtype)
