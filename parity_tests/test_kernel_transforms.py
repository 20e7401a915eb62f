"""What frameworks do to functions, done to both backends' kernels: derivatives of derivatives,
mapping, computing again, autocast, checks for NaN. test_kernel_export.py compiles and exports them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from jax.experimental import checkify
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import alibi_flax
import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.jax_calls import (
    JAX_SLOPES,
    LONG,
    SHORT,
    VOCAB,
    jax_arrays,
    jax_attend,
    jax_mask,
    jax_model,
    jax_tokens,
)
from parity_tests.torch_calls import (
    SLOPES,
    draw,
    each_fused,
    each_windowed,
    loss_of,
    masks_of,
    slopes_of,
    with_gradients,
)

forward_mode = pytest.mark.filterwarnings(  # torch's own
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


# Derivatives of derivatives.


@each_fused
def test_no_second_derivative_in_torch(implementation: str) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300).values()]
    loss = loss_of(*arrays, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, arrays[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use implementation='dense'"):
        torch.autograd.grad(gradient.square().sum(), arrays)


def test_no_second_derivative_in_jax() -> None:
    query, key, value = jax_arrays(LONG)

    def gradient(query: Array, **options: Any) -> Array:
        attend = partial(jax_attend, **options)
        return jax.grad(lambda query: attend(query, key, value, jax_mask(LONG)).sum())(query)

    for differentiate in (
        lambda query: jax.grad(lambda query: (gradient(query) ** 2).sum())(query),
        lambda query: jax.jvp(jax.jit(gradient), (query,), (query,)),
    ):
        with pytest.raises(RuntimeError, match="no second derivative; use implementation="):
            differentiate(query)
    jax.jvp(partial(gradient, implementation="dense"), (query,), (query,))


@forward_mode
@each_fused
def test_no_forward_mode_derivative_in_torch(implementation: str) -> None:
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


def test_no_forward_mode_derivative_in_jax() -> None:
    arrays = tuple(jax_arrays(LONG))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda *arrays: jax_attend(*arrays, jax_mask(LONG)), arrays, arrays)


@forward_mode
def test_attention_without_tangents_in_forward_mode() -> None:
    query, key, value = draw(300, 300).values()
    expected = alibi_torch.attention(query, key, value, SLOPES)

    def scaled(factor: torch.Tensor) -> torch.Tensor:
        return factor * alibi_torch.attention(query, key, value, SLOPES)

    two = torch.tensor(2.0, dtype=torch.float64)
    _, tangent = torch.func.jvp(scaled, (two,), (two,))
    assert_bitwise(as_numpy(tangent), as_numpy(2 * expected), "tangent")


@forward_mode
@pytest.mark.parametrize("masks", ["none", "mask-segments"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_forward_mode_of_dense_attention(backend: str, masks: str) -> None:
    """<w, J v> is <Jᵀ w, v>."""
    ours, framework = (alibi_torch, torch.func) if backend == "torch" else (alibi_flax, jax)
    place: Any = torch.from_numpy if backend == "torch" else jnp.asarray
    rng, shape = np.random.default_rng(1), (2, 4, 40, 8) if backend == "torch" else (2, 40, 4, 8)
    arrays, tangents = (
        tuple(place(rng.standard_normal(shape)) for _ in range(3)) for _ in range(2)
    )
    options = {name: place(as_numpy(mask)) for name, mask in masks_of(masks, 40).items()}

    slopes = place(as_numpy(SLOPES))

    def attend(*arrays: Any) -> Any:
        return ours.attention(*arrays, slopes, implementation="dense", **options)

    attended, forwards = framework.jvp(attend, arrays, tangents)
    cotangent = place(rng.standard_normal(tuple(attended.shape)))
    _, pull_back = framework.vjp(attend, *arrays)
    pairs = zip(pull_back(cotangent), tangents, strict=True)
    backwards = np.asarray(sum((gradient * tangent).sum() for gradient, tangent in pairs))
    found = np.asarray((cotangent * forwards).sum())
    assert_within(found, backwards, AGREEMENTS["float64 sums"].relative, "products")


# Mapping, computing again, autocast.


@each_windowed
def test_per_sample_gradients(implementation: str, dropout: float) -> None:
    """vmap over grad, and only vmap; each sample with the same dropout."""
    arrays = [each[:, None] for each in draw(300, 300, dtype="float32").values()]

    def loss(*arrays: torch.Tensor) -> torch.Tensor:
        return loss_of(*arrays, implementation=implementation, dropout=dropout)

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
def test_computing_again_in_torch_changes_nothing(implementation: str, dropout: float) -> None:
    arrays = [each.requires_grad_() for each in draw(300, 300, dtype="float32").values()]
    options = {"implementation": implementation, "dropout": dropout}
    torch.manual_seed(0)
    exact = torch.autograd.grad(loss_of(*arrays, **options), arrays)
    torch.manual_seed(0)
    loss = checkpoint(loss_of, *arrays, use_reentrant=False, **options)
    for ours, theirs in zip(torch.autograd.grad(loss, arrays), exact, strict=True):
        assert_bitwise(as_numpy(ours), as_numpy(theirs), "gradient")
    with torch.no_grad():
        assert not loss_of(*arrays, **options).requires_grad


def test_mapped_and_computed_again_in_jax() -> None:
    """vmap and remat of gradients, of every array and of traced slopes."""
    arrays = draw(LONG // 2, LONG // 2)
    query, key, value = (jnp.asarray(as_numpy(x[:1])).swapaxes(1, 2) for x in arrays.values())
    slopes = 6 * jnp.asarray(JAX_SLOPES)

    def attend(*arrays: Array) -> Array:
        options: dict[str, Any] = {"dropout": 0.3, "dropout_rng": jax.random.key(3)}
        return alibi_flax.attention(*arrays, implementation="blockwise", **options)

    def total(attend: Any, scale: Array, slopes: Array, query: Array, *rest: Array) -> Array:
        return attend(scale * query, *rest, slopes).sum()

    limit = BUDGETS["float64", "cpu"].gradient
    gradient, again = (
        jax.jit(jax.grad(partial(total, each), argnums=(0, 1, 2, 3, 4)))
        for each in (attend, jax.checkpoint(attend))
    )
    scales, rates = jnp.asarray([0.5, 2.0]), jnp.stack([slopes, 2 * slopes])
    mapping = jax.vmap(gradient, in_axes=(0, 0, None, None, None))
    found = jax.jit(mapping)(scales, rates, query, key, value)
    for number in range(2):
        arguments = (scales[number], rates[number], query, key, value)
        expected = gradient(*arguments)
        mapped = [part[number] for part in found]
        for what, parts in (("vmap", mapped), ("remat", again(*arguments))):
            for part, exact in zip(parts, expected, strict=True):
                assert_within(np.asarray(part), np.asarray(exact), limit, what)


@each_fused
def test_autocast_does_not_narrow(implementation: str) -> None:
    arrays = draw(300, 300, dtype="float32")
    plain = with_gradients(arrays, slopes_of(), implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(arrays, slopes_of(), implementation=implementation)
    for name, array in plain.items():
        assert_bitwise(inside[name], array, name)


# Checks for NaN, on the way of a model of JAX.


def _loss_of(length: int) -> tuple[Any, Any]:
    """The loss of a model on padded sequences, as a function of its parameters; these."""
    model, params = jax_model()
    tokens, mask = jax_tokens(length), jax_mask(length)
    targets = jax.nn.one_hot(tokens[:, 1:], VOCAB)

    def loss(params: Any) -> Array:
        logits: Any = model.apply(params, tokens, mask)
        of_token = -(jax.nn.log_softmax(logits[:, :-1]) * targets).sum(axis=-1)
        return (of_token * mask[:, 1:]).sum() / mask[:, 1:].sum()

    return loss, params


@pytest.mark.parametrize("length", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_checkify_finds_nothing(length: int) -> None:
    """No NaN, no division by 0 and no index out of bounds on the way, in padding neither."""
    loss, params = _loss_of(length)
    checked = checkify.checkify(jax.jit(jax.value_and_grad(loss)), errors=checkify.all_checks)
    error, _ = checked(params)
    error.throw()


@pytest.mark.slow
def test_debug_nans_finds_nothing() -> None:
    """After any operation: of a compiled program only the results would be looked at."""
    loss, params = _loss_of(LONG)
    with jax.debug_nans(True):
        jax.block_until_ready(jax.value_and_grad(loss)(params))
