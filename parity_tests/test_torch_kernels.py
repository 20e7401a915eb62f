"""torch's kernels beyond what every implementation is held to: numbers, refusals, choices."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import visible_keys
from alibi_spec.budgets import BUDGETS
from alibi_spec.dropout import is_kept, key_hashes, query_hashes
from alibi_torch.attention import attention_plan
from alibi_torch.kernels import KERNELS
from alibi_torch.kernels.dropout import drawn_dropout
from alibi_torch.kernels.windowed import aten, operator
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.torch_calls import (
    BLOCK,
    call_of,
    draw,
    each_fused,
    each_windowed,
    masks_of,
    slopes_of,
    with_gradients,
)

DROPOUT = drawn_dropout(0.1, None, draw(300, 300)["query"], 0, 300)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in short sequences."""
    monkeypatch.setattr(operator, "BLOCK_SIZE", BLOCK)


@pytest.mark.usefixtures("small_blocks")
@each_windowed
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", ["none", "mask", "segments", "mask and segments"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_len", "key_len"),
    [(4, 4, 150, 150), (4, 2, 37, 90), (6, 1, 1, 70), (4, 4, 101, 155)],
)
def test_gradients_are_dense_attentions(
    implementation: str,
    dropout: float,
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
    arrays, slopes = draw(query_len, key_len, heads, kv_heads), 6 * slopes_of(heads).double()
    options = {"causal": causal, "dropout": dropout, **masks_of(masks, key_len)}
    exact = with_gradients(arrays, slopes, implementation="dense", **options)
    found = with_gradients(arrays, slopes, implementation=implementation, **options)
    exact = {name: exact[name] for name in found}
    assert_gradients_within(found, exact, BUDGETS["float64", "cpu"].gradient, implementation)


@pytest.mark.usefixtures("small_blocks")
@each_windowed
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_dtypes(implementation: str, dropout: float, causal: bool, dtype: str) -> None:
    """Against float64 dense attention of the same numbers."""
    narrow = {name: each.to(getattr(torch, dtype)) for name, each in draw(150, 150).items()}
    wide = {name: each.double() for name, each in narrow.items()}
    options = {"causal": causal, "dropout": dropout, **masks_of("mask", 150)}
    exact = with_gradients(wide, 6 * slopes_of().double(), implementation="dense", **options)
    found = with_gradients(narrow, 6 * slopes_of(), implementation=implementation, **options)
    budget = BUDGETS["float32" if dtype == "float32" else "bfloat16", "cpu"]
    found = {name: array.astype(np.float64) for name, array in found.items()}
    exact = {name: exact[name] for name in found}
    assert_within(found["attended"], exact["attended"], budget.forward, dtype)
    assert_gradients_within(found, exact, budget.gradient, dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize(("heads", "query_len", "rate"), [(3, 70, 0.1), (4, 41, 0.75)])
def test_dropped_probabilities_are_the_specifications(
    implementation: str, heads: int, query_len: int, rate: float
) -> None:
    """The same ones for the same seed, bit for bit."""
    query, key = torch.zeros(2, heads, query_len, 8), torch.zeros(2, 1, 70, 8)
    value = torch.eye(70).expand(2, 1, 70, 70)
    options = {"causal": False, "dropout": rate, "implementation": implementation}
    for state in range(3):
        draws = [torch.Generator().manual_seed(state) for _ in range(2)]
        found = alibi_torch.attention(
            *(query, key, value, torch.zeros(heads)), **options, dropout_rng=draws[0]
        )
        seed = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, generator=draws[1])
        hashes = query_hashes(seed.numpy(), 2, heads, query_len, 70 - query_len)
        assert_bitwise(found.numpy() != 0, is_kept(hashes, key_hashes(70), rate), "kept")


def test_dropout_is_unbiased() -> None:
    """Every element's mean over many seeds lies within 5 deviations of what no dropout gives."""
    arrays, options, seeds, rate = draw(6, 9), {"slopes": slopes_of()}, 500, 0.2
    torch.manual_seed(0)
    total = sum(alibi_torch.attention(**arrays, **options, dropout=rate) for _ in range(seeds))
    logits = alibi_torch.biased_logits(arrays["query"], arrays["key"], slopes_of())
    # Each term p v is kept with probability 1 - rate, and then divided by it.
    variance = rate / (1 - rate) * logits.softmax(dim=-1).square() @ arrays["value"].square()
    error = (total / seeds - alibi_torch.attention(**arrays, **options)).abs()
    assert (error <= 5 * (variance / seeds).sqrt()).all()


@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_shared_keys_are_rounded_once() -> None:
    """What many tiles add to one bfloat16 key is summed in float32."""
    arrays = {name: each.bfloat16() for name, each in draw(600, 600, dtype="float32").items()}
    wide, slopes = {name: each.double() for name, each in arrays.items()}, torch.full((4,), 1e-3)
    exact = with_gradients(wide, slopes.double(), implementation="dense")["value"]
    found = with_gradients(arrays, slopes, implementation="blockwise")["value"]
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


@each_windowed
def test_the_same_bits_twice(implementation: str, dropout: float) -> None:
    arrays = draw(300, 400, dtype="float32")
    options = {"implementation": implementation, "dropout": dropout, **masks_of("mask", 400)}
    first, second = (with_gradients(arrays, slopes_of(), **options) for _ in range(2))
    for name, array in first.items():
        assert_bitwise(second[name], array, name)


@pytest.mark.usefixtures("small_blocks")
@each_fused
@pytest.mark.parametrize("causal", [True, False])
def test_tolerance_bounds_the_change(implementation: str, causal: bool) -> None:
    """Something is dropped, and no output moves by more than twice what may be (SPEC.md §9)."""
    arrays, slopes = draw(400, 400), torch.tensor([2.0, 0.5, 0.2, 0.1])
    options = {"causal": causal, "implementation": implementation}
    exact = as_numpy(alibi_torch.attention(**arrays, slopes=slopes, **options, tolerance=0))
    found = as_numpy(alibi_torch.attention(**arrays, slopes=slopes, **options, tolerance=0.05))
    change = np.abs(found - exact).max()
    assert 1e-6 < change <= 2 * 0.05 * float(arrays["value"].abs().max())


@each_fused
def test_empty_rows_have_finite_gradients(implementation: str) -> None:
    """Zeros for a sequence without keys, and gradients of its inputs that are zeros too."""
    arrays = draw(200, 200)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0] = False
    found = with_gradients(arrays, slopes_of(), implementation=implementation, attention_mask=mask)
    for name in ("attended", *arrays):
        assert_bitwise(np.abs(found[name][0]), np.zeros_like(found[name][0]), name)
        assert np.isfinite(found[name]).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ["dense", "aten_flash", "blockwise"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", ["none", "mask", "segments", "mask and segments"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_hidden_changes_nothing(
    implementation: str, causal: bool, masks: str, poison: float
) -> None:
    options = {"causal": causal, "implementation": implementation, **masks_of(masks, 90)}
    _assert_seen_alone(alibi_torch.attention, poison, options)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ["dense", "aten_flash", "blockwise"])
