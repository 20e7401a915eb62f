"""The numbers of both backends' kernels and their gradients; dense attention is the judge.

Kernels for TPUs and GPUs are interpreted. What kernels cannot say of a call, they refuse:
test_kernel_choice.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_flax.dispatch import attention_plan
from alibi_spec import visible_keys
from alibi_spec.budgets import BUDGETS
from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.dropout import is_kept, key_hashes, query_hashes
from alibi_spec.reference import biased_logits, masked_softmax
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.kernel_calls import (
    ATEN_FLASH,
    FLAX_BLOCKWISE,
    FLAX_DENSE,
    FUSED,
    PALLAS_GPU,
    PALLAS_TPU,
    SCALE,
    TORCH_BLOCKWISE,
    TORCH_DENSE,
    WIDE,
    Arrays,
    FlaxKernel,
    Kernel,
    TorchKernel,
    draw,
    dtypes_of,
    each_kernel,
    id_of,
    masks_of,
    widened,
)

FLOAT64 = BUDGETS["float64", "cpu"]
MASKS = ("none", "mask", "segments", "mask and segments")
SHAPES = {  # heads, heads of keys, queries, keys
    "square": (4, 4, 150, 150),
    "grouped": (4, 2, 37, 90),
    "one query": (6, 1, 1, 70),
    "fewer queries": (4, 4, 101, 155),
    "one key head": (4, 1, 150, 150),
    "long": (4, 2, 280, 300),  # some blocks of 128
}


def _drawn(kernel: Kernel, shape: str, dtype: str = "float64") -> Arrays:
    heads, kv_heads, query_len, key_len = SHAPES[shape]
    return draw(query_len, key_len, heads, kv_heads, kernel.value_width, dtype)


def _options(shape: str, masks: str, **options: Any) -> dict[str, Any]:
    return masks_of(masks, SHAPES[shape][3]) | options


@cache
def _judged(shape: str, value_width: int, masks: str, causal: bool) -> Arrays:
    """By torch's dense attention, for the kernels of both backends."""
    kernel = TORCH_DENSE if value_width == WIDE else ATEN_FLASH
    options = _options(shape, masks, causal=causal)
    return TORCH_DENSE.differentiate(**options)(_drawn(kernel, shape))


@pytest.mark.parametrize(
    ("kernel", "dropout", "shape", "masks", "causal"),
    [
        (kernel, dropout, shape, masks, causal)
        for kernel, dropout in ((ATEN_FLASH, 0.0), (TORCH_BLOCKWISE, 0.0), (TORCH_BLOCKWISE, 0.3))
        for shape in ("square", "grouped", "one query", "fewer queries")
        for masks in MASKS
        for causal in (True, False)
    ]
    + [
        (FLAX_BLOCKWISE, 0.0, "square", "none", False),
        (FLAX_BLOCKWISE, 0.0, "one query", "none", True),
        (FLAX_BLOCKWISE, 0.0, "one key head", "none", True),
        (FLAX_BLOCKWISE, 0.0, "grouped", "mask", True),
        (FLAX_BLOCKWISE, 0.0, "long", "mask and segments", False),
        (FLAX_BLOCKWISE, 0.3, "long", "mask and segments", True),
        *(  # also in narrow dtypes, below
            pytest.param(
                *(FLAX_BLOCKWISE, dropout, "long", "mask and segments", causal),
                marks=pytest.mark.slow,
            )
            for dropout, causal in ((0.0, True), (0.3, False))
        ),
    ],
    ids=id_of,
)
def test_float64(kernel: Kernel, dropout: float, shape: str, masks: str, causal: bool) -> None:
    """Where nothing is rounded away: dense attention's values and every gradient."""
    if dropout:  # what is dropped follows each backend's own generator
        dense = FLAX_DENSE if isinstance(kernel, FlaxKernel) else TORCH_DENSE
        options = _options(shape, masks, causal=causal, dropout=dropout)
        exact = dense.differentiate(**options)(_drawn(kernel, shape))
    else:
        options = _options(shape, masks, causal=causal)
        exact = _judged(shape, kernel.value_width, masks, causal)
    found = kernel.differentiate(**options)(_drawn(kernel, shape))
    exact = {name: exact[name] for name in found}
    assert len(exact) == (4 if kernel is ATEN_FLASH else 5)
    assert_gradients_within(found, exact, FLOAT64.gradient, kernel.name)


