"""The attention functions on their own: masks, empty rows, segments, cached queries, bad calls."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_spec
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_bitwise, assert_within

BATCH, HEADS, SEQ, HEAD_DIM = 2, 3, 270, 6
SLOPES = alibi_spec.slopes(HEADS)
Attention = Any  # a partial of one of the two functions below


def torch_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, slopes: np.ndarray, **options: Any
) -> np.ndarray:
    """[batch, heads, seq, head_dim] in NumPy, through alibi_torch."""
    for name in ("attention_mask", "segment_ids"):
        if options.get(name) is not None:
            options[name] = as_torch(options[name])
    arrays = (as_torch(array) for array in (query, key, value, slopes))
    return as_numpy(alibi_torch.attention(*arrays, **options))


def flax_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, slopes: np.ndarray, **options: Any
) -> np.ndarray:
    """[batch, heads, seq, head_dim] in NumPy, through alibi_flax with strict dtype promotion."""
    for name in ("attention_mask", "segment_ids"):
        if options.get(name) is not None:
            options[name] = jnp.asarray(options[name])
    arrays = [jnp.asarray(array.swapaxes(1, 2)) for array in (query, key, value)]
    with jax.numpy_dtype_promotion("strict"):
        attended = alibi_flax.attention(*arrays, jnp.asarray(slopes), **options)
    return np.asarray(attended).swapaxes(1, 2)


# Every implementation of either backend is held to every test below, but those that need a GPU or a
# TPU: test_kernel_choice.py asserts that these refuse the CPU, test_kernel_numbers.py interprets
# JAX's, and test_torch_gpu.py and test_pallas_gpu.py test what else can be tested without one.
# "auto" is dense attention in JAX at these lengths.
ON_ACCELERATORS = ("flex", "flash_attn", "pallas_tpu", "pallas_gpu")
each_backend = pytest.mark.parametrize(
    "attention",
    [
        pytest.param(partial(call, implementation=name), id=f"{backend}-{name}")
        for backend, call, names in (
            ("torch", torch_attention, ("auto", *alibi_torch.attention_implementations())),
            ("flax", flax_attention, alibi_flax.attention_implementations()),
        )
        for name in names
        if name not in ON_ACCELERATORS
    ],
)


def _is_refused(
    attention: Attention, able: tuple[str, ...], reason: str, *arrays: Any, **options: Any
) -> bool:
    """Whether an implementation is none of the able, and says so when it is asked by name."""
    name = attention.keywords["implementation"]
    if name in ("auto", "dense", *able):
        return False
    with pytest.raises(ValueError, match=f"{name}.* cannot compute this: .*{reason}"):
        attention(*arrays, **options)
    return True


def _draw(query_len: int = SEQ, dtype: str = "float64") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, HEADS, length, HEAD_DIM) for length in (query_len, SEQ, SEQ)]
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def _expected(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    causal: bool = True,
    mask: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    is_rounded: bool = False,
    slopes: np.ndarray = SLOPES,
) -> np.ndarray:
    """One query at a time, from the definition; `is_rounded` for distance="bfloat16"."""
    result = np.zeros((*query.shape[:3], value.shape[-1]))
    keys, scale = np.arange(key.shape[2]), 1 / np.sqrt(query.shape[-1])
    offset, group = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    for b, h, i in np.ndindex(*query.shape[:3]):
        position, shared = i + offset, h // group
        hidden = (keys > position) & causal
        if mask is not None:
            hidden |= mask[b] == 0
        if segments is not None:
            hidden |= segments[b] != segments[b, position]
        penalty = float(slopes[h]) * np.abs(position - keys)
        if is_rounded:  # relative to the query, so that no exponential overflows
            count = keys if mask is None else np.cumsum(mask[b]) - mask[b]  # visible ones before
            products = _rounded(_rounded(slopes[h]) * _rounded(count))
            penalty = scale * (products[position] - products)
        weights = np.exp(key[b, shared] @ query[b, h, i] * scale - penalty)[~hidden]
        if weights.size:
            result[b, h, i] = weights / weights.sum() @ value[b, shared][~hidden]
    return result


def _rounded(numbers: np.ndarray) -> np.ndarray:
    return np.float32(numbers).astype(ml_dtypes.bfloat16).astype(np.float64)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len", [SEQ, 1, 37])
def test_queries_stand_at_the_end(attention: Attention, query_len: int, causal: bool) -> None:
    query, key, value = _draw(query_len)
    found = attention(query, key, value, SLOPES, causal=causal)
    expected = _expected_at_the_end(query_len, causal)
    assert_within(found, expected, BUDGETS["float64", "cpu"].forward, "attention")


@lru_cache
def _expected_at_the_end(query_len: int, causal: bool) -> np.ndarray:
    return _expected(*_draw(query_len), causal=causal)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_segments(attention: Attention, causal: bool) -> None:
    query, key, value = _draw(20)
    mask = np.ones((BATCH, SEQ), dtype=np.int64)
    mask[0, : SEQ - 10] = 0
    mask[1, SEQ - 5 :] = 0
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (BATCH, SEQ)), axis=1)
    options = {"attention_mask": mask, "segment_ids": segments}
    found = attention(query, key, value, SLOPES, causal=causal, **options)
    expected = _expected(query, key, value, causal=causal, mask=mask, segments=segments)
    assert_within(found, expected, BUDGETS["float64", "cpu"].forward, "attention")


@each_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_grouped_heads(attention: Attention, kv_heads: int) -> None:
    """Consecutive query heads share one head of keys and values."""
    rng = np.random.default_rng(2)
    query = rng.standard_normal((BATCH, 6, 9, HEAD_DIM))
    key, value = rng.standard_normal((2, BATCH, kv_heads, SEQ, HEAD_DIM))
    slopes = alibi_spec.slopes(6)
    found = attention(query, key, value, slopes)
    for head in range(6):
        one = slice(head, head + 1)
        shared = slice(head * kv_heads // 6, head * kv_heads // 6 + 1)
        expected = attention(query[:, one], key[:, shared], value[:, shared], slopes[one])
        limit = BUDGETS["float64", "cpu"].forward
        assert_within(found[:, one], expected, limit, f"head {head}")


@each_backend
@pytest.mark.parametrize("is_masked", [True, False])
def test_rounded_bias(attention: Attention, is_masked: bool) -> None:
    """Falcon-RW's: positions are counted from the first visible key, products are bfloat16."""
    query, key, value = _draw(12)
    slopes = SLOPES * np.float32(0.7)  # whose products no power of two makes exact
    mask = np.ones((BATCH, SEQ), dtype=np.int64) if is_masked else None
    if mask is not None:
        mask[0, :31] = 0
        mask[1, -4:] = 0
    options = {"attention_mask": mask, "distance": "bfloat16"}
    if _is_refused(attention, (), "rounded bias", query, key, value, slopes, **options):
        return
    found = attention(query, key, value, slopes, **options)
    expected = _expected(query, key, value, mask=mask, is_rounded=True, slopes=slopes)
    assert_within(found, expected, BUDGETS["float64", "cpu"].forward, "attention")
    plain = attention(query, key, value, slopes / np.sqrt(HEAD_DIM), attention_mask=mask)
    assert np.abs(plain - found).max() > 1e-3  # the rounding is no small matter


