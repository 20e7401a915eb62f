"""The fused kernels of alibi_flax: results, gradients, windows, refusals; dense is the judge."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import alibi_flax
from alibi_flax.attention import attention_plan
from alibi_flax.kernels.call import Call
from alibi_flax.kernels.certificate import query_block_ranges
from alibi_flax.kernels.dense import PAYS_BELOW
from alibi_flax.kernels.dropout import drawn_dropout
from alibi_flax.kernels.windowed import operator, pallas_gpu, pallas_tpu, xla_loops
from alibi_spec import dropout, visible_keys
from alibi_spec import windows as spec
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within

BATCH, HEADS, HEAD_DIM, VALUE_DIM = 2, 4, 8, 12
SEED = jax.random.key(3)
NAMES = ("query", "key", "value", "slopes")
RANGES = ("first", "last", "share")
EVERYTHING: dict[str, Any] = {
    "key_len": 300,
    "query_len": 280,
    "kv_heads": 2,
    "is_padded": True,
    "is_packed": True,
}
CASES: dict[str, dict[str, Any]] = {
    "one block": {"key_len": 40},
    "no multiple of the block": {"key_len": 300},
    "few queries": {"key_len": 300, "query_len": 37},
    "one query": {"key_len": 260, "query_len": 1},
    "one key head": {"key_len": 260, "kv_heads": 1},
    "padded": {"key_len": 300, "is_padded": True},
    "everything": EVERYTHING,
}
each_passes = pytest.mark.parametrize(
    "passes",
    [xla_loops, pallas_tpu, pallas_gpu],
    ids=["blockwise", "pallas_tpu", "pallas_gpu"],
)


@pytest.fixture(autouse=True)
def _kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for TPUs and GPUs: their numbers can be had anywhere."""
    compiled = pl.pallas_call

    def call(kernel: Any, *, compiler_params: Any, **options: Any) -> Any:
        is_for_tpus = isinstance(compiler_params, pltpu.CompilerParams)
        interpret: Any = pltpu.InterpretParams() if is_for_tpus else True
        return compiled(kernel, compiler_params=compiler_params, interpret=interpret, **options)

    monkeypatch.setattr(pl, "pallas_call", call)
    divided = operator.divided

    def undivided(function: Any, layouts: Any, results: Any, arrays: Any) -> Any:
        """The interpreter of kernels for TPUs has effects, which cannot be divided."""
        if function.args[0].passes is not pallas_tpu:
            return divided(function, layouts, results, arrays)
        return function({name: array for name, array in arrays.items() if array is not None})

    monkeypatch.setattr(operator, "divided", undivided)


