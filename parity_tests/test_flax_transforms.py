"""What JAX does to functions, done to its kernels: exporting, forward mode, checks for NaN."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental import checkify
from jax.export import export, symbolic_shape

import alibi_flax
from alibi_flax.kernels.dense import PAYS_BELOW
from alibi_spec import ALiBiConfig, slopes
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_bitwise, assert_within

BATCH, HEADS, HEAD_DIM, VOCAB = 3, 4, 8, 23
SHORT, LONG = 40, 600
SLOPES = jnp.asarray(slopes(HEADS))
assert SHORT**2 < PAYS_BELOW < LONG**2


def _draw(length: int) -> list[Array]:
    rng = np.random.default_rng(0)
    shape = (BATCH, length, HEADS, HEAD_DIM)
    return [jnp.asarray(rng.standard_normal(shape)) for _ in range(3)]


def _mask(length: int) -> Array:
    """A whole sequence, one that is padded on the left, and one on the right."""
    position = np.arange(length)
    rows = [position >= 0, position >= length // 3, position < length - length // 3]
    return jnp.asarray(np.stack(rows), jnp.int32)


def _attend(query: Array, key: Array, value: Array, mask: Array, **options: Any) -> Array:
    return alibi_flax.attention(query, key, value, SLOPES, attention_mask=mask, **options)


def _gradient(*arrays: Array) -> Array:
    return jax.grad(lambda query, *rest: _attend(query, *rest).sum())(*arrays)


def _exported(function: Any, *arrays: Array, symbols: str = "") -> Any:
    """A program for arrays of these shapes, but for the leading axes that have symbols."""
    sizes = symbolic_shape(symbols) if symbols else ()
    shapes = [
        jax.ShapeDtypeStruct((*sizes, *x.shape[len(sizes) :]), x.dtype, sharding=None)
        for x in arrays
    ]
    return export(jax.jit(function))(*shapes).call


@pytest.mark.parametrize("function", [_attend, _gradient], ids=["attended", "gradient"])
@pytest.mark.parametrize("symbols", ["", "batch,"])
def test_windows_are_exported(function: Any, symbols: str) -> None:
    arrays = (*_draw(LONG), _mask(LONG))
    found = _exported(function, *arrays, symbols=symbols)(*arrays)
    assert_bitwise(np.asarray(found), np.asarray(jax.jit(function)(*arrays)), "exported")


@pytest.mark.parametrize("function", [_attend, _gradient], ids=["attended", "gradient"])
def test_symbolic_lengths_are_dense(function: Any) -> None:
    arrays = (*_draw(LONG), _mask(LONG))
    with pytest.warns(UserWarning, match="costs the square of the length.*one program for each"):
        program = _exported(function, *arrays, symbols="batch, seq")
    for length in (SHORT, LONG):
        arrays = (*_draw(length), _mask(length))
        limit = BUDGETS["float64", "cpu"].gradient
        expected = np.asarray(function(*arrays))
        assert_within(np.asarray(program(*arrays)), expected, limit, f"{length} tokens")


def test_who_asks_for_dense_is_not_warned() -> None:
    arrays = (*_draw(LONG), _mask(LONG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _exported(lambda *arrays: _attend(*arrays, implementation="dense"), *arrays, symbols="b, n")


def test_windows_refuse_symbolic_lengths() -> None:
    arrays = (*_draw(LONG), _mask(LONG))
    with pytest.raises(ValueError, match="n queries and n keys; use 'dense', or export one"):
        _exported(
            lambda *arrays: _attend(*arrays, implementation="blockwise"), *arrays, symbols="b, n"
        )


def _model(**options: Any) -> tuple[alibi_flax.ALiBiLM, Any]:
    config = ALiBiConfig(
        num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, vocab_size=VOCAB, **options
    )
    model = alibi_flax.ALiBiLM(config)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def _tokens(length: int) -> Array:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, length))
    return jnp.asarray(tokens, jnp.int32)


def test_models_are_exported_for_any_length() -> None:
    """Slopes, too, go by the length that comes."""
    model, params = _model(slope_interpolation=256)

    def logits(tokens: Array, mask: Array) -> Any:
        return model.apply(params, tokens, mask)

    with pytest.warns(UserWarning, match="costs the square of the length"):
        program = _exported(logits, _tokens(LONG), _mask(LONG), symbols="batch, seq")
    for length in (SHORT, LONG):
        arguments = (_tokens(length), _mask(length))
        expected = np.asarray(logits(*arguments))
        budget = BUDGETS["float32", "cpu"].forward
        assert_within(np.asarray(program(*arguments)), expected, budget, f"{length} tokens")


def test_windows_have_no_forward_mode_derivative() -> None:
    arrays = tuple(_draw(LONG))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda *arrays: _attend(*arrays, _mask(LONG)), arrays, arrays)


def test_windows_have_no_second_derivative() -> None:
    query, key, value = _draw(LONG)

    def gradient(query: Array, **options: Any) -> Array:
        attend = partial(_attend, **options)
        return jax.grad(lambda query: attend(query, key, value, _mask(LONG)).sum())(query)

    for differentiate in (
        lambda query: jax.grad(lambda query: (gradient(query) ** 2).sum())(query),
        lambda query: jax.jvp(jax.jit(gradient), (query,), (query,)),
    ):
        with pytest.raises(RuntimeError, match="no second derivative; use implementation="):
            differentiate(query)
    jax.jvp(partial(gradient, implementation="dense"), (query,), (query,))


def test_forward_mode_of_dense_attention() -> None:
    """<w, J v> is <Jᵀ w, v>."""
    rng, arrays = np.random.default_rng(1), tuple(_draw(SHORT))
    tangents = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in arrays)

    def attend(*arrays: Array) -> Array:
        return _attend(*arrays, _mask(SHORT), implementation="dense")

    attended, forwards = jax.jvp(attend, arrays, tangents)
    cotangent = jnp.asarray(rng.standard_normal(attended.shape))
    _, pull_back = jax.vjp(attend, *arrays)
    pairs = zip(pull_back(cotangent), tangents, strict=True)
    backwards = sum((gradient * tangent).sum() for gradient, tangent in pairs)
    np.testing.assert_allclose((cotangent * forwards).sum(), backwards, rtol=1e-12)


def _loss_of(length: int) -> tuple[Any, Any]:
    """The loss of a model on padded sequences, as a function of its parameters; these."""
    model, params = _model()
    tokens, mask = _tokens(length), _mask(length)
    targets = jax.nn.one_hot(tokens[:, 1:], VOCAB)

    def loss(params: Any) -> Array:
        logits: Any = model.apply(params, tokens, mask)
        of_token = -(jax.nn.log_softmax(logits[:, :-1]) * targets).sum(axis=-1)
        return (of_token * mask[:, 1:]).sum() / mask[:, 1:].sum()

    return loss, params


each_length = pytest.mark.parametrize("length", [SHORT, LONG])


@each_length
def test_checkify_finds_nothing(length: int) -> None:
    """No NaN, no division by 0 and no index out of bounds on the way, in padding neither."""
    loss, params = _loss_of(length)
    checked = checkify.checkify(jax.jit(jax.value_and_grad(loss)), errors=checkify.all_checks)
    error, _ = checked(params)
    error.throw()


def test_debug_nans_finds_nothing() -> None:
    """After any operation: of a compiled program only the results would be looked at."""
    loss, params = _loss_of(LONG)
    with jax.debug_nans(True):
        jax.block_until_ready(jax.value_and_grad(loss)(params))
