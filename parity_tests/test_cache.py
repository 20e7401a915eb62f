"""What a model computes with a cache is what it computes from the whole sequence (SPEC.md §10)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from alibi_spec.cache import Cache, bucket
from parity_tests.cases import CONFIGS, SEQ, draw_inputs, draw_mask, draw_parameters
from parity_tests.compare import assert_within

# Those whose attention differs; the rest of a model does not know of a cache.
DISTINCT = ("lm-tied", "odd-heads", "bare", "own-slopes", "grouped", "rounded-bias")
CHUNKS = (0, 149, 150, SEQ - 1, SEQ)  # twice a chunk and a single query, of two shapes in all

Call = Callable[[np.ndarray, np.ndarray | None, Any], tuple[np.ndarray, Any]]


def _torch(config: ALiBiConfig, parameters: Any, dtype: str, capacity: int) -> tuple[Call, Any]:
    bare = config.vocab_size is None
    model = (alibi_torch.ALiBiTransformer if bare else alibi_torch.ALiBiLM)(config).eval()
    model.load_state_dict({name: as_torch(array) for name, array in parameters.items()})
    model.to(getattr(torch, dtype))

    def call(inputs: np.ndarray, mask: np.ndarray | None, cache: Any) -> tuple[np.ndarray, Any]:
        given = torch.tensor(inputs)
        given = given if given.dtype == torch.int64 else given.to(getattr(torch, dtype))
        with torch.no_grad():
            result = model(given, None if mask is None else torch.tensor(mask), cache=cache)
        output, cache = (result, None) if cache is None else result
        return as_numpy(output), cache

    return call, lambda batch: alibi_torch.KVCache.empty(config, batch, capacity)


def _flax(config: ALiBiConfig, parameters: Any, dtype: str, capacity: int) -> tuple[Call, Any]:
    bare = config.vocab_size is None
    model_class = alibi_flax.ALiBiTransformer if bare else alibi_flax.ALiBiLM
    model = model_class(config, dtype=dtype, param_dtype=dtype)
    wide = {row for row in parameters if row.endswith("slopes")}
    state = {
        name: as_torch(array).to(
            torch.float32 if name in wide and dtype != "float64" else getattr(torch, dtype)
        )
        for name, array in parameters.items()
    }
    params = torch_to_flax(state, config)
    step = jax.jit(lambda *given, cache: model.apply({"params": params}, *given, cache=cache))

    def call(inputs: np.ndarray, mask: np.ndarray | None, cache: Any) -> tuple[np.ndarray, Any]:
        result = step(jnp.asarray(inputs), mask, cache=cache)
        output, cache = (result, None) if cache is None else result
        return np.asarray(output), cache

    def empty(batch: int) -> Any:
        return alibi_flax.KVCache.empty(config, batch, capacity, dtype=dtype)

    return call, empty


BARE = CONFIGS["bare"]
BACKENDS = {"torch": _torch, "flax": _flax}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("padding", ["unpadded", "both-and-empty"])
@pytest.mark.parametrize("config_name", [*DISTINCT, "learned-slopes"])
def test_the_reference_cached(config_name: str, padding: str) -> None:
    config = CONFIGS[config_name]
    parameters, inputs, mask = draw_parameters(config), draw_inputs(config), draw_mask(padding)
    whole = reference_forward(config, parameters, inputs, mask, interpolated_len=SEQ)
    cache, parts = Cache.empty(config, len(inputs)), []
    for part in _parts():
        its_mask = None if mask is None else mask[:, part]
        trace = reference_forward(
            *(config, parameters, inputs[:, part], its_mask), cache=cache, interpolated_len=SEQ
        )
        cache = cache.extended(trace, its_mask)
        parts.append(trace["output"])
    assert cache.length == SEQ
    limit = AGREEMENTS["float64 sums"].relative
    assert_within(np.concatenate(parts, axis=1), whole["output"], limit, config_name)


@each_backend
@pytest.mark.parametrize(
    ("config_name", "padding"),
    [*((name, "both-and-empty") for name in DISTINCT), ("lm-tied", "unpadded")],
)
def test_cached_is_uncached(config_name: str, padding: str, backend: str) -> None:
    """Chunks and single queries against the float64 reference, which reads all at once."""
    config = dataclasses.replace(CONFIGS[config_name], slope_interpolation=None)
    inputs, mask = draw_inputs(config), draw_mask(padding)
    call, empty = BACKENDS[backend](config, draw_parameters(config), "float32", SEQ + 5)
    cache, exact = empty(len(inputs)), _exact(config, padding)
    for part in _parts():
        output, cache = call(inputs[:, part], None if mask is None else mask[:, part], cache)
        limit = BUDGETS["float32", "cpu"].forward
        what = f"{config_name}, {part}"
        assert_within(output, exact[:, part], limit, what, dtype="float32")
    assert int(cache.length) == SEQ


@each_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str, backend: str) -> None:
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1, num_kv_heads=1)
    parameters = draw_parameters(config, dtype)
    inputs, mask = draw_inputs(config), draw_mask("left")
    exact = _exact(config, "left", dtype)
    call, empty = BACKENDS[backend](config, parameters, dtype, SEQ)
    cache, budget = empty(len(inputs)), BUDGETS[dtype, "cpu"]
    for part in _parts():
        output, cache = call(inputs[:, part], mask[:, part], cache)
        assert_within(output, exact[:, part], budget.forward, f"{part}", dtype=dtype)


@each_backend
def test_every_step_far_past_the_trained_length(backend: str) -> None:
    """512 single queries, each against all that was read before it."""
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
    parameters, inputs = draw_parameters(config), draw_inputs(config, batch=2, seq=520)
    exact = reference_forward(config, parameters, inputs)["logits"]
    call, empty = BACKENDS[backend](config, parameters, "float32", 520)
    _, cache = call(inputs[:, :8], None, empty(2))
    for position in range(8, 520):
        output, cache = call(inputs[:, position : position + 1], None, cache)
        found, limit = output[:, 0], BUDGETS["float32", "cpu"].forward
        assert_within(found, exact[:, position], limit, f"{position}", dtype="float32")


@each_backend
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_interpolated_slopes_go_by_all_keys(backend: str, dtype: str) -> None:
    """What a chunk takes is the slopes of the keys that it ends with, as in the reference."""
    config = CONFIGS["learned-slopes"]
    parameters, inputs = draw_parameters(config), draw_inputs(config)
    if dtype == "float64":
        parameters = {name: array.astype(dtype) for name, array in parameters.items()}
    call, empty = BACKENDS[backend](config, parameters, dtype, SEQ)
    cache, reference = empty(len(inputs)), Cache.empty(config, len(inputs))
    for part in _parts():
        trace = reference_forward(config, parameters, inputs[:, part], cache=reference)
        reference = reference.extended(trace)
        output, cache = call(inputs[:, part], None, cache)
        limit = BUDGETS[dtype, "cpu"].forward
        assert_within(output, trace["logits"], limit, str(part), dtype=dtype)


@each_backend
def test_only_the_last_logits(backend: str) -> None:
    """`logits_to_keep`, with a cache and without."""
    config = CONFIGS["lm-untied"]
    parameters, inputs = draw_parameters(config), draw_inputs(config, batch=1, seq=20)
    state = {name: as_torch(array) for name, array in parameters.items()}
    if backend == "torch":
        model = alibi_torch.ALiBiLM(config).eval()
        model.load_state_dict(state)
        tokens = torch.tensor(inputs)
        with torch.no_grad():
            whole, kept = model(tokens), model(tokens, logits_to_keep=3)
        whole, kept = as_numpy(whole), as_numpy(kept)
    else:
        model, variables = alibi_flax.ALiBiLM(config), {"params": torch_to_flax(state, config)}
        whole = np.asarray(model.apply(variables, inputs))
        kept = np.asarray(model.apply(variables, inputs, logits_to_keep=3))
    assert_within(kept, whole[:, -3:], BUDGETS["float32", "cpu"].forward, "the last three")


@each_backend
def test_what_a_cache_refuses(backend: str) -> None:
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
    parameters, inputs = draw_parameters(config), draw_inputs(config, batch=2, seq=9)
    call, empty = BACKENDS[backend](config, parameters, "float32", 8)
    kind = {"torch": alibi_torch, "flax": alibi_flax}[backend].KVCache
    with pytest.raises(ValueError, match=r"an encoder \(causal=False\) has no cache"):
        kind.empty(CONFIGS["encoder"], 2, 8)
    with pytest.raises(ValueError, match="the cache holds 3 sequences and the inputs have 2"):
        call(inputs[:, :4], None, empty(3))
    with pytest.raises(ValueError, match="room for 8 positions and holds 0; 9 more do not fit"):
        call(inputs, None, empty(2))
    with pytest.raises(ValueError, match="this cache belongs to a model with another"):
        call(inputs[:, :4], None, kind.empty(CONFIGS["grouped"], 2, 8))
    used = empty(2)
    _, cache = call(inputs[:, :5], None, used)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        call(inputs[:, :4], np.ones((2, 9), int), cache)


def test_autocast_narrows_no_step() -> None:
    """A step with float32 queries stays float32, as attention without a cache does."""
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({k: as_torch(v) for k, v in draw_parameters(config).items()})
    attn, x = model.transformer.layers[0].attn, torch.tensor(draw_inputs(BARE, seq=SEQ))
    with torch.no_grad():
        inputs = attn.attention_inputs(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = alibi_torch.attention(**inputs, implementation="dense")
        cache = alibi_torch.KVCache.empty(config, len(x), SEQ)
        for part in (slice(0, SEQ - 1), slice(SEQ - 1, SEQ)):
            chunk = {**inputs, **{k: inputs[k][:, :, part] for k in ("query", "key", "value")}}
            cache = cache.grown(cache.config, (len(x), part.stop - part.start), None)
            found = cache.attend(0, chunk, "auto")
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(as_numpy(found[:, :, 0]), as_numpy(whole[:, :, -1]), limit, "a step")


def test_torch_caches_are_used_once_and_keep_no_gradients() -> None:
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
    model, tokens = alibi_torch.ALiBiLM(config).eval(), torch.zeros(1, 4, dtype=torch.int64)
    cache = alibi_torch.KVCache.empty(config, 1, 8)
    with pytest.raises(ValueError, match="a cache keeps no gradients; call the model under"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="this cache was already used: its memory"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="the model is in training mode"):
        alibi_torch.ALiBiLM(config)(tokens, cache=alibi_torch.KVCache.empty(config, 1, 8))
    with torch.no_grad():
        _, cache = model(tokens, cache=alibi_torch.KVCache.empty(config, 1, 8))
        with pytest.raises(
            ValueError, match=r"holds torch\.float32 and the model computes torch\.f"
        ):
            model.double()(tokens, cache=cache)


def test_flax_caches_that_are_donated_or_overflow() -> None:
    """A compiled program cannot refuse: what does not fit gives NaN, never a plausible number."""
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
    model, tokens = alibi_flax.ALiBiLM(config), jnp.zeros((1, 3), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    step = jax.jit(lambda cache: model.apply(variables, tokens, cache=cache), donate_argnums=0)
    first = alibi_flax.KVCache.empty(config, 1, 8)
    logits, second = step(first)
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match="this cache was already used: its memory"):
        model.apply(variables, tokens, cache=first)
    logits, third = step(second)
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match="room for 8 positions and holds 6; 3 more do not fit"):
        model.apply(variables, tokens, cache=third)
    assert np.isnan(step(third)[0]).all()
    narrow = alibi_flax.KVCache.empty(config, 1, 8, dtype="bfloat16")
    with pytest.raises(ValueError, match="holds bfloat16 and the model computes float32"):
        model.apply(variables, tokens, cache=narrow)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    with pytest.raises(ValueError, match="a cache is for inference"):
        model.apply(variables, tokens, cache=narrow, **options)


def test_buckets() -> None:
    """The least length of the list that fits: at most half as much again."""
    lengths = [16, 24, 32, 48, 64, 96, 128, 192, 256]
    for length in range(1, 257):
        assert bucket(length) == next(each for each in lengths if each >= length)


@lru_cache
def _exact(config: ALiBiConfig, padding: str, dtype: str = "float32") -> np.ndarray:
    """What the reference makes of the whole inputs."""
    parameters, inputs = draw_parameters(config, dtype), draw_inputs(config)
    trace = reference_forward(config, parameters, inputs, draw_mask(padding))
    return trace["output" if config.vocab_size is None else "logits"]


def _parts() -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(CHUNKS)]