@each_backend
@pytest.mark.parametrize("mask_dtype", ["bool", "int32", "int64", "uint8"])
def test_a_query_without_keys_gives_zeros(attention: Attention, mask_dtype: str) -> None:
    """Exactly zeros, whatever the padded values hold, and other rows as if nothing happened."""
    query, key, value = _draw()
    mask = np.ones((BATCH, SEQ), dtype=mask_dtype)
    mask[0] = 0
    mask[1, :50] = 0
    found = attention(query, key, value * 1e30, SLOPES, attention_mask=mask)
    assert_bitwise(found[0], np.zeros_like(found[0]), "empty sequence")
    assert_bitwise(found[1, :, :50], np.zeros_like(found[1, :, :50]), "left padding")
    short = [array[1:, :, 50:] for array in (query, key, value * 1e30)]
    assert_within(
        found[1:, :, 50:],
        attention(*short, SLOPES),
        BUDGETS["float64", "cpu"].forward,
        "left padding moves nothing",
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("batch", "query_len"), [(0, 7), (2, 0), (0, 0)])
def test_logits_of_nothing(batch: int, query_len: int, dtype: str) -> None:
    shapes = (batch, HEADS, query_len, HEAD_DIM), (batch, HEADS, 9, HEAD_DIM)
    mask = np.ones((batch, 9), np.int64)
    wide = "float64" if dtype == "float64" else "float32"
    query, key = (torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    found = alibi_torch.biased_logits(
        *(query, key, as_torch(SLOPES)), attention_mask=as_torch(mask)
    )
    assert found.shape == (batch, HEADS, query_len, 9)
    assert found.dtype == getattr(torch, wide)
    query, key = (jnp.zeros(shape, dtype).swapaxes(1, 2) for shape in shapes)
    logits = alibi_flax.biased_logits(
        *(query, key, jnp.asarray(SLOPES)), attention_mask=jnp.asarray(mask)
    )
    assert logits.shape == (batch, HEADS, query_len, 9)
    assert logits.dtype == wide


def test_gradients_of_empty_rows_are_finite() -> None:
    """Zeros in, and no NaN out of the softmax of nothing."""
    query, key, value = _draw()
    mask = np.zeros((BATCH, SEQ), dtype=np.int64)
    arrays = [as_torch(array).requires_grad_() for array in (query, key, value)]
    attended = alibi_torch.attention(*arrays, as_torch(SLOPES), attention_mask=as_torch(mask))
    attended.sum().backward()

    def total(arrays: list[jax.Array]) -> jax.Array:
        options = {"attention_mask": jnp.asarray(mask)}
        return alibi_flax.attention(*arrays, jnp.asarray(SLOPES), **options).sum()

    seq_first = [jnp.asarray(array.swapaxes(1, 2)) for array in (query, key, value)]
    gradients = jax.grad(total)(seq_first)
    for ours, theirs in zip(arrays, gradients, strict=True):
        assert_bitwise(np.abs(as_numpy(ours.grad)), np.zeros(ours.shape), "torch")
        assert_bitwise(np.abs(np.asarray(theirs)), np.zeros(theirs.shape), "flax")


@each_backend
@pytest.mark.parametrize(("batch", "query_len"), [(0, 600), (BATCH, 0)])
def test_nothing_to_compute(attention: Attention, batch: int, query_len: int) -> None:
    query, key = np.zeros((batch, HEADS, query_len, 4)), np.zeros((batch, HEADS, 600, 4))
    assert attention(query, key, key, SLOPES).shape == query.shape


@each_backend
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_follow_the_values(attention: Attention, dtype: str) -> None:
    query, key, value = _draw(4, dtype)
    assert attention(query, key, value, SLOPES).dtype == np.dtype(dtype)


@each_backend
def test_value_width_may_differ(attention: Attention) -> None:
    query, key, value = _draw(9)
    wide = np.concatenate([value, value, value], axis=-1)
    if _is_refused(attention, ("blockwise",), "value width 18", query, key, wide, SLOPES):
        return
    found = attention(query, key, wide, SLOPES)
    assert found.shape == (BATCH, HEADS, 9, 3 * HEAD_DIM)
    expected = _expected(query, key, wide)
    assert_within(found, expected, BUDGETS["float64", "cpu"].forward, "wide")


@each_backend
def test_dropout_keeps_the_mean(attention: Attention) -> None:
    """Dropped at the stated rate, scaled up to keep the expectation, never a whole row in step."""
    zeros = np.zeros((1, 1, 400, 4))
    key = np.zeros((1, 1, 400, 4))
    value = np.ones((1, 1, 400, 1))
    is_flax = attention.func is flax_attention
    rng: Any = jax.random.key(0) if is_flax else torch.Generator().manual_seed(0)
    options = {"causal": False, "dropout": 0.25, "dropout_rng": rng}
    arrays = (zeros, key, value, np.zeros(1, np.float32))
    able = ("blockwise",)
    if _is_refused(attention, able, "dropout|value width 1", *arrays, **options):
        return
    found = attention(*arrays, **options).ravel()
    # Each row is a mean of 400 Bernoulli(0.75) / 0.75: deviation sqrt(0.25 / 0.75 / 400).
    deviation = np.sqrt(0.25 / 0.75 / 400)
    assert abs(found.mean() - 1) < 5 * deviation / np.sqrt(400)
    assert abs(found.std() / deviation - 1) < 5 / np.sqrt(2 * 400)


def test_flax_dropout_needs_a_key() -> None:
    query, key, value = _draw(4)
    with pytest.raises(ValueError, match=r"dropout=0\.5 needs dropout_rng; pass jax\.random\.key"):
        flax_attention(query, key, value, SLOPES, dropout=0.5)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": np.zeros((BATCH, HEADS, SEQ, 5))}, "key does not fit query: .*head_dim=5"),
        ({"key": np.zeros((BATCH, HEADS, 3, HEAD_DIM))}, "value does not fit key: .*length=3"),
        ({"query": np.zeros((BATCH, HEADS, SEQ + 1, HEAD_DIM))}, "query length 271 exceeds key"),
        ({"value": np.zeros((BATCH, HEADS, SEQ, 2), int)}, "have dtypes .*; expected one floating"),
        (
            {"key": np.zeros((BATCH, HEADS, SEQ, HEAD_DIM), np.float32)},
            "expected one floating dtype",
        ),
        ({"slopes": np.zeros(4, np.float32)}, r"slopes have shape \[4\]; expected \[heads=3\]"),
        ({"attention_mask": np.ones((BATCH, 7), int)}, r"attention_mask has shape \[2, 7\]"),
        ({"attention_mask": np.ones((BATCH, SEQ))}, "attention_mask is floating point"),
        ({"segment_ids": np.ones((1, SEQ), int)}, r"segment_ids has shape \[1, 270\]"),
        ({"implementation": "fused"}, "implementation='fused' is not known; .*'auto', .*'dense'"),
        ({"tolerance": -1.0}, "tolerance="),
        ({"tolerance": "none"}, "tolerance='none' is not valid; expected 'dtype' or a share"),
        ({"dropout": 1.0}, r"dropout=1\.0 is not valid"),
        ({"distance": "cubic"}, "distance='cubic'"),
        ({"scale": 0.0}, r"scale=0\.0 is not valid"),
    ],
)
def test_bad_calls(attention: Attention, change: dict[str, Any], message: str) -> None:
    query, key, value = _draw()
    call = {"query": query, "key": key, "value": value, "slopes": SLOPES} | change
    with pytest.raises(ValueError, match=message):
        attention(**call)