def _draw(
    key_len: int,
    query_len: int | None = None,
    kv_heads: int = HEADS,
    is_padded: bool = False,
    is_packed: bool = False,
    dtype: Any = jnp.float64,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays by name, and masks; a whole sequence but one key is padding."""
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.standard_normal((BATCH, query_len or key_len, HEADS, HEAD_DIM)),
        "key": rng.standard_normal((BATCH, key_len, kv_heads, HEAD_DIM)),
        "value": rng.standard_normal((BATCH, key_len, kv_heads, VALUE_DIM)),
        "slopes": np.array([1.5, 0.4, 0.03, 0.0]),
    }
    masks: dict[str, Any] = {}
    if is_padded:
        mask = rng.random((BATCH, key_len)) < 0.8
        mask[0, : key_len // 2] = False
        mask[1, -key_len // 3 :] = False
        masks["attention_mask"] = jnp.asarray(mask)
    if is_packed:
        # Numbers that are equal in their lower halves.
        masks["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, key_len))) << 32)
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}, masks


def _fused(passes: Any, arrays: dict[str, Array], causal: bool = True, **options: Any) -> Array:
    """A kernel on this machine, whatever it refuses; dropout goes by one seed."""
    rate, key_len = options.get("dropout", 0.0), arrays["key"].shape[1]
    query_start = key_len - arrays["query"].shape[1]
    call = Call(
        **arrays,
        causal=causal,
        scale=options.get("scale", 0.4),
        query_start=query_start,
        attention_mask=options.get("attention_mask"),
        segment_ids=options.get("segment_ids"),
        tolerance=options.get("tolerance", "dtype"),
        distance="absolute",
        dropout=drawn_dropout(rate, SEED, arrays["query"], query_start, key_len) if rate else None,
    )
    return operator.attention(call, passes, None if passes is pallas_gpu else spec.BLOCK_SIZE)


def _dense(arrays: dict[str, Array], causal: bool = True, **options: Any) -> Array:
    options = {"causal": causal, "scale": 0.4, "implementation": "dense", **options}
    options["dropout_rng"] = SEED
    return alibi_flax.attention(*(arrays[name] for name in NAMES), **options)


def _with_gradients(attend: Any) -> Callable[[dict[str, Array]], dict[str, np.ndarray]]:
    """The result and the gradients of every array, in one compiled program."""

    def value(arrays: dict[str, Array]) -> tuple[Array, Array]:
        attended = attend(arrays)
        wide = jnp.float64 if attended.dtype == jnp.float64 else jnp.float32
        cotangent = np.random.default_rng(1).standard_normal(attended.shape)
        return (attended.astype(wide) * jnp.asarray(cotangent, wide)).sum(), attended

    program = jax.jit(jax.grad(value, has_aux=True))

    def run(arrays: dict[str, Array]) -> dict[str, np.ndarray]:
        with jax.numpy_dtype_promotion("strict"):
            gradients, attended = program(arrays)
        named = {"attended": attended} | {name: gradients[name] for name in NAMES}
        return {name: np.asarray(array) for name, array in named.items()}

    return run


@pytest.mark.parametrize(
    ("case", "causal", "dropout"),
    [(case, True, 0.0) for case in ("one block", "one query", "one key head", "everything")]
    + [(case, False, 0.0) for case in ("no multiple of the block", "everything")]
    + [("everything", True, 0.3), ("everything", False, 0.3)],
)
def test_float64(case: str, causal: bool, dropout: float) -> None:
    """Where nothing is rounded away: dense attention and its automatic gradients."""
    arrays, options = _draw(**CASES[case])
    options |= {"causal": causal, "dropout": dropout}
    found = _with_gradients(partial(_fused, xla_loops, **options))(arrays)
    exact = _with_gradients(partial(_dense, **options))(arrays)
    assert_gradients_within(found, exact, BUDGETS["float64", "cpu"].gradient, "blockwise")


@pytest.mark.parametrize(
    ("passes", "dtype", "case", "causal", "dropout"),
    [
        (xla_loops, "float32", "everything", True, 0.0),
        (xla_loops, "bfloat16", "everything", False, 0.3),
        (pallas_tpu, "float32", "everything", True, 0.3),
        (pallas_tpu, "float32", "everything", False, 0.0),
        (pallas_tpu, "bfloat16", "one key head", True, 0.3),
        (pallas_gpu, "float32", "everything", True, 0.3),
        (pallas_gpu, "float32", "everything", False, 0.0),
        (pallas_gpu, "bfloat16", "one key head", True, 0.3),
    ],
)
def test_narrow_dtypes(passes: Any, dtype: str, case: str, causal: bool, dropout: float) -> None:
    """Within the budget of dense attention in float64, on the same rounded inputs."""
    arrays, masks = _draw(**CASES[case], dtype=dtype)
    masks["dropout"] = dropout
    arrays["slopes"] = arrays["slopes"].astype(jnp.float32)
    found = _with_gradients(partial(_fused, passes, causal=causal, **masks))(arrays)
    wide = {name: array.astype(jnp.float64) for name, array in arrays.items()}
    exact = _with_gradients(partial(_dense, causal=causal, **masks))(wide)
    assert found["attended"].dtype == dtype
    budget = BUDGETS[dtype, "cpu"]
    attended, expected = found.pop("attended"), exact.pop("attended")
    assert_within(attended, expected, budget.forward, case)
    assert_gradients_within(found, exact, budget.gradient, case)


@each_passes
def test_rows_without_keys(passes: Any) -> None:
    """Zeros, and gradients that are zeros, whatever the padding holds."""
    arrays, _ = _draw(300, dtype=jnp.float32)
    arrays["value"] = arrays["value"] * 1e30
    mask = jnp.ones((BATCH, 300), jnp.bool_).at[0].set(False).at[1, :140].set(False)
    found = _with_gradients(partial(_fused, passes, attention_mask=mask))(arrays)
    for name in ("attended", "query", "key", "value"):
        assert np.isfinite(found[name]).all(), name
        assert_bitwise(np.abs(found[name][0]), np.zeros_like(found[name][0]), name)
        assert_bitwise(np.abs(found[name][1, :140]), np.zeros_like(found[name][1, :140]), name)


@pytest.mark.parametrize(
    ("passes", "causal"),
    [
        (None, True),
        (None, False),
        (xla_loops, True),
        (xla_loops, False),
        (pallas_tpu, True),
        (pallas_gpu, True),
    ],
)
def test_hidden_keys_change_no_result(passes: Any, causal: bool) -> None:
    """NaN or infinity in them (SPEC.md §4.2): in the future, under a mask, in other segments."""
    arrays, masks = _draw(300, is_padded=True, is_packed=True, dtype=jnp.float32)
    attend = _dense if passes is None else partial(_fused, passes)
    attend = jax.jit(partial(attend, causal=causal, **masks))
    poisoned = [7, 160, 299]
    visible = visible_keys(
        300, 300, causal, *(np.asarray(masks[name]) for name in ("attention_mask", "segment_ids"))
    )
    clean = ~visible[:, 0][..., poisoned].any(axis=-1)
    assert clean[:, 100:].any()
    exact = np.asarray(attend(arrays))
    for number in (np.nan, np.inf):
        dirty = arrays | {"key": arrays["key"].at[:, jnp.asarray(poisoned)].set(number)}
        assert_within(
            np.asarray(attend(dirty))[clean],
            exact[clean],
            BUDGETS["float32", "cpu"].forward,
            "rows",
        )


@pytest.mark.parametrize("passes", [None, xla_loops])
def test_large_logits(passes: Any) -> None:
    """Past what float16 holds they are right; past what float32 holds, empty rows still are."""
    arrays, masks = _draw(150, is_padded=True)
    arrays = {name: (40 * x).astype(jnp.float16) for name, x in arrays.items()}
    arrays["slopes"] = jnp.asarray([-1.5, -0.4, -0.03, -6.0], jnp.float32)
    attend = _dense if passes is None else partial(_fused, passes)
    wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
    exact = _with_gradients(partial(_dense, **masks, scale=30.0))(wide)
    found = _with_gradients(partial(attend, **masks, scale=30.0))(arrays)
    assert max(np.abs(np.asarray(each)).max() for each in exact.values()) > 0
    names = ("attended", "query", "key", "value")
    assert_gradients_within(
        {name: found[name].astype(np.float64) for name in names},
        {name: exact[name] for name in names},
        BUDGETS["bfloat16", "cpu"].gradient,
        "beyond float16",
    )
    found = _with_gradients(partial(attend, **masks, scale=1e36))(arrays)
    for name in ("attended", "query"):
        empty = found[name][0, : 150 // 2]
        assert_bitwise(np.abs(empty), np.zeros_like(empty), f"{name} of empty rows")


def test_slopes_that_are_not_finite_are_refused() -> None:
    """Where they can be seen: under `jit` they cannot."""
    arrays, _ = _draw(3)
    for number in (np.nan, np.inf):
        slopes = arrays["slopes"].at[1].set(number)
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            _dense(arrays | {"slopes": slopes})
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            attention_plan(arrays["query"], arrays["key"], np.asarray(slopes))
        jax.jit(_dense)(arrays | {"slopes": slopes})


@each_passes
def test_far_keys_are_not_read(passes: Any) -> None:
    """What the windows leave out may be anything, in both directions of the computation."""
    arrays, _ = _draw(900, dtype=jnp.float32)
    arrays["slopes"] = jnp.asarray([1.5, 0.8, 0.6, 0.5], jnp.float32)
    arrays["query"] = arrays["query"][:, -100:]
    plan = attention_plan(arrays["query"], arrays["key"], arrays["slopes"], scale=0.4)
    least = int(np.asarray(plan.first).min())
    assert least > 2
    attend = _with_gradients(partial(_fused, passes))
    plain = attend(arrays)
    far = arrays["value"].at[:, : least * spec.BLOCK_SIZE].set(jnp.nan)
    found = attend(arrays | {"value": far})
    for name, array in plain.items():
        assert_bitwise(found[name], array, name)


def test_sequences_and_heads_are_apart() -> None:
    """What is no number in one head of one sequence stays there."""
    arrays, _ = _draw(600, dtype=jnp.float32)
    attend = _with_gradients(partial(_fused, xla_loops))
    plain = attend(arrays)
    spoiled = arrays | {"value": arrays["value"].at[1, :, 2].set(jnp.nan)}
    found = attend(spoiled)
    for name in ("attended", "query", "key", "value"):
        for sequence, head in np.ndindex(BATCH, HEADS):
            ours, theirs = (x[name][sequence, :, head] for x in (found, plain))
            if (sequence, head) != (1, 2):
                assert_bitwise(ours, theirs, name)
    assert np.isnan(found["attended"][1, :, 2]).all()


def test_the_same_bits_twice() -> None:
    arrays, masks = _draw(**CASES["everything"], dtype=jnp.float32)
    attend = _with_gradients(partial(_fused, xla_loops, **masks))
    first, second = (attend(arrays) for _ in range(2))
    for name, array in first.items():
        assert_bitwise(second[name], array, name)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float64") for case in ("few queries", "one key head", "padded")]
    + [("everything", dtype) for dtype in ("float64", "float32", "bfloat16")],
)
def test_plans(case: str, dtype: str, causal: bool) -> None:
    """Those of the specification, but for what rounding blurs; no row loses more than it may."""
    arrays, masks = _draw(**CASES[case], dtype=dtype)
    slopes = arrays["slopes"].astype(jnp.float32)
    options = {"causal": causal, "block_size": 16}
    for factor in (0.25, 1.5, 100):
        arrays["query"] = factor * arrays["query"]
        found = attention_plan(arrays["query"], arrays["key"], slopes, **options, **masks)
        plan = spec.AttentionPlan(*(np.asarray(getattr(found, name)) for name in RANGES), 16)
        query, key = (np.asarray(arrays[name]).swapaxes(1, 2) for name in ("query", "key"))
        numpy_masks = {name: np.asarray(mask) for name, mask in masks.items()}
        exact = spec.attention_plan(query, key, np.asarray(slopes), **options, **numpy_masks)
        if dtype == "float64":
            assert np.array_equal(plan.first, exact.first)
            assert np.array_equal(plan.last, exact.last)
            assert_within(plan.share, exact.share, BUDGETS["float64", "cpu"].forward, "share")
        arrays64 = (query.astype(np.float64), key.astype(np.float64), np.asarray(slopes))
        mass = spec.dropped_mass(plan, *arrays64, causal=causal, **numpy_masks)
        assert (mass <= spec.tolerance_of("dtype", dtype)).all()
        # Rounding widens a range by one block at the most.
        assert (plan.first >= exact.first - 1).all()
        assert (plan.last <= exact.last + 1).all()


def test_nothing_is_proved() -> None:
    """Slopes that do not fall, and numbers that are none: the full causal range."""
    arrays, _ = _draw(300, dtype=jnp.float32)
    everything = np.broadcast_to(np.arange(1, 4), (BATCH, HEADS, 3))
    key, slopes = arrays["key"], jnp.ones(HEADS)
    for slopes_, key_ in (
        (jnp.zeros(HEADS), key),
        (-slopes, key),
        (slopes, key.at[:, 0].set(jnp.inf)),
        (slopes, key.at[:, 0].set(jnp.nan)),
        (slopes, key.at[:, 0].set(1e30)),
    ):
        plan = attention_plan(arrays["query"], key_, slopes_)
        assert np.array_equal(plan.first, np.zeros_like(everything))
        assert np.array_equal(plan.last, everything)
    plan = attention_plan(arrays["query"], key, slopes, tolerance=0)
    assert np.array_equal(plan.first, np.zeros_like(everything))


def test_queries_of_a_block_of_keys() -> None:
    """No block of queries is missed, and the hull is as tight as a hull can be."""
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


def test_transformations() -> None:
    """vmap, remat, and a gradient through both, of keys and of traced slopes."""
    arrays, _ = _draw(260)
    one = {name: x if name == "slopes" else x[:1] for name, x in arrays.items()}
    attend = partial(_fused, xla_loops, dropout=0.3)
    expected = _with_gradients(attend)(one)
    found = _with_gradients(jax.checkpoint(attend))(one)
    for name, array in expected.items():
        assert_within(found[name], array, BUDGETS["float64", "cpu"].gradient, f"remat {name}")

    def total(scale: Array, slopes: Array, query: Array) -> Array:
        return attend(one | {"query": scale * query, "slopes": slopes}).sum()

    scales = jnp.asarray([0.5, 2.0])
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, 0, None)))
    slopes = jnp.stack([one["slopes"], 2 * one["slopes"]])
    for number, parts in enumerate(zip(*mapped(scales, slopes, one["query"]), strict=True)):
        alone = gradient(scales[number], slopes[number], one["query"])
        for part, expected_part in zip(parts, alone, strict=True):
            limit = BUDGETS["float64", "cpu"].gradient
            assert_within(np.asarray(part), np.asarray(expected_part), limit, "vmap")


@pytest.mark.parametrize(("heads", "query_len", "rate"), [(3, 70, 0.1), (4, 41, 0.75)])
def test_dropped_probabilities_are_the_specifications(
    heads: int, query_len: int, rate: float
) -> None:
    """The same ones for the same seed, bit for bit."""
    query, key = jnp.zeros((2, query_len, heads, 8)), jnp.zeros((2, 70, 1, 8))
    value = jnp.broadcast_to(jnp.eye(70)[None, :, None], (2, 70, 1, 70))
    options: dict[str, Any] = {"causal": False, "dropout": rate}
    for state in range(2):
        rng = jax.random.key(state)
        seed = np.asarray(jax.random.bits(rng, (2,), "uint32"))
        hashes = dropout.query_hashes(seed, 2, heads, query_len, 70 - query_len)
        kept = dropout.is_kept(hashes, dropout.key_hashes(70), rate)
        for name in ("dense", "blockwise"):
            found = alibi_flax.attention(
                *(query, key, value, jnp.zeros(heads)),
                **options,
                dropout_rng=rng,
                implementation=name,
            )
            assert_bitwise(np.asarray(found).swapaxes(1, 2) != 0, kept, name)


def test_dropout_is_unbiased() -> None:
    """Every element's mean over many seeds lies within 5 deviations of what no dropout gives."""
    arrays, _ = _draw(9, 6)
    keys, rate = jax.random.split(SEED, 500), 0.2
    attend = partial(alibi_flax.attention, *(arrays[name] for name in NAMES))
    found = jax.jit(jax.vmap(lambda rng: attend(dropout=rate, dropout_rng=rng)))(keys)
    logits = alibi_flax.biased_logits(arrays["query"], arrays["key"], arrays["slopes"])
    # Each term p v is kept with probability 1 - rate, and then divided by it.
    squares = jax.nn.softmax(logits, axis=-1) ** 2
    spread = jnp.einsum("bhqk,bkhd->bqhd", squares, arrays["value"] ** 2) * rate / (1 - rate)
    error = jnp.abs(found.mean(axis=0) - attend())
    assert (error <= 5 * jnp.sqrt(spread / len(keys))).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"distance": "bfloat16"}, "no rounded bias"),
        ({"distance": "signed", "causal": False}, "no bias that rewards later keys"),
    ],
)
def test_dense_dropout_of_long_sequences_warns(options: dict[str, Any], reason: str) -> None:
    """Unless it is asked for by name."""
    x = jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
    attend = partial(alibi_flax.attention, dropout=0.1, dropout_rng=SEED, **options)
    with pytest.warns(UserWarning, match=f"computed whole.*{reason}.*distance='absolute'"):
        jax.eval_shape(attend, x, x, x, slopes)
    jax.eval_shape(partial(attend, implementation="dense"), x, x, x, slopes)


