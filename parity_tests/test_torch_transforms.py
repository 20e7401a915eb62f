"""What torch does to functions, done to its kernels: compiling, mapping, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.torch_calls import (
    WIDTH,
    draw,
    each_fused,
    each_windowed,
    masks_of,
    slopes_of,
    with_gradients,
)

SLOPES = slopes_of()


def _loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """Dropout draws from torch's own generator, as in models."""
    return alibi_torch.attention(query, key, value, SLOPES, **options).square().mean()


@each_windowed
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiles_into_one_graph(implementation: str, dropout: float) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation, "dropout": dropout, **masks_of("mask", 300)}
    torch.manual_seed(0)
    exact = torch.autograd.grad(_loss(*arrays, **options), arrays)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    found = torch.autograd.grad(compiled(*arrays, **options), arrays)
    for ours, theirs in zip(found, exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")


@each_windowed
def test_per_sample_gradients(implementation: str, dropout: float) -> None:
    """vmap over grad, and vmap alone; each sample with the same dropout."""
    arrays = [each[:, None] for each in draw(300, 300, dtype="float32").values()]

    def loss(*arrays: torch.Tensor) -> torch.Tensor:
        return _loss(*arrays, implementation=implementation, dropout=dropout)

    torch.manual_seed(0)
    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    found = torch.func.vmap(gradients, randomness="same")(*arrays)
    for index in range(2):
        torch.manual_seed(0)
        expected = torch.func.grad(loss, argnums=(0, 1, 2))(*(each[index] for each in arrays))
        for ours, theirs in zip(found, expected, strict=True):
            assert_bitwise(as_numpy(ours[index]), as_numpy(theirs), f"sample {index}")
    mapped, one = (arrays[0], arrays[1][0], arrays[2][0]), [each[0] for each in arrays]
    torch.manual_seed(0)
    shared = torch.func.vmap(loss, in_dims=(0, None, None), randomness="same")(*mapped)
    torch.manual_seed(0)
    assert_bitwise(as_numpy(shared[0]), as_numpy(loss(*one)), "shared")


@each_windowed
def test_checkpointing_changes_nothing(implementation: str, dropout: float) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation, "dropout": dropout}
    torch.manual_seed(0)
    exact = torch.autograd.grad(_loss(*arrays, **options), arrays)
    torch.manual_seed(0)
    loss = checkpoint(_loss, *arrays, use_reentrant=False, **options)
    for ours, theirs in zip(torch.autograd.grad(loss, arrays), exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")
    with torch.no_grad():
        assert not _loss(*arrays, **options).requires_grad


@each_fused
def test_no_second_derivative(implementation: str) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300).values()]
    loss = _loss(*arrays, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, arrays[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use implementation='dense'"):
        torch.autograd.grad(gradient.square().sum(), arrays)


@each_fused
def test_autocast_does_not_narrow(implementation: str) -> None:
    arrays = draw(300, 300, dtype="float32")
    plain = with_gradients(arrays, slopes_of(), implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(arrays, slopes_of(), implementation=implementation)
    for name, array in plain.items():
        assert_bitwise(inside[name], array, name)


def test_shapes_alone_on_the_meta_device() -> None:
    arrays = {name: each.to("meta") for name, each in draw(300, 400).items()}
    attended = alibi_torch.attention(**arrays, slopes=slopes_of().to("meta"))
    assert attended.shape == (2, 4, 300, WIDTH)
    assert attended.device.type == "meta"


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


@each_fused
def test_strides_do_not_matter(implementation: str) -> None:
    """Heads split by a view, as in the model; and columns that are not adjacent."""
    arrays = draw(300, 300)
    exact = with_gradients(arrays, slopes_of(), implementation=implementation)
    views = {
        name: each.transpose(1, 2).contiguous().transpose(1, 2) for name, each in arrays.items()
    }
    columns = {name: each.mT.contiguous().mT for name, each in arrays.items()}
    for moved in (views, columns):
        options = {"slopes": slopes_of(), "implementation": implementation}
        found = as_numpy(alibi_torch.attention(**moved, **options))
        assert_within(found, exact["attended"], BUDGETS["float64", "cpu"].forward, "views")
