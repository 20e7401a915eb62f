"""torch's kernels beyond what every implementation is held to: certificates, tiles, transforms."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import alibi_spec
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import windows as spec
from alibi_spec.budgets import BUDGETS
from alibi_torch.attention import attention_plan
from alibi_torch.kernels import KERNELS, aten_flash, flex, runs, windowed, workers
from alibi_torch.kernels.call import Call, default_scale
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within

BLOCK, WIDTH = 16, 8
each_fused = pytest.mark.parametrize("implementation", ["aten_flash", "blockwise"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in short sequences."""
    monkeypatch.setattr(windowed, "BLOCK_SIZE", BLOCK)


def _draw(
    query_len: int,
    key_len: int,
    heads: int = 4,
    kv_heads: int = 4,
    dtype: str = "float64",
    width: int = WIDTH,
) -> dict[str, torch.Tensor]:
    """query, key, value [2, heads, seq, width]."""
    rng = np.random.default_rng(0)
    shapes = {"query": (heads, query_len), "key": (kv_heads, key_len), "value": (kv_heads, key_len)}
    return {
        name: as_torch(rng.standard_normal((2, *shape, width)).astype(dtype))
        for name, shape in shapes.items()
    }


def _slopes(heads: int = 4) -> torch.Tensor:
    return as_torch(alibi_spec.slopes(heads))


def _masks(kind: str, key_len: int) -> dict[str, torch.Tensor]:
    """Padding on both sides with gaps, an empty sequence's worth of it, and packed segments."""
    rng, masks = np.random.default_rng(1), {}
    if "mask" in kind:
        mask = rng.random((2, key_len)) < 0.9
        mask[0, : key_len // 3] = False
        mask[1, -key_len // 4 :] = False
        masks["attention_mask"] = torch.from_numpy(mask)
    if "segments" in kind:
        masks["segment_ids"] = torch.from_numpy(np.sort(rng.integers(0, 4, (2, key_len))))
    return masks


def _with_gradients(
    arrays: dict[str, torch.Tensor], slopes: torch.Tensor, **options: Any
) -> dict[str, np.ndarray]:
    """Attended values and the gradients of a fixed sum of them, in NumPy.

    The gradient of the slopes is among them where every device has one.
    """
    leaves = {name: array.clone().requires_grad_() for name, array in arrays.items()}
    if options["implementation"] in ("dense", "blockwise"):
        leaves["slopes"] = slopes.clone().requires_grad_()
    attended = alibi_torch.attention(**{"slopes": slopes, **leaves}, **options)
    rng = np.random.default_rng(2)
    cotangent = as_torch(rng.standard_normal(attended.shape)).to(attended)
    gradients = torch.autograd.grad(attended, list(leaves.values()), cotangent)
    named = dict(zip(leaves, gradients, strict=True)) | {"attended": attended}
    return {name: as_numpy(array.detach().cpu()) for name, array in named.items()}


@pytest.mark.usefixtures("small_blocks")
@each_fused
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", ["none", "mask", "segments", "mask and segments"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_len", "key_len"),
    [(4, 4, 150, 150), (4, 2, 37, 90), (6, 1, 1, 70), (4, 4, 101, 155)],
)
def test_gradients_are_dense_attentions(
    implementation: str,
    causal: bool,
    masks: str,
    heads: int,
    kv_heads: int,
    query_len: int,
    key_len: int,
) -> None:
    """In float64, where nothing is rounded away, for every input and the slopes.

    Slopes are steep enough for windows that slide along, some wider than all their blocks.
    """
    arrays, slopes = _draw(query_len, key_len, heads, kv_heads), 6 * _slopes(heads).double()
    options = {"causal": causal, **_masks(masks, key_len)}
    exact = _with_gradients(arrays, slopes, implementation="dense", **options)
    found = _with_gradients(arrays, slopes, implementation=implementation, **options)
    exact = {name: exact[name] for name in found}
    assert_gradients_within(found, exact, BUDGETS["float64", "cpu"].gradient, implementation)