def test_sharded_inputs() -> None:
    """Devices keep their sequences and heads, under jit alone too, and gather positions only."""
    code = r"""
        import re
        from functools import partial
        import jax, jax.numpy as jnp, numpy as np, alibi_flax, alibi_spec
        jax.config.update("jax_num_cpu_devices", 4)
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.standard_normal((4, 152, n, 8)), jnp.float32) for n in (4, 2, 2)]
        slopes = jnp.asarray(alibi_spec.slopes(4))
        mask = jnp.asarray(rng.random((4, 152)) < 0.8)

        def attend(query, key, value, slopes, mask, **named):
            named |= dict(implementation="blockwise", attention_mask=mask)
            return alibi_flax.attention(query, key, value, slopes, **named)

        dropping = partial(attend, dropout=0.3, dropout_rng=jax.random.key(0))

        def both(attend):
            def total(*arguments):
                attended = attend(*arguments)
                return (attended ** 2).sum(), attended
            return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))

        def check(expected, attend, *arguments):
            program = both(attend).lower(*arguments).compile()
            gradients, attended = program(*arguments)
            for ours, theirs in zip((attended, *gradients), expected, strict=True):
                assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
            kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
            return re.findall(rf"= (\S+?)(?:{{\S*?}})? ({kinds})[a-z-]*\(", program.as_text())

        def on_one(attend):
            gradients, attended = both(attend)(*arrays, slopes, mask)
            return (attended, *gradients)

        plain, dropped = on_one(attend), on_one(dropping)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
            def placed(x, *axes):
                return jax.device_put(x, NamedSharding(mesh, P(*axes)))
            parts = [placed(x, "data", None, "model") for x in arrays]
            parts += [placed(slopes, "model"), placed(mask, "data")]
            # The gradient of slopes is a sum over sequences.
            found = check(dropped, dropping, *parts)
            assert found == [("f32[2]", "all-reduce")], found
        auto = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        specs = (*[P("data", None, "model")] * 3, P("model"), P("data"))
        mapped = jax.shard_map(attend, mesh=auto, in_specs=specs, out_specs=specs[0])
        assert check(plain, mapped, *arrays, slopes, mask) == [("f32[2]", "all-reduce")]
        mapped = jax.shard_map(
            attend, mesh=auto, in_specs=(*[P("data")] * 3, P(), P("data")), out_specs=P("data"),
            axis_names={"data"},
        )
        check(plain, mapped, *arrays, slopes, mask)
        four = jax.make_mesh((4,), ("parts",), axis_types=(AxisType.Auto,))
        # Of two heads of keys no four devices can have their own.
        parts = [jax.device_put(arrays[0], NamedSharding(four, P(None, None, "parts")))]
        parts += [jax.device_put(x, NamedSharding(four, P())) for x in (*arrays[1:], slopes, mask)]
        assert check(plain, attend, *parts)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_grows_linearly(dropout: float) -> None:
    """What compiled programs need besides inputs and outputs, at twice the length."""

    def temporary(key_len: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, key_len, 2, 16), jnp.float32)] * 3
        slopes = jax.ShapeDtypeStruct((2,), jnp.float32)

        def total(*arrays: Array) -> Array:
            named = dict(zip(NAMES, arrays, strict=True))
            return _fused(xla_loops, named, dropout=dropout).sum()

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(*shapes, slopes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2**15) <= 2.2 * temporary(2**14)


def test_auto() -> None:
    """Dense for small calls and for what nothing else computes, the fused kernel else."""

    def is_fused(length: int, **options: Any) -> bool:
        x = jnp.zeros((1, length, 2, 4))
        call = partial(alibi_flax.attention, **options)
        return "custom_vjp_call" in str(jax.make_jaxpr(call)(x, x, x, jnp.ones(2)))

    length = int(PAYS_BELOW**0.5)
    assert is_fused(length)
    assert not is_fused(length - 1)
    assert not is_fused(length, implementation="dense")
    assert not is_fused(length, distance="bfloat16")
    assert not is_fused(length, distance="signed", causal=False)
    assert is_fused(length, distance="signed")
    assert is_fused(length, dropout=0.1, dropout_rng=SEED)


@pytest.mark.parametrize(
    ("implementation", "options", "reason"),
    [
        ("blockwise", {"distance": "bfloat16"}, "it has no rounded bias"),
        (
            "blockwise",
            {"distance": "signed", "causal": False},
            "it has no bias that rewards later keys",
        ),
        ("pallas_tpu", {}, "it needs a TPU, and this runs on a cpu"),
        ("pallas_gpu", {}, "it needs a GPU, and this runs on a cpu"),
    ],
)
def test_refusals(
    implementation: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Call, "platform", "cpu")  # wherever this runs
    x = jnp.zeros((1, 4, 2, 4))
    message = f"implementation='{implementation}' cannot compute this: {reason}.*'auto', .*'dense'"
    call = partial(alibi_flax.attention, implementation=implementation, **options)
    with pytest.raises(ValueError, match=message):
        call(x, x, x, jnp.ones(2))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, x, x, x, jnp.ones(2))


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("float32", None),
        ("bfloat16", None),
        ("float64", "a TPU does not compute in float64"),
        ("float16", "a TPU does not compute in float16"),
    ],
)
def test_traced_calls_run_on_the_default_device(dtype: str, reason: str | None) -> None:
    reasons = []

    def look(query: Array) -> Array:
        call = Call(
            *(query, query, query, query[0, 0, :, 0]),
            *(True, 1.0, 0, None, None, "dtype", "absolute", None),
        )
        reasons.append(pallas_tpu.refuses(call))
        return query

    query = jax.ShapeDtypeStruct((1, 4, 2, 4), dtype)
    jax.eval_shape(look, query)
    with jax.default_device("tpu"):
        jax.eval_shape(look, query)
    assert reasons == ["it needs a TPU, and this runs on a cpu", reason]
