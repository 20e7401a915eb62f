"""Calls of both backends' kernels in NumPy, [batch, heads, seq, width], for tests of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import alibi_flax
import alibi_spec
import alibi_torch
from alibi_convert.tensors import as_numpy, as_torch
from alibi_flax.kernels import call as flax_call
from alibi_flax.kernels.dropout import drawn_dropout
from alibi_flax.kernels.windowed import operator as flax_operator
from alibi_flax.kernels.windowed import pallas_gpu, pallas_tpu, xla_loops
from alibi_spec import certificate
from alibi_torch.kernels.windowed import operator as torch_operator

BATCH, WIDTH, WIDE = 2, 8, 12  # WIDE is a width of values that differs from the heads'
BLOCK = 16  # many blocks in short sequences
SCALE = 0.4
NAMES = ("query", "key", "value", "slopes")
Arrays = dict[str, np.ndarray]
Call = Callable[[Arrays], Arrays]
PASSES = {"blockwise": xla_loops, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


@dataclass(frozen=True)
class Kernel(ABC):
    """One kernel of one backend, in blocks of 16 positions where that can be asked for."""

    name: str

    @property
    def value_width(self) -> int:
        return WIDTH if self.name == "aten_flash" else WIDE

    @abstractmethod
    def attend(self, **options: Any) -> Call:
        """What computes "attended" from query, key, value and slopes."""

    @abstractmethod
    def differentiate(self, rows: np.ndarray | None = None, **options: Any) -> Call:
        """The same and the gradients of a fixed sum of it, of the slopes too where there are any.

        Of some rows only, where `rows` [batch, heads, query_len] says so. Dropout has one seed.
        """


@dataclass(frozen=True)
class TorchKernel(Kernel):
    is_compiled: bool = False

    def attend(self, **options: Any) -> Call:
        def run(arrays: Arrays) -> Arrays:
            named = {name: as_torch(array) for name, array in arrays.items()}
            with small_blocks():
                return {"attended": as_numpy(self._call(named, options))}

        return run

    def differentiate(self, rows: np.ndarray | None = None, **options: Any) -> Call:
        def run(arrays: Arrays) -> Arrays:
            leaves = {name: as_torch(array).clone() for name, array in arrays.items()}
            for name, leaf in leaves.items():
                leaf.requires_grad_(self.name != "aten_flash" or name != "slopes")
            learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            with small_blocks():
                attended = self._call(leaves, options)
                cotangent = as_torch(_cotangent(tuple(attended.shape))).to(attended)
                if rows is None:
                    total = (attended * cotangent).sum()
                else:
                    total = (attended * cotangent)[torch.from_numpy(rows)].sum()
                gradients = torch.autograd.grad(total, list(learned.values()))
            named = dict(zip(learned, gradients, strict=True)) | {"attended": attended.detach()}
            return {name: as_numpy(array) for name, array in named.items()}

        return run

    def _call(self, arrays: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        options = {name: _placed(option, as_torch) for name, option in options.items()}
        options = {"scale": SCALE, "implementation": self.name, **options}
        if options.get("dropout"):
            options.setdefault("dropout_rng", torch.Generator().manual_seed(3))
        attention: Any = alibi_torch.attention
        if self.is_compiled:
            attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
        return attention(**arrays, **options)


class FlaxKernel(Kernel):
    def attend(self, **options: Any) -> Call:
        return self._program(jax.jit(lambda arrays: ({}, self._call(arrays, options))))

    def differentiate(self, rows: np.ndarray | None = None, **options: Any) -> Call:
        def total(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            attended = self._call(arrays, options)
            wide = jnp.float64 if attended.dtype == jnp.float64 else jnp.float32
            shape = tuple(attended.swapaxes(1, 2).shape)
            cotangent = jnp.asarray(_cotangent(shape).swapaxes(1, 2), wide)
            terms = attended.astype(wide) * cotangent
            if rows is not None:
                terms = jnp.where(rows.swapaxes(1, 2)[..., None], terms, 0)
            return terms.sum(), attended

        return self._program(jax.jit(jax.grad(total, has_aux=True)))

    def _program(self, program: Any) -> Call:
        """In the other layout, compiled once."""

        def run(arrays: Arrays) -> Arrays:
            placed = {name: jnp.asarray(_swapped(array)) for name, array in arrays.items()}
            with interpreted(), jax.numpy_dtype_promotion("strict"):
                gradients, attended = program(placed)
            named = gradients | {"attended": attended}
            return {name: _swapped(np.asarray(array)) for name, array in named.items()}

        return run

    def _call(self, arrays: dict[str, jax.Array], options: dict[str, Any]) -> jax.Array:
        """On this machine, whatever the kernel refuses."""
        options = {name: _placed(option, jnp.asarray) for name, option in options.items()}
        options = {"dropout_rng": jax.random.key(3), "scale": SCALE, **options}
        if self.name == "dense":
            return alibi_flax.attention(**arrays, **options, implementation="dense")
        rate, rng = options.pop("dropout", 0.0), options.pop("dropout_rng")
        slopes = arrays.pop("slopes")
        arrays = {name: array.swapaxes(1, 2) for name, array in arrays.items()}
        key_len = arrays["key"].shape[2]
        start = key_len - arrays["query"].shape[2]
        dropout = drawn_dropout(rate, rng, arrays["query"], start, key_len) if rate else None
        defaults = {"causal": True, "attention_mask": None, "segment_ids": None}
        defaults |= {"tolerance": "dtype", "distance": "absolute"}
        call = flax_call.Call(
            **arrays, slopes=slopes, **{**defaults, **options}, query_start=start, dropout=dropout
        )
        block = {"blockwise": BLOCK, "pallas_tpu": certificate.BLOCK_SIZE, "pallas_gpu": None}
        return flax_operator.attention(call, PASSES[self.name], block[self.name])


TORCH_DENSE, FLAX_DENSE = TorchKernel("dense"), FlaxKernel("dense")
ATEN_FLASH, TORCH_BLOCKWISE = TorchKernel("aten_flash"), TorchKernel("blockwise")
FLAX_BLOCKWISE = FlaxKernel("blockwise")
PALLAS_TPU, PALLAS_GPU = FlaxKernel("pallas_tpu"), FlaxKernel("pallas_gpu")
FUSED = (ATEN_FLASH, TORCH_BLOCKWISE)  # of torch


def id_of(value: Any) -> str | None:
    """A kernel's name in the id of a test."""
    if not isinstance(value, Kernel):
        return None
    if isinstance(value, TorchKernel):
        return f"torch-{value.name}{'-compiled' * value.is_compiled}"
    return f"flax-{value.name}"