@pytest.mark.usefixtures("small_blocks")
@each_fused
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_dtypes(implementation: str, causal: bool, dtype: str) -> None:
    """Against float64 dense attention of the same numbers."""
    narrow = {name: each.to(getattr(torch, dtype)) for name, each in _draw(150, 150).items()}
    wide = {name: each.double() for name, each in narrow.items()}
    options = {"causal": causal, **_masks("mask", 150)}
    exact = _with_gradients(wide, 6 * _slopes().double(), implementation="dense", **options)
    found = _with_gradients(narrow, 6 * _slopes(), implementation=implementation, **options)
    budget = BUDGETS["float32" if dtype == "float32" else "bfloat16", "cpu"]
    found = {name: array.astype(np.float64) for name, array in found.items()}
    exact = {name: exact[name] for name in found}
    assert_within(found["attended"], exact["attended"], budget.forward, dtype)
    assert_gradients_within(found, exact, budget.gradient, dtype)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_shared_keys_are_rounded_once() -> None:
    """What many tiles add to one bfloat16 key is summed in float32."""
    arrays = {name: each.bfloat16() for name, each in _draw(600, 600, dtype="float32").items()}
    wide, slopes = {name: each.double() for name, each in arrays.items()}, torch.full((4,), 1e-3)
    exact = _with_gradients(wide, slopes.double(), implementation="dense")["value"]
    found = _with_gradients(arrays, slopes, implementation="blockwise")["value"]
    half_ulp = float(ml_dtypes.finfo("bfloat16").eps) / 2
    assert_within(found.astype(np.float64), exact, half_ulp, "values")


@each_fused
def test_long_sequences_keep_their_precision(implementation: str) -> None:
    """The bias is as exact far from the beginning as near it: no worse than dense attention."""
    rng = np.random.default_rng(3)
    arrays = [as_torch(rng.standard_normal((1, 2, 3000, 32)).astype(np.float32)) for _ in range(3)]
    slopes = torch.tensor([0.3, 0.011])
    wide = [array.double() for array in arrays]
    exact = as_numpy(alibi_torch.attention(*wide, slopes, implementation="dense"))
    errors = [
        np.abs(as_numpy(alibi_torch.attention(*arrays, slopes, implementation=name)) - exact).max()
        for name in (implementation, "dense")
    ]
    assert errors[0] <= 2 * errors[1]


@each_fused
def test_the_same_bits_twice(implementation: str) -> None:
    arrays = _draw(300, 400, dtype="float32")
    first, second = (
        _with_gradients(arrays, _slopes(), implementation=implementation, **_masks("mask", 400))
        for _ in range(2)
    )
    for name, array in first.items():
        assert_bitwise(second[name], array, name)


@pytest.mark.usefixtures("small_blocks")
@each_fused
@pytest.mark.parametrize("causal", [True, False])
def test_tolerance_bounds_the_change(implementation: str, causal: bool) -> None:
    """Something is dropped, and no output moves by more than twice what may be (SPEC.md §9)."""
    arrays, slopes = _draw(400, 400), torch.tensor([2.0, 0.5, 0.2, 0.1])
    options = {"causal": causal, "implementation": implementation}
    exact = as_numpy(alibi_torch.attention(**arrays, slopes=slopes, **options, tolerance=0))
    found = as_numpy(alibi_torch.attention(**arrays, slopes=slopes, **options, tolerance=0.05))
    change = np.abs(found - exact).max()
    assert 1e-6 < change <= 2 * 0.05 * float(arrays["value"].abs().max())


@each_fused
def test_empty_rows_have_finite_gradients(implementation: str) -> None:
    """Zeros for a sequence without keys, and gradients of its inputs that are zeros too."""
    arrays = _draw(200, 200)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0] = False
    found = _with_gradients(arrays, _slopes(), implementation=implementation, attention_mask=mask)
    for name in ("attended", *arrays):
        assert_bitwise(np.abs(found[name][0]), np.zeros_like(found[name][0]), name)
        assert np.isfinite(found[name]).all()


