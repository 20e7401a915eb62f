"""The kernels for GPUs of alibi_flax: lowered for CUDA by JAX anywhere, compiled by Triton where
it is installed, and run where JAX sees a GPU. test_kernel_numbers.py interprets them.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import alibi_flax
from alibi_flax.kernels.call import Call
from alibi_flax.kernels.windowed import pallas_gpu
from alibi_spec import slopes as paper_slopes
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_gradients_within, assert_within
from parity_tests.implementations import absences

HEADS, KEY_HEADS, SEQ = 4, 2, 640
NAMES = ("query", "key", "value", "slopes")
# Of GPUs from compute capability 8.0 on, those with the least allow a program so many bytes.
LEAST_SHARED_MEMORY = 99 * 1024
each_width = pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [*(("bfloat16", width) for width in (64, 80, 128, 256)), ("float32", 64), ("float32", 128)],
)


def _total(implementation: str, *arrays: Array, **options: Any) -> Array:
    attended = alibi_flax.attention(*arrays, implementation=implementation, **options)
    return (attended.astype(jnp.promote_types(attended.dtype, jnp.float32)) ** 2).sum()


def _shapes(dtype: str, head_dim: int) -> list[jax.ShapeDtypeStruct]:
    arrays = [(1, SEQ, heads, head_dim) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in arrays]
    return [*shapes, jax.ShapeDtypeStruct((HEADS,), jnp.float32)]


@pytest.fixture
def gpu_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take themselves for ones on a GPU."""
    monkeypatch.setattr(Call, "platform", "gpu")


def _exported(function: Any, dtype: str, head_dim: int) -> str:
    """The program that JAX makes for CUDA."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    kernel = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with use_abstract_mesh(AbstractMesh((1,), ("devices",), abstract_device=device)):
        export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[kernel])
        return export(*_shapes(dtype, head_dim)).mlir_module()


@pytest.mark.usefixtures("gpu_calls")
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
@each_width
def test_lowers_for_cuda(dtype: str, head_dim: int, dropout: float) -> None:
    options: Any = {"dropout": dropout, "dropout_rng": jax.random.key(0)}
    attend = partial(alibi_flax.attention, implementation="pallas_gpu", **options)
    gradients = jax.grad(partial(_total, "pallas_gpu", **options), argnums=(0, 1, 2, 3))
    for function, kernels in ((attend, 1), (gradients, 3)):
        assert _exported(function, dtype, head_dim).count("@__gpu$xla.gpu.triton") == kernels


@pytest.mark.usefixtures("gpu_calls")
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8, 2, 256), "bfloat16", None),
        ((1, 8, 2, 257), "bfloat16", "its heads are too wide for a GPU's shared memory"),
        ((1, 8, 2, 129), "float32", "its heads are too wide for a GPU's shared memory"),
        ((1, 8, 2, 4), "float64", "it does not compute in float64"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: str, reason: str | None) -> None:
    assert pallas_gpu.refuses(_call(shape, dtype)) == reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [
        *(("bfloat16", 64, 64), ("bfloat16", 128, 64), ("bfloat16", 160, 32)),
        *(("float32", 64, 64), ("float32", 72, 32)),
    ],
)
def test_blocks_fit_into_shared_memory(dtype: str, head_dim: int, block_size: int) -> None:
    """test_compiles_to_machine_code says that these do."""
    assert pallas_gpu.block_size(_call((1, 8, 2, head_dim), dtype)) == block_size


@pytest.mark.usefixtures("gpu_calls")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a JAX that has removed it."""
    monkeypatch.setattr(pallas_gpu, "triton", None)
    reason = pallas_gpu.refuses(_call((1, 8, 2, 4), "float32"))
    assert reason == f"JAX {jax.__version__} has no Triton under Pallas"


def _call(shape: tuple[int, ...], dtype: str) -> Call:
    array: Any = jax.ShapeDtypeStruct(shape, dtype)
    slopes: Any = jax.ShapeDtypeStruct(shape[1:2], jnp.float32)
    options = (True, 1.0, 0, None, None, "dtype", "absolute", None)
    return Call(array, array, array, slopes, *options)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; pip install 'alibi-duo[gpu-aot]'",
)
@pytest.mark.usefixtures("gpu_calls")
@pytest.mark.parametrize("capability", [86, 90])
@each_width
def test_compiles_to_machine_code(
    dtype: str, head_dim: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To tensor cores, in the shared memory of a small GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    triton: Any = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    lowering: Any = importlib.import_module("jax._src.pallas.triton.lowering")
    lower, modules = lowering.lower_jaxpr_to_triton_module, []

    def recorded(*arguments: Any, **options: Any) -> Any:
        result = lower(*arguments, **options)
        modules.append(result.module.operation.get_asm(enable_debug_info=False))
        return result

    jax.clear_caches()  # of what was lowered before
    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", recorded)
    gradients = jax.grad(partial(_total, "pallas_gpu"), argnums=(0, 1, 2, 3))
    _exported(gradients, dtype, head_dim)
    assert len(modules) == 3
    for number, module in enumerate(modules):
        path = tmp_path / f"{number}.ttir"
        path.write_text(module, encoding="utf-8")
        options = {"num_warps": 4, "num_stages": 2}
        compiled = triton.compile(str(path), target=target, options=options)
        assert compiled.metadata.shared <= LEAST_SHARED_MEMORY
        has_tensor_cores = any(name in compiled.asm["ptx"] for name in ("wgmma", "mma.sync"))
        assert has_tensor_cores == (dtype != "float32")


@pytest.mark.skipif("flax-gpu" in absences(), reason="JAX sees no GPU")
@pytest.mark.parametrize("masks", ["causal", "two-sided", "padded and packed"])
@each_width
def test_on_a_gpu(dtype: str, head_dim: int, masks: str) -> None:
    """Values and gradients against dense attention in float64 on the CPU."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in _shapes(dtype, head_dim)]
    arrays[3] = jnp.asarray(paper_slopes(HEADS))
    options: dict[str, Any] = {"causal": masks != "two-sided"}
    if masks == "padded and packed":
        options["attention_mask"] = jnp.asarray(rng.random((1, SEQ)) < 0.8)
        options["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 4, (1, SEQ))))

    def found(implementation: str, device: Any, *arrays: Array) -> dict[str, np.ndarray]:
        attend = partial(alibi_flax.attention, implementation=implementation, **options)
        total = partial(_total, implementation, **options)
        with jax.default_device(device):
            placed = [jax.device_put(array, device) for array in arrays]
            gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*placed)
            named = dict(zip(NAMES, gradients, strict=True)) | {"attended": attend(*placed)}
        return {name: np.asarray(x) for name, x in named.items()}

    ours = found("pallas_gpu", jax.devices("gpu")[0], *arrays)
    wide = [array.astype(jnp.float64) for array in arrays]
    exact = found("dense", jax.devices("cpu")[0], *wide)
    budget = BUDGETS[dtype, "gpu"]
    attended, expected = ours.pop("attended"), exact.pop("attended")
    assert_within(attended, expected, budget.forward, masks, dtype=dtype)
    dtypes = dict.fromkeys(NAMES, dtype) | {"slopes": "float32"}
    assert_gradients_within(ours, exact, budget.gradient, masks, dtype=dtypes)
