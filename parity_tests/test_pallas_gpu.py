"""The kernels for GPUs of alibi_flax: compiled for CUDA by JAX anywhere, for Hopper GPUs by Triton
where it is installed, and run where JAX sees a GPU. test_flax_kernels.py interprets them.
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
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import alibi_flax
from alibi_flax.kernels.call import Call
from alibi_spec import slopes as paper_slopes
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_gradients_within
from parity_tests.implementations import absences

HEADS, KEY_HEADS, SEQ = 4, 2, 640
NAMES = ("query", "key", "value", "slopes")
# Of GPUs from compute capability 8.0 on, those with the least allow a program so many bytes.
LEAST_SHARED_MEMORY = 99 * 1024
each_width = pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [*(("bfloat16", width) for width in (64, 80, 128, 256)), ("float32", 64), ("float32", 128)],
)


def _total(implementation: str, *arrays: Array) -> Array:
    attended = alibi_flax.attention(*arrays, implementation=implementation)
    return (attended.astype(jnp.float32) ** 2).sum()


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
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    kernel = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with use_abstract_mesh(AbstractMesh((1,), ("devices",), abstract_device=device)):
        export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[kernel])
        return export(*_shapes(dtype, head_dim)).mlir_module()


@pytest.mark.usefixtures("gpu_calls")
@each_width
def test_lowers_for_cuda(dtype: str, head_dim: int) -> None:
    attend = partial(alibi_flax.attention, implementation="pallas_gpu")
    gradients = jax.grad(partial(_total, "pallas_gpu"), argnums=(0, 1, 2, 3))
    for function, kernels in ((attend, 1), (gradients, 3)):
        assert _exported(function, dtype, head_dim).count("@__gpu$xla.gpu.triton") == kernels


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; pip install 'alibi-duo[gpu-aot]'",
)
@pytest.mark.usefixtures("gpu_calls")
@each_width
def test_compiles_for_hopper(
    dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To tensor cores, in the shared memory of a small GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    triton: Any = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
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
@each_width
def test_on_a_gpu(dtype: str, head_dim: int) -> None:
    """Against dense attention in float64 on the CPU."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in _shapes(dtype, head_dim)]
    arrays[3] = jnp.asarray(paper_slopes(HEADS))

    def gradients(implementation: str, device: Any, *arrays: Array) -> dict[str, np.ndarray]:
        function = jax.jit(jax.grad(partial(_total, implementation), argnums=(0, 1, 2, 3)))
        found = function(*(jax.device_put(array, device) for array in arrays))
        return {name: np.asarray(x) for name, x in zip(NAMES, found, strict=True)}

    found = gradients("pallas_gpu", jax.devices("gpu")[0], *arrays)
    wide = [array.astype(jnp.float64) for array in arrays]
    exact = gradients("dense", jax.devices("cpu")[0], *wide)
    assert_gradients_within(found, exact, BUDGETS[dtype, "gpu"].gradient, f"{dtype} {head_dim}")