# Windows and tiles


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
    """No row loses more than the tolerance; in float64 the ranges are the same."""
    arrays = _draw(query_len, 130, 4, kv_heads)
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
    options = {"causal": causal, **_masks(masks, 130)}
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
    query, key, _ = _draw(130, 130).values()
    spoiled = key.clone()
    spoiled[:, :, 0] = torch.nan
    for slopes, keys in ((-_slopes(), key), (_slopes() * torch.nan, key), (_slopes(), spoiled)):
        assert (attention_plan(query, keys, slopes).share == 1).all()


def test_bad_plans_say_why() -> None:
    query, key, _ = _draw(4, 9).values()
    with pytest.raises(ValueError, match="key does not fit query"):
        attention_plan(query, key[..., :3], _slopes())
    with pytest.raises(ValueError, match="tolerance=2 is not valid"):
        attention_plan(query, key, _slopes(), tolerance=2)


@settings(max_examples=200, deadline=None)
@given(
    query_len=st.integers(1, 150),
    offset=st.integers(0, 60),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4)]),
    shape=st.sampled_from(["random", "sliding", "from the first key"]),
    limit=st.sampled_from([1, 2**9, 2**23]),
    seed=st.integers(0, 2**16),
)
def test_runs_cover_every_window_once(
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
        patch.setattr(runs, "_RUN_ELEMENTS", limit)
        found = runs.runs_of(
            *(torch.from_numpy(np.stack(windows)), query_len, key_len, BLOCK),
            group=group,
            key_elements=1,
        )
    for run in found:
        assert group == 1 or run.heads.start // group == (run.heads.stop - 1) // group
        for tile in range(run.tiles):
            start, row = run.start + tile * run.rows, run.row + tile * run.rows
            covered[run.heads, row : row + run.rows] += 1
            assert 0 <= start <= start + run.width <= key_len
            for block in range(row // BLOCK, -(-(row + run.rows) // BLOCK)):
                first, last = (each[run.heads, block] for each in windows)
                has_keys = first < last
                assert (start <= first[has_keys]).all()
                assert (last[has_keys] <= start + run.width).all()
    row_has_keys = np.repeat(windows[0] < windows[1], BLOCK, axis=1)[:, :query_len]
    assert (covered[row_has_keys] == 1).all()
    assert (covered <= 1).all()


def _runs(seq: int, heads: int) -> list[runs.Run]:
    """The runs of the first so many of eight heads, for normal numbers."""
    array = torch.randn(1, heads, seq, 16, generator=torch.Generator().manual_seed(0))
    options = {"causal": True, "scale": 0.25, "tolerance": 2**-24, "block_size": 128}
    windows = runs.windows_of(array, array, _slopes(8)[:heads], None, None, **options)
    return runs.runs_of(windows, seq, seq, 128, group=1, key_elements=128)


def test_work_grows_linearly() -> None:
    """Four times the sequence, four times the products."""
    short, long = (sum(run.products for run in _runs(seq, 4)) for seq in (4096, 16_384))
    assert long < 4.4 * short


def test_calls_are_few() -> None:
    """Tiles slide along in one call, grow tall near the beginning, and are shared by heads."""
    found = _runs(16_384, 8)
    assert len(found) <= 130
    assert max(run.products for run in found) <= 2**21
    assert [run.products for run in found] == sorted((run.products for run in found), reverse=True)


# Refusals and choices


def _call(**changes: Any) -> Call:
    arrays: dict[str, Any] = {**_draw(300, 300, dtype="float32"), "slopes": _slopes()}
    options = {"attention_mask": None, "segment_ids": None, "dropout_rng": None, "dropout": 0.0}
    shared = {"causal": True, "scale": default_scale(None, WIDTH), "distance": "absolute"}
    return Call(**(arrays | options | shared | {"tolerance": "dtype"} | changes))


@pytest.mark.parametrize(
    ("implementation", "changes", "reason"),
    [
        ("aten_flash", {"value": torch.zeros(2, 4, 300, 3)}, "value width 3 differs from head_dim"),
        ("aten_flash", {"slopes": _slopes().requires_grad_()}, "no gradient for the slopes"),
        ("aten_flash", {"dropout": 0.1}, "no dropout"),
        ("blockwise", {"dropout": 0.1}, "no dropout"),
        ("blockwise", {"distance": "bfloat16"}, "no rounded bias"),
        ("blockwise", {"distance": "signed", "causal": False}, "no bias that rewards later keys"),
        ("flex", {}, "gradients on CUDA alone, and the query is on cpu"),
        ("flash_attn", {}, "runs on CUDA, and the query is on cpu"),
    ],
)
def test_refusals(implementation: str, changes: dict[str, Any], reason: str) -> None:
    call = _call(**changes)
    assert reason in str(KERNELS[implementation].refuses(call))
    assert KERNELS["dense"].refuses(call) is None
    options = {**vars(call), "implementation": implementation}
    with pytest.raises(
        ValueError, match=rf"'{implementation}' cannot .*{reason}.* expected one of"
    ):
        alibi_torch.attention(**options)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short: dense. Long: the fused CPU kernel, or without it (or for learned slopes) blockwise."""
    chosen = []
    for name, kernel in KERNELS.items():
        run = lambda call, name=name, run=kernel.run: (chosen.append(name), run(call))[1]  # noqa: E731
        monkeypatch.setitem(KERNELS, name, type(kernel)(run, kernel.refuses))
    short, long = _draw(20, 20, dtype="float32"), _draw(300, 300, dtype="float32")
    alibi_torch.attention(**short, slopes=_slopes())
    alibi_torch.attention(**long, slopes=_slopes())
    alibi_torch.attention(**long, slopes=_slopes().requires_grad_())
    alibi_torch.attention(**long, slopes=_slopes(), distance="signed", causal=False)
    monkeypatch.setattr(aten_flash, "_IS_AVAILABLE", False)
    alibi_torch.attention(**long, slopes=_slopes())
    assert chosen == ["dense", "aten_flash", "blockwise", "dense", "blockwise"]


@pytest.mark.parametrize("broken", ["missing", "other arguments", "wrong numbers"])
def test_the_fused_operators_are_tried_first(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """They are no public API: gone or changed, they are not used."""
    assert aten_flash._agrees_with_plain_torch()
    real = getattr(torch.ops.aten, aten_flash._FORWARD)

    def changed(*arguments: Any, **options: Any) -> Any:
        if broken == "other arguments":
            raise TypeError("unexpected keyword argument")
        attended, log_total = real(*arguments, **options)
        return attended, log_total.exp()

    if broken == "missing":
        monkeypatch.setattr(aten_flash, "_FORWARD", "_no_such_operator")
    else:
        monkeypatch.setattr(torch.ops.aten, aten_flash._FORWARD, changed)
    assert not aten_flash._agrees_with_plain_torch()


# Threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More than one, whatever the machine and however the tests are run."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@each_fused
def test_bits_do_not_depend_on_threads(implementation: str) -> None:
    """Nor on autocast or inference mode, which are settings of the thread that calls."""
    arrays, options = _draw(700, 700, dtype="float32"), {"implementation": implementation}
    shared = _with_gradients(arrays, _slopes(), **options, **_masks("mask", 700))
    torch.set_num_threads(1)
    alone = _with_gradients(arrays, _slopes(), **options, **_masks("mask", 700))
    torch.set_num_threads(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _with_gradients(arrays, _slopes(), **options, **_masks("mask", 700))
    for name, array in alone.items():
        assert_bitwise(shared[name], array, name)
        assert_bitwise(cast[name], array, f"{name} under autocast")
    with torch.inference_mode():
        views = {name: each.clone() for name, each in arrays.items()}
        found = alibi_torch.attention(
            **views, slopes=_slopes(), **options, **_masks("mask", 700)
        ).numpy()
    assert_bitwise(found, alone["attended"], "inference")


@pytest.mark.usefixtures("three_threads")
def test_threads_of_others_keep_their_number() -> None:
    """Workers compute with one thread each, and nobody else does."""
    workers._teams.clear()
    seen: list[int] = []

    def record(device: torch.device) -> None:
        results = workers.with_workers(
            device,
            lambda each: list(each(lambda item: (item, torch.get_num_threads()), range(40))),
        )
        assert [item for item, _ in results] == [item for _, (item, _) in results] == [*range(40)]
        seen.extend(count for _, (_, count) in results)

    record(torch.device("cpu"))
    assert set(seen) == {1}
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert [seen[-1], torch.get_num_threads()] == [3, 3]


@pytest.mark.usefixtures("three_threads")
def test_faults_in_workers_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room for a tile")

    monkeypatch.setattr(aten_flash, "forward", broken)
    with pytest.raises(MemoryError, match="no room for a tile"):
        alibi_torch.attention(**_draw(300, 300, dtype="float32"), slopes=_slopes())


@pytest.mark.usefixtures("three_threads")
def test_many_callers_at_once() -> None:
    """More than there are workers: none waits for another for ever."""
    arrays = _draw(300, 300, dtype="float32")
    expected = as_numpy(alibi_torch.attention(**arrays, slopes=_slopes()))
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(alibi_torch.attention, **arrays, slopes=_slopes()) for _ in range(40)]
        for call in calls:
            assert_bitwise(as_numpy(call.result(timeout=60)), expected, "attended")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes_have_their_own_workers() -> None:
    """As those of a DataLoader: they inherit no thread of their parent."""
    code = """
        import os, torch, alibi_torch
        torch.set_num_threads(2)
        array = torch.ones(1, 2, 300, 8)
        attend = lambda: alibi_torch.attention(
            array, array, array, torch.ones(2), implementation="blockwise"
        )
        before = attend()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attend(), before) else 3)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, timeout=120)