def each_kernel(*kernels: Kernel) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernel", kernels, ids=id_of)


@contextmanager
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_operator, "BLOCK_SIZE", BLOCK)
        yield


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels for TPUs and GPUs are interpreted: their numbers can be had anywhere."""
    compiled, divided = pl.pallas_call, flax_operator.divided

    def call(kernel: Any, *, compiler_params: Any, **options: Any) -> Any:
        is_for_tpus = isinstance(compiler_params, pltpu.CompilerParams)
        interpret: Any = pltpu.InterpretParams() if is_for_tpus else True
        return compiled(kernel, compiler_params=compiler_params, interpret=interpret, **options)

    def undivided(function: Any, layouts: Any, results: Any, arrays: Any) -> Any:
        """The interpreter of kernels for TPUs has effects, which cannot be divided."""
        if function.args[0].passes is not pallas_tpu:
            return divided(function, layouts, results, arrays)
        return function({name: array for name, array in arrays.items() if array is not None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", call)
        patch.setattr(flax_operator, "divided", undivided)
        yield


def draw(
    query_len: int,
    key_len: int,
    heads: int = 4,
    kv_heads: int = 4,
    value_width: int | None = None,
    dtype: str = "float64",
    width: int = WIDTH,
) -> Arrays:
    """Arrays of normal numbers; slopes steep enough for windows that slide along, and one of 0."""
    rng = np.random.default_rng(0)
    shapes = {
        "query": (BATCH, heads, query_len, width),
        "key": (BATCH, kv_heads, key_len, width),
        "value": (BATCH, kv_heads, key_len, value_width or width),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["slopes"] = 6.0 * alibi_spec.slopes(heads)
    arrays["slopes"][-1] = 0
    narrow = jnp.dtype(dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    return {
        name: array.astype(wide if name == "slopes" else narrow) for name, array in arrays.items()
    }


def widened(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def dtypes_of(arrays: Arrays) -> dict[str, str]:
    """Those of results: of a gradient, what it is the gradient of."""
    named = {name: str(array.dtype) for name, array in arrays.items()}
    return named | {"attended": named["value"]}


def masks_of(kind: str, key_len: int) -> dict[str, np.ndarray]:
    """Padding on both sides with gaps; packed segments, whose numbers have equal lower halves."""
    rng, masks = np.random.default_rng(1), {}
    if "mask" in kind:
        mask = rng.random((BATCH, key_len)) < 0.9
        mask[0, : key_len // 3] = False
        mask[1, -key_len // 4 :] = False
        masks["attention_mask"] = mask
    if "segments" in kind:
        masks["segment_ids"] = np.sort(rng.integers(0, 4, (BATCH, key_len))) << 32
    return masks


@cache
def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape)


def _placed(option: Any, place: Callable[[np.ndarray], Any]) -> Any:
    return place(option) if isinstance(option, np.ndarray) else option


def _swapped(array: np.ndarray) -> np.ndarray:
    """[batch, heads, seq, width] to [batch, seq, heads, width], and back."""
    return array.swapaxes(1, 2) if array.ndim == 4 else array
