"""What torch does to functions, done to its kernels: compiling, exporting, mapping, and so on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_torch.kernels.dense import PAYS_BELOW
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
forward_mode = pytest.mark.filterwarnings(  # torch's own
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


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


@each_fused
def test_compiles_without_gradients(implementation: str) -> None:
    arrays = list(draw(300, 300, dtype="float32").values())

    def attend(*arrays: torch.Tensor) -> torch.Tensor:
        return alibi_torch.attention(*arrays, SLOPES, implementation=implementation)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_bitwise(as_numpy(compiled(*arrays)), as_numpy(attend(*arrays)), "attended")


@pytest.mark.parametrize("masks", ["none", "mask"])
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


@pytest.mark.parametrize("traced_length", [100, 600])
@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "padded"])
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


@forward_mode
@each_fused
def test_no_forward_mode_derivative(implementation: str) -> None:
    """Under torch.func, with plain dual numbers, and compiled, where it would be 0."""
    arrays = tuple(draw(300, 300).values())

    def attend(*arrays: torch.Tensor) -> torch.Tensor:
        return alibi_torch.attention(*arrays, SLOPES, implementation=implementation)

    def with_dual_numbers(*arrays: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            return attend(*(forward_ad.make_dual(each, each) for each in arrays))

    def derivative(*arrays: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(attend, arrays, arrays)[1]

    def mapped(*arrays: torch.Tensor) -> torch.Tensor:
        arrays = tuple(each[:, None] for each in arrays)
        return torch.func.jvp(torch.func.vmap(attend), arrays, arrays)[1]

    compiled = torch.compile(derivative, backend="aot_eager")
    for function in (derivative, mapped, with_dual_numbers, compiled):
        with pytest.raises(RuntimeError, match="no forward-mode derivative; use implementation="):
            function(*arrays)


@forward_mode
def test_what_has_no_tangent_may_stand_beside() -> None:
    query, key, value = draw(300, 300).values()
    expected = alibi_torch.attention(query, key, value, SLOPES)

    def scaled(factor: torch.Tensor) -> torch.Tensor:
        return factor * alibi_torch.attention(query, key, value, SLOPES)

    two = torch.tensor(2.0, dtype=torch.float64)
    _, tangent = torch.func.jvp(scaled, (two,), (two,))
    assert_bitwise(as_numpy(tangent), as_numpy(2 * expected), "tangent")


@forward_mode
@pytest.mark.parametrize("masks", ["none", "mask-segments"])
def test_forward_mode_of_dense_attention(masks: str) -> None:
    """<w, J v> is <Jᵀ w, v>."""
    arrays = tuple(draw(40, 50).values())
    torch.manual_seed(1)
    tangents = tuple(torch.randn_like(each) for each in arrays)

    def attend(*arrays: torch.Tensor) -> torch.Tensor:
        options = {"implementation": "dense", **masks_of(masks, 50)}
        return alibi_torch.attention(*arrays, SLOPES, **options)

    attended, forwards = torch.func.jvp(attend, arrays, tangents)
    cotangent = torch.randn_like(attended)
    _, pull_back = torch.func.vjp(attend, *arrays)
    pairs = zip(pull_back(cotangent), tangents, strict=True)
    backwards = sum((gradient * tangent).sum() for gradient, tangent in pairs)
    torch.testing.assert_close((cotangent * forwards).sum(), backwards, rtol=1e-12, atol=0)


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