# What torch does to functions


SLOPES = _slopes()


def _loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    return alibi_torch.attention(query, key, value, SLOPES, **options).square().mean()


@each_fused
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiles_into_one_graph(implementation: str) -> None:
    arrays = [each.requires_grad_() for each in _draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation, **_masks("mask", 300)}
    exact = torch.autograd.grad(_loss(*arrays, **options), arrays)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*arrays, **options), arrays)
    for ours, theirs in zip(found, exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")


@each_fused
def test_per_sample_gradients(implementation: str) -> None:
    """vmap over grad, and vmap alone."""
    arrays = [each[:, None] for each in _draw(300, 300, dtype="float32").values()]

    def loss(*arrays: torch.Tensor) -> torch.Tensor:
        return _loss(*arrays, implementation=implementation)

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*arrays)
    for index in range(2):
        expected = torch.func.grad(loss, argnums=(0, 1, 2))(*(each[index] for each in arrays))
        for ours, theirs in zip(found, expected, strict=True):
            assert_bitwise(as_numpy(ours[index]), as_numpy(theirs), f"sample {index}")
    shared = torch.func.vmap(loss, in_dims=(0, None, None))(arrays[0], arrays[1][0], arrays[2][0])
    assert_bitwise(as_numpy(shared[0]), as_numpy(loss(*(each[0] for each in arrays))), "shared")


