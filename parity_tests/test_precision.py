"""Float32 means float32 where it is asked for, and what devices make of it otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert.tensors import Tensors
from alibi_spec import reference_forward
from alibi_spec.budgets import AGREEMENTS, BUDGETS, activation_errors
from alibi_spec.reference import Reference
from alibi_torch import precision
from alibi_verify.backends import FlaxBackend
from alibi_verify.emulation import ALGORITHMS, emulated
from alibi_verify.explanations import EXPLANATIONS, explain, rounded
from benchmarks.precision import DEVICES, MODELS, Measured
from parity_tests.cases import CONFIGS, draw_inputs, draw_parameters
from parity_tests.compare import assert_within

ROOT = Path(__file__).parent.parent
CONFIG = CONFIGS["lm-tied"]

cublas: Any = torch.backends.cuda.matmul
onednn: Any = torch.backends.mkldnn
settings: Any = torch._C  # each library's own; the properties show what is in force
OLD = (
    torch.get_float32_matmul_precision,
    lambda: cublas.allow_tf32,
    lambda: torch.backends.cudnn.allow_tf32,
)
SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def _every_setting() -> list[Any]:
    """What can be read: of each library under every setting above it, and by the old interface."""
    found: list[Any] = [getattr(cublas, name) for name in (*SUMS, "allow_fp16_accumulation")]
    found += [getattr(cublas, f"{name}_split_k") for name in SUMS]
    for read in OLD:
        try:
            found.append(read())
        except RuntimeError:
            found.append("the interfaces disagree")
    backends = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
    kept = []
    for each in backends:  # from the top, so that each shows its own
        kept.append(settings._get_fp32_precision_getter(*each))
        for above in ("tf32", "none"):
            settings._set_fp32_precision_setter(*each, above)
            for backend in ("cuda", "mkldnn"):
                for product in ("matmul", "conv", "rnn"):
                    found.append(settings._get_fp32_precision_getter(backend, product))
    for each, value in zip(backends, kept, strict=True):
        settings._set_fp32_precision_setter(*each, value)
    return found + kept


def _set_all_above() -> None:
    torch.backends.fp32_precision = "tf32"


def _set_onednn() -> None:
    settings._set_fp32_precision_setter("mkldnn", "all", "bf16")


def _set_products() -> None:
    cublas.fp32_precision, onednn.matmul.fp32_precision = "tf32", "bf16"


def _set_old_then_new() -> None:
    cublas.allow_tf32 = True
    cublas.fp32_precision = "none"


def _set_sums() -> None:
    cublas.allow_fp16_reduced_precision_reduction = (False, False)
    cublas.allow_fp16_accumulation = True


BEFORE: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "all": _set_all_above,
    "oneDNN": _set_onednn,
    "products": _set_products,
    "old": lambda: torch.set_float32_matmul_precision("medium"),
    "old TF32": lambda: setattr(cublas, "allow_tf32", True),
    "old then new": _set_old_then_new,
    "sums": _set_sums,
}


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    """Settings of this process."""
    sums = {name: (getattr(cublas, name), getattr(cublas, f"{name}_split_k")) for name in SUMS}
    yield
    for name, value in sums.items():
        setattr(cublas, name, value)
    cublas.allow_fp16_accumulation = False
    torch.set_float32_matmul_precision("highest")
    for name in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")):
        settings._set_fp32_precision_setter(*name, "none")
    for backend in ("cuda", "mkldnn"):
        settings._set_fp32_precision_setter(backend, "matmul", "none")


@pytest.mark.usefixtures("_torch_as_it_was")
@pytest.mark.parametrize("before", BEFORE)
def test_torch_computes_in_float32_and_goes_back(before: str) -> None:
    """Whatever was set by either interface: after a nested block, and after an exception."""
    BEFORE[before]()
    found = _every_setting()
    with suppress(KeyError), alibi_torch.full_precision():
        _assert_full_precision()
        inside = _every_setting()
        with alibi_torch.full_precision():
            _assert_full_precision()
        assert _every_setting() == inside
        raise KeyError
    assert _every_setting() == found


def _assert_full_precision() -> None:
    """By both interfaces, which agree."""
    assert (cublas.fp32_precision, onednn.matmul.fp32_precision) == ("ieee", "ieee")
    assert (torch.get_float32_matmul_precision(), cublas.allow_tf32) == ("highest", False)
    assert not any(getattr(cublas, name) for name in (*SUMS, "allow_fp16_accumulation"))


@pytest.mark.usefixtures("_torch_as_it_was")
def test_torch_before_version_2_9(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is only the old interface, and sums are not split."""
    products = SimpleNamespace(**dict.fromkeys((*SUMS, "allow_fp16_accumulation"), True))
    monkeypatch.setattr(precision, "_own", object())
    monkeypatch.setattr(precision, "_cublas", products)
    torch.set_float32_matmul_precision("medium")
    with alibi_torch.full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert set(vars(products).values()) == {False}
    assert torch.get_float32_matmul_precision() == "medium"
    assert set(vars(products).values()) == {True}


def test_onednn_obeys() -> None:
    """Linear maps by the operator that torch does not choose itself (alibi_torch/linear.py)."""
    program = """
        import torch
        from alibi_torch import full_precision
        from alibi_torch.linear import linear

        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        x = torch.ones(64, 512)
        with torch.no_grad():
            linear(x, torch.ones(512, 512))
            with full_precision():
                linear(x, torch.ones(512, 512))
    """
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    products = [line for line in run.stdout.splitlines() if ",inner_product," in line]
    assert ["attr-fpmath:bf16" in line for line in products] == [True, False]


