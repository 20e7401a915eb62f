"""Both backends' kernels compiled, exported, without data, and on several devices.

test_torch_gpu.py, test_pallas_gpu.py and test_tpu.py compile them for other devices.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import Array
from jax.export import export as jax_export
from jax.export import symbolic_shape
from torch.export import Dim, export

import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_torch.kernels.dense import PAYS_BELOW
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.jax_calls import (
    LONG,
    SHORT,
    jax_arrays,
    jax_attend,
    jax_mask,
    jax_model,
    jax_tokens,
)
from parity_tests.kernel_calls import WIDTH
from parity_tests.torch_calls import (
    SLOPES,
    draw,
    each_fused,
    each_windowed,
    loss_of,
    masks_of,
    slopes_of,
)

# In torch.


@each_windowed
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiles_into_one_graph(implementation: str, dropout: float) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation, "dropout": dropout, **masks_of("mask", 300)}
    torch.manual_seed(0)
    exact = torch.autograd.grad(loss_of(*arrays, **options), arrays)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    found = torch.autograd.grad(compiled(*arrays, **options), arrays)
    for ours, theirs in zip(found, exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")


@each_fused
def test_compiles_without_gradients(implementation: str) -> None:
    arrays = list(draw(300, 300, dtype="float32").values())

    def attend(*arrays: torch.Tensor) -> torch.Tensor:
        return alibi_torch.attention(*arrays, SLOPES, implementation=implementation)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_bitwise(as_numpy(compiled(*arrays)), as_numpy(attend(*arrays)), "attended")


@pytest.mark.parametrize("masks", ["mask", pytest.param("none", marks=pytest.mark.slow)])
def test_compiles_for_any_length(masks: str) -> None:
    """Each side of the threshold keeps the kernel that pays there."""

    def attend(arrays: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> torch.Tensor:
        return alibi_torch.attention(**arrays, slopes=SLOPES, **masks)

    torch.compiler.reset()
    compiled = torch.compile(attend, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (100, 600, 40, 511):
        call = (draw(length, length), masks_of(masks, length))
        assert_bitwise(as_numpy(compiled(*call)), as_numpy(attend(*call)), f"{length} tokens")


class _Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        heads = x.unflatten(-1, (4, WIDTH)).transpose(1, 2)
        return alibi_torch.attention(heads, heads, heads, SLOPES, attention_mask=mask)


def _model() -> alibi_torch.ALiBiLM:
    torch.manual_seed(0)
    config = ALiBiConfig(
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=23,
        slope_interpolation=256,
    )
    return alibi_torch.ALiBiLM(config).double().eval()


@pytest.mark.parametrize(
    ("is_masked", "traced_length"),
    [
        (False, 100),
        (True, 600),
        pytest.param(False, 600, marks=pytest.mark.slow),
        pytest.param(True, 100, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("module", [_Attention(), _model()], ids=["attention", "model"])
def test_exports_for_any_length(module: Any, is_masked: bool, traced_length: int) -> None:
    def call(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(length)
        inputs = torch.randint(23, (batch, length), generator=generator)
        if isinstance(module, _Attention):
            inputs = torch.randn(batch, length, 4 * WIDTH, generator=generator).double()
        mask = torch.arange(length) >= torch.arange(batch)[:, None] * (length // 3)
        return (inputs, mask) if is_masked else (inputs,)

    axes = {0: Dim("batch", min=1, max=8), 1: Dim("seq", min=2, max=4096)}
    arguments = call(3, traced_length)
    program = export(module, arguments, dynamic_shapes=(axes,) * len(arguments)).module()
    for batch, length in ((1, 100), (3, 255), (2, 511), (3, 600), (1, 2)):
        assert (length**2 < PAYS_BELOW) == (length < 256)
        arguments = call(batch, length)
        found, expected = (as_numpy(each(*arguments).detach()) for each in (program, module))
        assert_within(found, expected, BUDGETS["float64", "cpu"].forward, f"{length} tokens")


def test_exports_one_length_as_it_runs() -> None:
    """Where lengths are known, the exported program takes the kernel that pays."""
    for length, has_windows in ((100, False), (300, True)):
        program = export(_Attention(), (torch.randn(2, length, 4 * WIDTH),))
        assert ("alibi_torch.attend" in program.graph_module.code) == has_windows


def test_only_shapes_on_the_meta_device() -> None:
    arrays = {name: each.to("meta") for name, each in draw(300, 400).items()}
    attended = alibi_torch.attention(**arrays, slopes=slopes_of().to("meta"))
    assert attended.shape == (2, 4, 300, WIDTH)
    assert attended.device.type == "meta"


# In JAX.


def _gradient(*arrays: Array) -> Array:
    return jax.grad(lambda query, *rest: jax_attend(query, *rest).sum())(*arrays)


def _exported(function: Any, *arrays: Array, symbols: str = "") -> Any:
    """A program for arrays of these shapes, but for the leading axes that have symbols."""
    sizes = symbolic_shape(symbols) if symbols else ()
    shapes = [
        jax.ShapeDtypeStruct((*sizes, *x.shape[len(sizes) :]), x.dtype, sharding=None)
        for x in arrays
    ]
    return jax_export(jax.jit(function))(*shapes).call


@pytest.mark.parametrize("function", [jax_attend, _gradient], ids=["attended", "gradient"])
@pytest.mark.parametrize("symbols", [pytest.param("", marks=pytest.mark.slow), "batch,"])
def test_windows_are_exported(function: Any, symbols: str) -> None:
    arrays = (*jax_arrays(LONG), jax_mask(LONG))
    found = _exported(function, *arrays, symbols=symbols)(*arrays)
    assert_bitwise(np.asarray(found), np.asarray(jax.jit(function)(*arrays)), "exported")


@pytest.mark.parametrize(
    "function",
    [pytest.param(jax_attend, marks=pytest.mark.slow), _gradient],
    ids=["attended", "gradient"],
)
def test_symbolic_lengths_are_dense(function: Any) -> None:
    arrays = (*jax_arrays(LONG), jax_mask(LONG))
    with pytest.warns(UserWarning, match="costs the square of the length.*one program for each"):
        program = _exported(function, *arrays, symbols="batch, seq")
    for length in (SHORT, LONG):
        arrays = (*jax_arrays(length), jax_mask(length))
        limit = BUDGETS["float64", "cpu"].gradient
        expected = np.asarray(jax.jit(function)(*arrays))
        assert_within(np.asarray(program(*arrays)), expected, limit, f"{length} tokens")


def test_who_asks_for_dense_is_not_warned() -> None:
    arrays = (*jax_arrays(LONG), jax_mask(LONG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _exported(
            lambda *arrays: jax_attend(*arrays, implementation="dense"), *arrays, symbols="b, n"
        )


def test_windows_refuse_symbolic_lengths() -> None:
    arrays = (*jax_arrays(LONG), jax_mask(LONG))
    with pytest.raises(ValueError, match="n queries and n keys; use 'dense', or export one"):
        _exported(
            lambda *arrays: jax_attend(*arrays, implementation="blockwise"), *arrays, symbols="b, n"
        )


def test_models_are_exported_for_any_length() -> None:
    """Slopes, too, go by the length that comes."""
    model, params = jax_model(slope_interpolation=256)

    def logits(tokens: Array, mask: Array) -> Any:
        return model.apply(params, tokens, mask)

    with pytest.warns(UserWarning, match="costs the square of the length"):
        program = _exported(logits, jax_tokens(LONG), jax_mask(LONG), symbols="batch, seq")
    for length in (SHORT, LONG):
        arguments = (jax_tokens(length), jax_mask(length))
        expected = np.asarray(jax.jit(logits)(*arguments))
        budget = BUDGETS["float32", "cpu"].forward
        assert_within(np.asarray(program(*arguments)), expected, budget, f"{length} tokens")


@pytest.mark.slow
def test_sharded_inputs() -> None:
    """Under jit, too, devices keep their sequences and heads, and gather only positions."""
    code = r"""
        import re
        from functools import partial
        import jax, jax.numpy as jnp, numpy as np, alibi_flax, alibi_spec
        from alibi_spec.budgets import AGREEMENTS
        from parity_tests.compare import assert_within
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
                limit = AGREEMENTS["float32 sums"].relative
                assert_within(np.asarray(ours), np.asarray(theirs), limit, "sharded")
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