@pytest.mark.parametrize(
    ("kernel", "dtype", "shape", "masks", "causal", "dropout"),
    [
        (kernel, dtype, "square", "mask", causal, dropout)
        for kernel, dropout in ((ATEN_FLASH, 0.0), (TORCH_BLOCKWISE, 0.0), (TORCH_BLOCKWISE, 0.3))
        for dtype in ("float32", "bfloat16", "float16")
        for causal in (True, False)
    ]
    + [
        (FLAX_BLOCKWISE, "float32", "long", "mask and segments", True, 0.0),
        (FLAX_BLOCKWISE, "bfloat16", "long", "mask and segments", False, 0.3),
        (PALLAS_GPU, "float32", "long", "mask and segments", True, 0.3),
        pytest.param(
            *(PALLAS_TPU, "float32", "long", "mask and segments", True, 0.3),
            marks=pytest.mark.slow,
        ),
        *(
            case
            for kernel in (PALLAS_TPU, PALLAS_GPU)
            for case in (
                pytest.param(
                    *(kernel, "float32", "long", "mask and segments", False, 0.0),
                    marks=pytest.mark.slow,
                ),
                pytest.param(
                    *(kernel, "bfloat16", "one key head", "none", True, 0.3),
                    marks=pytest.mark.slow,
                ),
            )
        ),
    ],
    ids=id_of,
)
def test_narrow_dtypes(
    kernel: Kernel, dtype: str, shape: str, masks: str, causal: bool, dropout: float
) -> None:
    """Within the budget of dense attention in float64, on the same rounded inputs."""
    arrays = _drawn(kernel, shape, dtype)
    options = _options(shape, masks, causal=causal, dropout=dropout)
    dense = FLAX_DENSE if isinstance(kernel, FlaxKernel) else TORCH_DENSE
    exact = dense.differentiate(**options)(widened(arrays))
    found = kernel.differentiate(**options)(arrays)
    budget = BUDGETS[dtype, "cpu"]
    attended, expected = found.pop("attended"), exact.pop("attended")
    assert_within(attended, expected, budget.forward, dtype, dtype=dtype)
    exact = {name: exact[name] for name in found}
    assert_gradients_within(found, exact, budget.gradient, dtype, dtype=dtypes_of(arrays))