def test_nor_with_shared_keys(implementation: str) -> None:
    options = {"implementation": implementation, **masks_of("mask", 90)}
    for kv_heads in (1, 2):
        _assert_seen_alone(alibi_torch.attention, np.nan, options, kv_heads)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_nor_where_data_cannot_be_looked_at(implementation: str) -> None:
    options = {"implementation": implementation, **masks_of("segments", 90)}
    compiled = torch.compile(alibi_torch.attention, fullgraph=True, backend="aot_eager")
    _assert_seen_alone(compiled, np.nan, options)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ["dense", "aten_flash", "blockwise"])
def test_large_logits(implementation: str) -> None:
    """Past what float16 holds they are right; past what float32 holds, empty rows still are."""
    arrays = {name: 40 * each.half() for name, each in draw(150, 150, dtype="float32").items()}
    wide, slopes = {name: each.double() for name, each in arrays.items()}, -6 * slopes_of()
    options = {"scale": 30.0, **masks_of("mask", 150)}
    exact = with_gradients(wide, slopes.double(), implementation="dense", **options)
    found = with_gradients(arrays, slopes, implementation=implementation, **options)
    found = {name: found[name].astype(np.float64) for name in ("attended", *arrays)}
    exact = {name: exact[name] for name in found}
    assert_gradients_within(found, exact, BUDGETS["bfloat16", "cpu"].gradient, "beyond float16")
    options["scale"] = 1e36
    found = with_gradients(arrays, slopes, implementation=implementation, **options)
    for name in ("attended", "query"):
        empty = found[name][0, :, :50]
        assert_bitwise(np.abs(empty), np.zeros_like(empty), f"{name} of empty rows")


def test_slopes_that_are_not_finite_are_refused() -> None:
    arrays = draw(3, 3)
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            alibi_torch.attention(**arrays, slopes=slopes_of() * number)
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            attention_plan(arrays["query"], arrays["key"], slopes_of() * number)