def _loss(model: Any, params: Any, tokens: Any) -> Any:
    return model.apply({"params": params}, tokens).sum()


def _step(model: Any, params: Any, tokens: Any) -> Any:
    cache = alibi_flax.KVCache.empty(model.config, 1, 256)
    return model.apply({"params": params}, tokens[:, :1], cache=cache)[0]


# The last: linear maps of two layers and a head, and two products for each in gradients, but not
# that of the embedding, which is no product.
PROGRAMS = {
    "dense": ("dense", jax.grad(_loss, argnums=1), 3 * 13 - 1),
    "blockwise": ("blockwise", jax.grad(_loss, argnums=1), 3 * 13 - 1),
    "a step": ("auto", _step, 13),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_product_of_jax_asks_for_float32(program: str) -> None:
    """In the block those of the whole model, without it all but linear maps: attention's."""
    implementation, function, maps = PROGRAMS[program]
    model = alibi_flax.ALiBiLM(CONFIG, implementation=implementation)
    tokens = jnp.zeros((1, 130), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    lower = jax.jit(partial(function, model)).lower
    with alibi_flax.full_precision():
        asked = _asked(lower(params, tokens))
    assert set(asked) == {True}
    without = _asked(lower(params, tokens))  # not the program of the block
    assert len(without) == len(asked)
    assert without.count(False) == maps


def _asked(lowered: Any) -> list[bool]:
    """Whether each product of a program asks for the highest precision."""
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    return ["precision = [HIGHEST, HIGHEST]" in line for line in products]


def test_jax_goes_back() -> None:
    """After a nested block and an exception, to the setting of the user."""
    with jax.default_matmul_precision("tensorfloat32"):
        with suppress(KeyError), alibi_flax.full_precision():
            with alibi_flax.full_precision():
                assert jax.config.jax_default_matmul_precision == "highest"
            assert jax.config.jax_default_matmul_precision == "highest"
            raise KeyError
        assert jax.config.jax_default_matmul_precision == "tensorfloat32"


def test_a_pullback_has_the_precision_of_its_forward_pass() -> None:
    x = jnp.ones((4, 4), jnp.float32)
    with alibi_flax.full_precision():
        _, pullback = jax.vjp(lambda x: (x @ x).sum(), x)
    assert set(_asked(jax.jit(pullback).lower(jnp.float32(1)))) == {True}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_emulated_products(algorithm: str) -> None:
    """Against float64 products of the parts that NumPy rounds."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((280, 280)).astype(np.float32) for _ in range(2))
    found = np.asarray(emulated(jnp.matmul, algorithm)(left, right))
    exact = np.zeros(left.shape)
    for i, j in ALGORITHMS[algorithm].passes:
        exact += _part(left, algorithm, i) @ _part(right, algorithm, j)
    limit = AGREEMENTS["float32 sums"].relative
    assert_within(found, exact, limit, algorithm, dtype="float32")


def _part(x: np.ndarray, algorithm: str, index: int) -> np.ndarray:
    wide, bits = x.astype(np.float64), ALGORITHMS[algorithm].bits
    if bits is None:
        return wide
    for _ in range(index):
        wide = wide - rounded(wide, bits)
    return rounded(wide, bits)


def test_products_do_not_escape_the_emulation() -> None:
    def looped(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x)

    with pytest.raises(ValueError, match="in a scan would escape the emulation"):
        emulated(looped, "TF32")(jnp.ones((4, 4), jnp.float32))


def test_an_emulated_device_is_explained() -> None:
    """What a TPU does by default: attention's products ask for float32, linear maps do not."""
    parameters, inputs = draw_parameters(CONFIG), draw_inputs(CONFIG, batch=1, seq=40)
    found = _trace(CONFIG, parameters, inputs, "bfloat16, 1 pass", "bfloat16, 6 passes")
    exact = reference_forward(CONFIG, parameters, inputs)
    budget = BUDGETS["float32", "tpu"].forward
    errors = activation_errors(CONFIG, found, exact)
    name = next(name for name, error in errors.items() if error > budget)
    causes = explain(
        Reference(CONFIG, Tensors.of(parameters)), inputs, name, found, budget, EXPLANATIONS
    )
    assert "the factors of linear maps are rounded to bfloat16" in [each.words for each in causes]


def _trace(config: Any, parameters: Any, inputs: Any, default: str, highest: str) -> Any:
    """Of an emulated device, which no setting of this machine tells what to do."""
    backend = FlaxBackend()
    model, params = (
        backend.model(config, "float32", "dense"),
        backend.params(config, parameters, "float32"),
    )
    found = emulated(partial(alibi_flax.trace, model), default, highest)(
        params, jnp.asarray(inputs)
    )
    return {name: np.asarray(array) for name, array in found.items()}


@pytest.mark.slow
def test_budgets_of_devices() -> None:
    """In `full_precision` a model keeps float32's budget on a TPU; by default it is far beyond."""
    measured = Measured(MODELS["`ALiBiConfig()`"], 64)
    budget = BUDGETS["float32", "tpu"]
    found = measured.errors(*DEVICES["TPU, in `full_precision()`"])
    assert found["forward"] <= budget.forward
    assert found["gradient"] <= budget.gradient
    edge = measured.errors(*DEVICES["TPU, three passes"])["forward"]
    assert budget.forward / 2 < edge < 2 * budget.forward
    for device, platform in (("recent GPU, by default", "gpu"), ("TPU, by default", "tpu")):
        found, budget = measured.errors(*DEVICES[device]), BUDGETS["float32", platform]
        assert found["forward"] > 10 * budget.forward, device
        assert found["gradient"] > 10 * budget.gradient, device