@each_kernel(TORCH_DENSE, TORCH_BLOCKWISE, FLAX_DENSE, FLAX_BLOCKWISE)
@pytest.mark.parametrize(
    ("state", "heads", "query_len", "rate"), [(0, 3, 70, 0.1), (1, 4, 41, 0.75)]
)
def test_dropped_probabilities_are_the_specifications(
    kernel: Kernel, state: int, heads: int, query_len: int, rate: float
) -> None:
    """The same ones for the same seed, bit for bit."""
    query, key = np.zeros((2, heads, query_len, 8)), np.zeros((2, 1, 70, 8))
    value = np.broadcast_to(np.eye(70), (2, 1, 70, 70))
    is_flax = isinstance(kernel, FlaxKernel)
    rng: Any = jax.random.key(state) if is_flax else torch.Generator().manual_seed(state)
    if is_flax:
        seed = np.asarray(jax.random.bits(rng, (2,), "uint32"))
    else:
        drawn = torch.Generator().manual_seed(state)
        seed = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, generator=drawn).numpy()
    arrays = {"query": query, "key": key, "value": value, "slopes": np.zeros(heads)}
    options = {"causal": False, "dropout": rate, "dropout_rng": rng}
    found = kernel.attend(**options)(arrays)["attended"]
    hashes = query_hashes(seed, 2, heads, query_len, 70 - query_len)
    assert_bitwise(found != 0, is_kept(hashes, key_hashes(70), rate), "kept")


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_dropout_is_unbiased(backend: str) -> None:
    """Every element's mean over many seeds lies within 5 deviations of what no dropout gives."""
    arrays, seeds, rate = draw(6, 9), 500, 0.2
    plain = TORCH_DENSE.attend()(arrays)["attended"]
    if backend == "torch":
        torch.manual_seed(0)
        named = {name: torch.from_numpy(array) for name, array in arrays.items()}
        options = {"scale": SCALE, "dropout": rate}
        total: Any = sum(alibi_torch.attention(**named, **options) for _ in range(seeds))
        mean = as_numpy(total / seeds)
    else:
        swapped = [jnp.asarray(arrays[name].swapaxes(1, 2)) for name in ("query", "key", "value")]
        attend = lambda rng: alibi_flax.attention(  # noqa: E731
            *swapped, arrays["slopes"], scale=SCALE, dropout=rate, dropout_rng=rng
        )
        found = jax.jit(jax.vmap(attend))(jax.random.split(jax.random.key(3), seeds))
        mean = np.asarray(found.mean(axis=0)).swapaxes(1, 2)
    # Each term p v is kept with probability 1 - rate, and then divided by it.
    query, key, slopes = (arrays[name] for name in ("query", "key", "slopes"))
    probabilities = masked_softmax(biased_logits(query, key, slopes, scale=SCALE))
    variance = rate / (1 - rate) * probabilities**2 @ arrays["value"] ** 2
    assert (np.abs(mean - plain) <= 5 * np.sqrt(variance / seeds)).all()


@each_kernel(TORCH_BLOCKWISE, FLAX_BLOCKWISE)
def test_gradients_of_shared_keys_are_rounded_once(kernel: Kernel) -> None:
    """What many blocks add to one bfloat16 key is summed in float32."""
    arrays = draw(600, 600, dtype="bfloat16")
    arrays["slopes"] = np.full(4, 1e-3, np.float32)
    exact = TORCH_DENSE.differentiate()(widened(arrays))["value"]
    found = kernel.differentiate()(arrays)["value"]
    half_ulp = float(ml_dtypes.finfo("bfloat16").eps) / 2
    assert_within(found, exact, half_ulp, "values", dtype="bfloat16")


@each_kernel(*FUSED, FLAX_BLOCKWISE)
def test_long_sequences_keep_their_precision(kernel: Kernel) -> None:
    """The bias is as exact far from the beginning as near it: no worse than dense attention."""
    arrays, exact, limit = _long_sequences()
    assert np.abs(kernel.attend()(arrays)["attended"] - exact).max() <= limit


@cache
def _long_sequences() -> tuple[Arrays, np.ndarray, float]:
    """Arrays, what they give in float64, and twice the error of dense attention."""
    arrays = draw(3000, 3000, 2, 2, dtype="float32")
    arrays["slopes"] = np.array([0.3, 0.011], np.float32)
    exact = TORCH_DENSE.attend()(widened(arrays))["attended"]
    return arrays, exact, 2 * np.abs(TORCH_DENSE.attend()(arrays)["attended"] - exact).max()


@pytest.mark.parametrize(
    ("kernel", "dropout"),
    [(ATEN_FLASH, 0.0), (TORCH_BLOCKWISE, 0.0), (TORCH_BLOCKWISE, 0.3), (FLAX_BLOCKWISE, 0.3)],
    ids=id_of,
)
def test_the_same_bits_twice(kernel: Kernel, dropout: float) -> None:
    arrays = _drawn(kernel, "long", "float32")
    call = kernel.differentiate(**_options("long", "mask and segments", dropout=dropout))
    first, second = (call(arrays) for _ in range(2))
    for name, array in first.items():
        assert_bitwise(second[name], array, name)