@each_backend
@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_the_other_layout(attention: Attention, kv_heads: int) -> None:
    query, key, value = (array.swapaxes(1, 2) for array in _draw())
    key, value = key[:, :, :kv_heads], value[:, :, :kv_heads]
    with pytest.raises(ValueError, match=r"270 heads and 3 positions.*the other backend's layout"):
        attention(query, key, value, SLOPES)


def test_wrong_rank() -> None:
    flat = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="query has 3 axes; expected 4"):
        alibi_torch.attention(flat, flat, flat, torch.zeros(3))
    array = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="query has 3 axes; expected 4"):
        alibi_flax.attention(array, array, array, jnp.zeros(3))


def test_a_float64_scale_does_not_widen() -> None:
    query, key, _ = _draw(3, "float32")
    arrays = [jnp.asarray(array.swapaxes(1, 2)) for array in (query, key)]
    logits = alibi_flax.biased_logits(*arrays, jnp.asarray(SLOPES), scale=np.float64(0.3))
    assert logits.dtype == jnp.float32


def test_autocast_does_not_narrow_float32_attention() -> None:
    arrays = [as_torch(array) for array in _draw(5, "float32")]
    plain = alibi_torch.attention(*arrays, as_torch(SLOPES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = alibi_torch.attention(*arrays, as_torch(SLOPES))
    assert_bitwise(as_numpy(inside), as_numpy(plain), "autocast")