def _assert_seen_alone(
    attention: Any, poison: float, options: dict[str, Any], kv_heads: int = 4
) -> None:
    """NaN or infinity makes NaN of the queries that see it; others and gradients do not change."""
    in_numpy = {
        name: as_numpy(each) if isinstance(each, torch.Tensor) else each
        for name, each in options.items()
        if name != "implementation"
    }
    visible = visible_keys(37, 90, **{"causal": True, **in_numpy})
    visible = np.broadcast_to(visible, (2, 4, 37, 90))
    is_broken = visible[..., [7, 61]].any(axis=-1)
    is_broken[:, :, 20] |= visible[:, :, 20].any(axis=-1)
    found = []
    for number in (0.0, poison):
        leaves = draw(37, 90, kv_heads=kv_heads)
        for name, position in {"key": 7, "value": 61, "query": 20}.items():
            leaves[name][:, :, position, 1] = number
        for each in leaves.values():
            each.requires_grad_()
        attended = attention(**leaves, slopes=slopes_of(), **options)
        total = attended[torch.from_numpy(~is_broken)].square().sum()
        found.append([as_numpy(attended.detach())])
        found[-1] += [as_numpy(each) for each in torch.autograd.grad(total, [*leaves.values()])]
    (clean, *clean_gradients), (dirty, *gradients) = found
    assert np.isnan(dirty[is_broken]).all()
    budget = BUDGETS["float64", "cpu"]
    assert_within(dirty[~is_broken], clean[~is_broken], budget.forward, "attended")
    for ours, exact in zip(gradients, clean_gradients, strict=True):
        assert_within(ours, exact, budget.gradient, "gradient")


@pytest.mark.parametrize(
    ("implementation", "changes", "reason"),
    [
        ("aten_flash", {"value": torch.zeros(2, 4, 300, 3)}, "value width 3 differs from head_dim"),
        ("aten_flash", {"slopes": slopes_of().requires_grad_()}, "no gradient for the slopes"),
        ("aten_flash", {"dropout": DROPOUT}, "no dropout"),
        ("blockwise", {"distance": "bfloat16"}, "no rounded bias"),
        ("blockwise", {"distance": "signed", "causal": False}, "no bias that rewards later keys"),
        ("flex", {}, "gradients only on CUDA, and the query is on cpu"),
        ("flash_attn", {}, "runs on CUDA, and the query is on cpu"),
    ],
)
def test_refusals(implementation: str, changes: dict[str, Any], reason: str) -> None:
    call = call_of(**changes)
    assert reason in str(KERNELS[implementation].refuses(call))
    assert KERNELS["dense"].refuses(call) is None
    rate = 0.0 if call.dropout is None else call.dropout.rate
    options = {**vars(call), "implementation": implementation, "dropout": rate}
    del options["query_start"]
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
    short, long = draw(20, 20, dtype="float32"), draw(300, 300, dtype="float32")
    alibi_torch.attention(**short, slopes=slopes_of())
    alibi_torch.attention(**long, slopes=slopes_of())
    alibi_torch.attention(**long, slopes=slopes_of().requires_grad_())
    alibi_torch.attention(**long, slopes=slopes_of(), distance="signed", causal=False)
    alibi_torch.attention(**long, slopes=slopes_of(), dropout=0.1)
    monkeypatch.setattr(aten, "_is_available", lambda: False)
    alibi_torch.attention(**long, slopes=slopes_of())
    assert chosen == ["dense", "aten_flash", "blockwise", "dense", "blockwise", "blockwise"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"distance": "bfloat16"}, "no rounded bias"),
        ({"distance": "signed", "causal": False}, "no bias that rewards later keys"),
    ],
)
def test_dense_dropout_of_long_sequences_warns(options: dict[str, Any], reason: str) -> None:
    """Unless it is asked for by name."""
    long = {**draw(300, 300, dtype="float32"), "slopes": slopes_of(), "dropout": 0.1}
    with pytest.warns(UserWarning, match=f"computed whole.*{reason}.*distance='absolute'"):
        alibi_torch.attention(**long, **options)
    alibi_torch.attention(**long, **options, implementation="dense")


@pytest.mark.parametrize("broken", ["missing", "other arguments", "wrong numbers"])
def test_the_fused_operators_are_tried_first(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """They are no public API: gone or changed, they are not used."""
    assert aten._agrees_with_plain_torch()
    real = getattr(torch.ops.aten, aten._FORWARD)

    def changed(*arguments: Any, **options: Any) -> Any:
        if broken == "other arguments":
            raise TypeError("unexpected keyword argument")
        attended, log_total = real(*arguments, **options)
        return attended, log_total.exp()

    if broken == "missing":
        monkeypatch.setattr(aten, "_FORWARD", "_no_such_operator")
    else:
        monkeypatch.setattr(torch.ops.aten, aten._FORWARD, changed)
    assert not aten._agrees_with_plain_torch()