@pytest.mark.parametrize(
    ("kernel", "causal"),
    [*((kernel, causal) for kernel in FUSED for causal in (True, False)), (FLAX_BLOCKWISE, True)],
    ids=id_of,
)
def test_tolerance_bounds_the_change(kernel: Kernel, causal: bool) -> None:
    """Something is dropped, and no output moves by more than twice what may be (SPEC.md §9)."""
    arrays = draw(400, 400) | {"slopes": np.array([2.0, 0.5, 0.2, 0.1])}
    exact, found = (
        kernel.attend(causal=causal, tolerance=tolerance)(arrays)["attended"]
        for tolerance in (0, 0.05)
    )
    change = np.abs(found - exact).max()
    assert 1e-6 < change <= 2 * 0.05 * np.abs(arrays["value"]).max()


@each_kernel(*FUSED, FLAX_BLOCKWISE, PALLAS_TPU, PALLAS_GPU)
def test_rows_without_keys(kernel: Kernel) -> None:
    """Zeros, and gradients that are zeros, whatever the padding holds."""
    arrays = draw(300, 300, value_width=kernel.value_width, dtype="float32")
    arrays["value"] = arrays["value"] * np.float32(1e30)
    mask = np.ones((2, 300), bool)
    mask[0] = False
    mask[1, :140] = False
    found = kernel.differentiate(attention_mask=mask)(arrays)
    for name in ("attended", "query", "key", "value"):
        assert np.isfinite(found[name]).all(), name
        for empty in (found[name][0], found[name][1, :, :140]):
            assert_bitwise(np.abs(empty), np.zeros_like(empty), name)