@each_fused
def test_checkpointing_changes_nothing(implementation: str) -> None:
    arrays = [each.requires_grad_() for each in _draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation}
    exact = torch.autograd.grad(_loss(*arrays, **options), arrays)
    loss = checkpoint(_loss, *arrays, use_reentrant=False, **options)
    for ours, theirs in zip(torch.autograd.grad(loss, arrays), exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")
    with torch.no_grad():
        assert not _loss(*arrays, **options).requires_grad


@each_fused
def test_no_second_derivative(implementation: str) -> None:
    arrays = [each.requires_grad_() for each in _draw(300, 300).values()]
    loss = _loss(*arrays, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, arrays[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use implementation='dense'"):
        torch.autograd.grad(gradient.square().sum(), arrays)


@each_fused
def test_autocast_does_not_narrow(implementation: str) -> None:
    arrays = _draw(300, 300, dtype="float32")
    plain = _with_gradients(arrays, _slopes(), implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _with_gradients(arrays, _slopes(), implementation=implementation)
    for name, array in plain.items():
        assert_bitwise(inside[name], array, name)


def test_shapes_alone_on_the_meta_device() -> None:
    arrays = {name: each.to("meta") for name, each in _draw(300, 400).items()}
    attended = alibi_torch.attention(**arrays, slopes=_slopes().to("meta"))
    assert attended.shape == (2, 4, 300, WIDTH)
    assert attended.device.type == "meta"


@each_fused
def test_strides_do_not_matter(implementation: str) -> None:
    """Heads split by a view, as in the model; and columns that are not adjacent."""
    arrays = _draw(300, 300)
    exact = _with_gradients(arrays, _slopes(), implementation=implementation)
    views = {
        name: each.transpose(1, 2).contiguous().transpose(1, 2) for name, each in arrays.items()
    }
    columns = {name: each.mT.contiguous().mT for name, each in arrays.items()}
    for moved in (views, columns):
        options = {"slopes": _slopes(), "implementation": implementation}
        found = as_numpy(alibi_torch.attention(**moved, **options))
        assert_within(found, exact["attended"], BUDGETS["float64", "cpu"].forward, "views")


# FlexAttention: its parts on any machine, the whole where there is a GPU


@pytest.mark.parametrize("masks", ["none", "mask", "segments"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_len", "key_len"), [(300, 300), (200, 333), (1, 130)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on purpose
def test_flex_attention_unfused(causal: bool, masks: str, query_len: int, key_len: int) -> None:
    """Score modification and mask give dense attention's numbers."""
    arrays, options = _draw(query_len, key_len, dtype="float32"), _masks(masks, key_len)
    call = _call(**arrays, causal=causal, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on older versions
        found = flex.flex_attention(
            *arrays.values(), score_mod=flex.bias_of(call), block_mask=flex.block_mask_of(call)
        )
    exact = alibi_torch.attention(
        **{name: each.double() for name, each in arrays.items()},
        slopes=_slopes(),
        causal=causal,
        implementation="dense",
        **options,
    )
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(as_numpy(found), as_numpy(exact), limit, "flex")


@pytest.mark.parametrize("masks", ["none", "mask"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_len", "key_len"), [(700, 700), (300, 633)])
def test_flex_block_mask_is_the_plan(
    causal: bool, masks: str, query_len: int, key_len: int
) -> None:
    """Its blocks are the plan's, and where it does not ask the mask, every query sees every key."""
    options = _masks(masks, key_len)
    slopes = torch.tensor([2.0, 0.5, 0.2, 0.01])
    call = _call(
        **_draw(query_len, key_len, dtype="float32"), slopes=slopes, causal=causal, **options
    )
    plan = attention_plan(call.query, call.key, slopes, causal=causal, **options)
    mask = flex.block_mask_of(call)
    block = torch.arange(-(-key_len // 128))
    expected = (block >= plan.first[..., None]) & (block < plan.last[..., None])
    assert torch.equal(mask.to_dense().bool(), expected)
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
    drawn = _draw(query_len, 1000, 4, kv_heads, width=64)
    narrow = {name: each.cuda().to(getattr(torch, dtype)) for name, each in drawn.items()}
    options: dict[str, Any] = {"slopes": _slopes().cuda(), "causal": causal}
    options |= {name: each.cuda() for name, each in _masks(masks, 1000).items()}
    reason = KERNELS[implementation].refuses(_call(**narrow, **options))
    if reason is not None:
        pytest.skip(reason)
    exact, found = (
        _with_gradients(arrays, implementation=name, **options)
        for name, arrays in (
            ("dense", {name: each.double() for name, each in narrow.items()}),
            (implementation, narrow),
        )
    )
    budget = BUDGETS["float32" if dtype == "float32" else "bfloat16", "gpu"]
    found = {name: found[name].astype(np.float64) for name in ("attended", *drawn)}
    exact = {name: exact[name] for name in found}
    assert_within(found["attended"], exact["attended"], budget.forward, dtype)
    assert_gradients_within(found, exact, budget.gradient, dtype)
