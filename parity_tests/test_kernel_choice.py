"""Which kernel computes a call: what "auto" takes, what each refuses and says, when it warns."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

import alibi_flax
import alibi_torch
from alibi_flax.kernels.call import Call
from alibi_flax.kernels.dense import PAYS_BELOW
from alibi_flax.kernels.windowed import pallas_tpu
from alibi_torch.kernels import KERNELS
from alibi_torch.kernels.dropout import drawn_dropout
from alibi_torch.kernels.windowed import aten
from parity_tests.torch_calls import call_of, draw, slopes_of

DROPOUT = drawn_dropout(0.1, None, draw(300, 300)["query"], 0, 300)
SEED = jax.random.key(3)
NO_ROUNDED_BIAS = ({"distance": "bfloat16"}, "no rounded bias")
NO_REWARD = ({"distance": "signed", "causal": False}, "no bias that rewards later keys")


@pytest.mark.parametrize(
    ("implementation", "changes", "reason"),
    [
        ("aten_flash", {"value": torch.zeros(2, 4, 300, 3)}, "value width 3 differs from head_dim"),
        ("aten_flash", {"slopes": slopes_of().requires_grad_()}, "no gradient for the slopes"),
        ("aten_flash", {"dropout": DROPOUT}, "no dropout"),
        ("blockwise", *NO_ROUNDED_BIAS),
        ("blockwise", *NO_REWARD),
        ("flex", {}, "gradients only on CUDA, and the query is on cpu"),
        ("flash_attn", {}, "runs on CUDA, and the query is on cpu"),
    ],
)
def test_refusals_of_torch(implementation: str, changes: dict[str, Any], reason: str) -> None:
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


@pytest.mark.parametrize(
    ("implementation", "options", "reason"),
    [
        ("blockwise", *NO_ROUNDED_BIAS),
        ("blockwise", *NO_REWARD),
        ("pallas_tpu", {}, "needs a TPU, and this runs on a cpu"),
        ("pallas_gpu", {}, "needs a GPU, and this runs on a cpu"),
    ],
)
def test_refusals_of_flax(
    implementation: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Call, "platform", "cpu")  # wherever this runs
    x = jnp.zeros((1, 4, 2, 4))
    message = (
        f"implementation='{implementation}' cannot compute this: it .*{reason}.*'auto', .*'dense'"
    )
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


def test_auto_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_auto_of_flax() -> None:
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


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize(("options", "reason"), [NO_ROUNDED_BIAS, NO_REWARD])
def test_dense_dropout_of_long_sequences_warns(
    options: dict[str, Any], reason: str, backend: str
) -> None:
    """Unless it is asked for by name."""
    if backend == "torch":
        long = {**draw(300, 300, dtype="float32"), "slopes": slopes_of(), "dropout": 0.1}
        attend = partial(alibi_torch.attention, **long, **options)
    else:
        x = jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)
        slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
        options = {**options, "dropout": 0.1, "dropout_rng": SEED}

        def attend(**named: str) -> Any:
            call = partial(alibi_flax.attention, **options, **named)
            return jax.eval_shape(call, x, x, x, slopes)

    with pytest.warns(UserWarning, match=f"dense attention.*{reason}.*distance='absolute'"):
        attend()
    attend(implementation="dense")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_slopes_that_are_not_finite_are_refused(number: float) -> None:
    """Where they can be seen: under `jit` they cannot."""
    x, slopes = np.zeros((1, 2, 3, 4), np.float32), np.float32([0.5, number])
    ours = [torch.from_numpy(array) for array in (x, x, x, slopes)]
    theirs = [jnp.asarray(array) for array in (x.swapaxes(1, 2),) * 3 + (slopes,)]
    for backend, arrays in ((alibi_torch, ours), (alibi_flax, theirs)):
        query, key, _, rates = arrays
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            backend.attention(*arrays)
        with pytest.raises(ValueError, match="slopes hold a number that is not finite"):
            backend.attention_plan(query, key, rates)
    jax.jit(alibi_flax.attention)(*theirs)


@pytest.mark.parametrize("name", ["key", "slopes", "attention_mask", "segment_ids"])
def test_arrays_on_two_devices_are_refused(name: str) -> None:
    """They gave memory that nobody had written."""
    ids = {
        each: torch.ones(2, 300, dtype=torch.int64) for each in ("attention_mask", "segment_ids")
    }
    arrays = {**draw(300, 300), "slopes": slopes_of(), **ids}
    arrays[name] = arrays[name].to("meta")
    with pytest.raises(ValueError, match=f"several devices: query on cpu, .*{name} on meta"):
        alibi_torch.attention(**arrays)
    del arrays["value"]
    with pytest.raises(ValueError, match=f"several devices: query on cpu, .*{name} on meta"):
        alibi_torch.biased_logits(**arrays)


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