@pytest.mark.parametrize(
    ("kernel", "masks", "causal", "kv_heads"),
    [
        *(
            (kernel, masks, causal, 4)
            for kernel in (TORCH_DENSE, *FUSED)
            for masks in MASKS
            for causal in (True, False)
        ),
        *((kernel, "mask", True, shared) for kernel in (TORCH_DENSE, *FUSED) for shared in (1, 2)),
        (TorchKernel("dense", is_compiled=True), "segments", True, 4),
        (TorchKernel("blockwise", is_compiled=True), "segments", True, 4),
        *(
            (kernel, "mask and segments", causal, 4)
            for kernel in (FLAX_DENSE, FLAX_BLOCKWISE)
            for causal in (True, False)
        ),
        (PALLAS_TPU, "mask and segments", True, 4),
        (PALLAS_GPU, "mask and segments", True, 4),
    ],
    ids=id_of,
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_what_is_hidden_changes_nothing(
    kernel: Kernel, masks: str, causal: bool, kv_heads: int
) -> None:
    """NaN or infinity in a key changes no query that does not see it (SPEC.md §4.2).

    In torch also in a value or a query, and in gradients; and who sees it gives NaN.
    """
    is_torch, is_pallas = isinstance(kernel, TorchKernel), kernel in (PALLAS_TPU, PALLAS_GPU)
    query_len, key_len, dtype = (280, 300, "float32") if is_pallas else (37, 90, "float64")
    places = {"key": [7], "value": [61], "query": [20]} if is_torch else {"key": [7, 61, -1]}
    options = {"causal": causal, **masks_of(masks, key_len)}
    visible = visible_keys(query_len, key_len, **options)
    visible = np.broadcast_to(visible, (2, 4, query_len, key_len))
    is_broken = visible[..., [*places["key"], *places.get("value", [])]].any(axis=-1)
    for row in places.get("query", []):
        is_broken[:, :, row] |= visible[:, :, row].any(axis=-1)
    assert is_torch or not is_broken.all()
    call = kernel.differentiate(~is_broken, **options) if is_torch else kernel.attend(**options)
    found = []
    for number in (0.0, np.nan, np.inf):
        arrays = draw(query_len, key_len, 4, kv_heads, kernel.value_width, dtype)
        for name, positions in places.items():
            arrays[name][:, :, positions, 1] = number
        found.append(call(arrays))
    exact, budget = found[0], BUDGETS[dtype, "cpu"]
    for dirty in found[1:]:
        attended = dirty.pop("attended")
        assert not is_torch or np.isnan(attended[is_broken]).all()
        clean = exact["attended"][~is_broken]
        assert_within(attended[~is_broken], clean, budget.forward, "attended")
        for name, gradient in dirty.items():
            assert_within(gradient, exact[name], budget.gradient, f"gradient of {name}")


@each_kernel(TORCH_DENSE, *FUSED, FLAX_DENSE, FLAX_BLOCKWISE)
def test_large_logits(kernel: Kernel) -> None:
    """Past what float16 holds they are right; past what float32 holds, empty rows still are."""
    drawn = draw(150, 150, value_width=kernel.value_width, dtype="float16")
    arrays = {name: 40 * array for name, array in drawn.items()}
    arrays["slopes"] = np.array([-1.5, -0.4, -0.03, -6.0], np.float32)
    masks = masks_of("mask", 150)
    exact = TORCH_DENSE.differentiate(scale=30.0, **masks)(widened(arrays))
    found = kernel.differentiate(scale=30.0, **masks)(arrays)
    names = ("attended", "query", "key", "value")
    assert_gradients_within(
        {name: found[name] for name in names},
        {name: exact[name] for name in names},
        BUDGETS["bfloat16", "cpu"].gradient,
        "beyond float16",
        dtype="float16",
    )
    found = kernel.differentiate(scale=1e36, **masks)(arrays)
    for name in ("attended", "query"):
        empty = found[name][0, :, :50]
        assert_bitwise(np.abs(empty), np.zeros_like(empty), f"{name} of empty rows")


@each_kernel(FLAX_BLOCKWISE, PALLAS_TPU, PALLAS_GPU)
def test_far_keys_are_not_read(kernel: Kernel) -> None:
    """What the windows leave out may be anything, in both directions of the computation.

    In JAX: torch looks for NaN in what it is given, and finds it.
    """
    arrays = draw(100, 900, value_width=kernel.value_width, dtype="float32")
    arrays["slopes"] = np.array([1.5, 0.8, 0.6, 0.5], np.float32)
    query, key = (jnp.asarray(arrays[name].swapaxes(1, 2)) for name in ("query", "key"))
    plan = attention_plan(query, key, jnp.asarray(arrays["slopes"]), scale=SCALE)
    least = int(np.asarray(plan.first).min())
    assert least > 2
    call = kernel.differentiate()
    plain = call(arrays)
    arrays["value"][:, :, : least * BLOCK_SIZE] = np.nan
    found = call(arrays)
    for name, array in plain.items():
        assert_bitwise(found[name], array, name)


@each_kernel(FLAX_BLOCKWISE)
def test_sequences_and_heads_are_apart(kernel: Kernel) -> None:
    """What is no number in one head of one sequence stays there."""
    arrays = draw(300, 300, value_width=kernel.value_width, dtype="float32")
    call = kernel.differentiate()
    plain = call(arrays)
    arrays["value"][1, 2] = np.nan
    found = call(arrays)
    for name in ("attended", "query", "key", "value"):
        for place in np.ndindex(2, 4):
            if place != (1, 2):
                assert_bitwise(found[name][place], plain[name][place], name)
    assert np.isnan(found["attended"][1, 2]).all()


@each_kernel(*FUSED)
def test_strides_do_not_matter(kernel: Kernel) -> None:
    """Heads split by a view, as in the torch model; and columns that are not adjacent."""
    arrays = {name: as_torch(array) for name, array in draw(300, 300).items()}
    options = {"implementation": kernel.name, "slopes": arrays.pop("slopes")}
    exact = as_numpy(alibi_torch.attention(**arrays, **options))
    for axes in ((1, 2), (2, 3)):
        moved = {
            name: each.transpose(*axes).contiguous().transpose(*axes)
            for name, each in arrays.items()
        }
        found = as_numpy(alibi_torch.attention(**moved, **options))
        assert_within(found, exact, FLOAT64.forward, f"axes {axes}")
