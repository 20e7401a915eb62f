"""A cache that keeps of each head only what it provably needs computes the same (SPEC.md §16)."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext
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
from alibi_flax.kernels import certificate as flax_certificate
from alibi_spec import ALiBiConfig, parameter_table, reference_forward
from alibi_spec.bounds import model_windows
from alibi_spec.budgets import BUDGETS
from alibi_spec.cache import Ring, rings
from alibi_spec.certificate import TOLERANCES, keys_needed
from alibi_torch.kernels import certificate as torch_certificate
from alibi_torch.kernels import decode, nearest
from parity_tests.compare import assert_within

SEQ = 503
BASE = ALiBiConfig(
    num_layers=2, d_model=24, num_heads=3, slopes=(1.5, 0.6, 0.9), vocab_size=31, max_len=64
)
GROUPED = dataclasses.replace(BASE, num_heads=4, num_kv_heads=2, slopes=(1.5, 0.6, 0.9, 1.2))
# Two shapes: single queries, and chunks that are longer than some rings and shorter than others,
# before and after these come round.
PARTS = (0, 100, 200, 201, 202, 302, 402, 403, 503)
each_backend = pytest.mark.parametrize("backend", ["torch", "flax"])


def test_heads_that_need_as_much_share_a_ring() -> None:
    config = dataclasses.replace(GROUPED, num_layers=3)
    windows = np.array([[17, 40, 3, 20], [200, 1, 1, 1], [5, -1, 90, 5]])
    expected = (
        (Ring((1,), 24), Ring((0,), 48)),
        (Ring((1,), 16), Ring((0,), 100)),
        (Ring((1,), 96), Ring((0,), 100)),
    )
    assert rings(config, windows, 100) == expected
    assert rings(config, None, 100) == ((Ring((0, 1), 100),),) * 3
    assert rings(config, np.abs(windows), None)[1] == (Ring((1,), 16), Ring((0,), 256))
    with pytest.raises(ValueError, match=r"windows have shape \(2, 4\); expected \(3, 4\)"):
        rings(config, windows[:2], 100)
    rounded = dataclasses.replace(config, distance="bfloat16")
    with pytest.raises(
        ValueError, match="counts its keys from the first one, so a cache must keep"
    ):
        rings(rounded, windows, 100)
    assert rings(rounded, np.full((3, 4), -1), 100) == rings(rounded, None, 100)
    for unbounded in (windows, None):
        with pytest.raises(ValueError, match="capacity=None needs windows that bound every head"):
            rings(config, unbounded, None)


def test_keys_that_are_not_needed_carry_no_mass() -> None:
    """Brute force, with the worst keys that there can be: all turned to the query, at full norm."""
    rng = np.random.default_rng(0)
    slopes, count = np.array([1.0, 0.25, 0.03, -0.5]), 4000
    query = rng.standard_normal((2, 4, 1, 16)).astype(np.float32) * 3
    own_key = rng.standard_normal((2, 2, 1, 16)).astype(np.float32)
    largest = np.array([[5.0, 9.0], [7.0, 6.0]])
    needed = keys_needed(query, own_key, largest, slopes, scale=0.25)[:, :, 0]
    for row, head in itertools.product(range(2), range(4)):
        if slopes[head] < 0:
            assert needed[row, head] == np.inf
            continue
        q, norm = query[row, head, 0].astype(float), largest[row, head // 2]
        logits = np.full(count, 0.25 * np.linalg.norm(q) * norm)
        logits[0] = 0.25 * q @ own_key[row, head // 2, 0]
        weights = np.exp(logits - slopes[head] * np.arange(count))
        here = int(needed[row, head])
        # The own key's term alone is the bound's denominator.
        assert 0 < weights[here:].sum() / weights[0] <= TOLERANCES["float32"]
        assert weights[here - 2 :].sum() / weights[0] > TOLERANCES["float32"]
    dead = keys_needed(query * np.float32(np.nan), own_key, largest, slopes)
    assert (dead == np.inf).all()


def test_backends_prove_what_the_specification_proves() -> None:
    """Never less; rounding up may add a key."""
    rng = np.random.default_rng(1)
    query = rng.standard_normal((2, 6, 5, 16)).astype(np.float32) * 2
    own_key = rng.standard_normal((2, 3, 5, 16)).astype(np.float32)
    largest, slopes = 5 + rng.random((2, 3)), np.array([1.0, 0.5, -1.0, 0.25, 0.01, 2.0])
    exact = keys_needed(query, own_key, largest, slopes, scale=0.3)
    in_torch, in_flax = torch_certificate.keys_needed, flax_certificate.keys_needed
    given: Any = (query, own_key, largest, slopes.astype(np.float32))
    narrow: Any = (query, own_key, largest.astype(np.float32), slopes.astype(np.float32))
    with jax.debug_nans(True):  # nor NaN on the way, where a slope does not fall
        by_flax = np.asarray(in_flax(*map(jnp.asarray, narrow), scale=0.3))
    by_torch = as_numpy(in_torch(*map(torch.tensor, given), scale=0.3))
    for found in (by_torch, by_flax):
        assert (np.isinf(found) == np.isinf(exact)).all()
        more = np.where(np.isinf(exact), 0, found - np.where(np.isinf(exact), 0, exact))
        assert ((more >= 0) & (more <= 1 + 1e-4 * np.abs(exact.clip(max=1e9)))).all()


@pytest.mark.parametrize(
    ("config", "is_padded"), [(BASE, False), (GROUPED, True)], ids=["own heads", "grouped, padded"]
)
@each_backend
def test_rings_give_what_all_keys_give(backend: str, config: ALiBiConfig, is_padded: bool) -> None:
    """Against the float64 reference, which reads all keys at once."""
    parameters, tokens, mask, exact = _exact(config, is_padded)
    windows, limit = model_windows(config, parameters), BUDGETS["float32", "cpu"].forward
    assert windows.max() < 400
    call = _Torch(config, parameters) if backend == "torch" else _Flax(config, parameters)
    for capacity in (SEQ, None) if backend == "torch" else (None,):
        cache = call.empty(3, capacity, windows=windows)
        sizes = {ring.size for of_layer in cache.rings for ring in of_layer}
        assert min(sizes) < 100 < max(sizes) < 400
        for start, end in itertools.pairwise(PARTS):
            its_mask = None if mask is None else mask[:, start:end]
            output, cache = call(tokens[:, start:end], its_mask, cache)
            seen = np.ones((3, end - start), bool) if mask is None else mask[:, start:end] == 1
            expected = np.where(seen[..., None], exact[:, start:end], 0)
            found = np.where(seen[..., None], output, np.float32(0))
            assert_within(found, expected, limit, f"{start} to {end}", dtype="float32")
        assert int(cache.length) == SEQ
        assert _held(cache) == _held(call.empty(3, None, windows=windows))


@each_backend
@pytest.mark.parametrize("distance", ["absolute", "bfloat16"])
def test_an_empty_batch(backend: str, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chunks and of steps, past the sizes of rings, and where a step reads a part."""
    monkeypatch.setattr(nearest, "PAYS_FROM", {4: 64})
    config = dataclasses.replace(BASE, num_layers=1, distance=distance)
    parameters = {row.name: np.zeros(row.shape, np.float32) for row in parameter_table(config)}
    call = _Torch(config, parameters) if backend == "torch" else _Flax(config, parameters)
    windows = None if distance == "bfloat16" else np.full((1, 3), 16)
    cache = call.empty(0, 90, windows=windows)
    for length in (70, 1, 5):
        output, cache = call(np.zeros((0, length), int), None, cache)
        assert output.shape == (0, length, 31)
    assert int(cache.length) == 76


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_half_precision(backend: str) -> None:
    config = dataclasses.replace(BASE, num_layers=1)
    parameters, tokens, _, exact = _exact(config, False)
    windows = model_windows(config, parameters, dtype="bfloat16")
    make = _Torch if backend == "torch" else _Flax
    call = make(config, parameters, "bfloat16")
    cache = call.empty(3, None, windows=windows)
    for start, end in itertools.pairwise(PARTS):
        output, cache = call(tokens[:, start:end], None, cache)
        limit = BUDGETS["bfloat16", "cpu"].forward
        assert_within(output, exact[:, start:end], limit, f"{start} to {end}", dtype="bfloat16")


@each_backend
def test_an_input_that_needs_more_is_refused(backend: str) -> None:
    """Windows from elsewhere are allowed, and never believed."""
    config = dataclasses.replace(BASE, num_layers=1)
    parameters, tokens, _, _ = _exact(config, False)
    windows = np.full((1, 3), 16)
    call = _Torch(config, parameters) if backend == "torch" else _Flax(config, parameters)
    _, cache = call(tokens[:, :16], None, call.empty(3, SEQ, windows=windows))
    if backend == "torch":
        with pytest.raises(ValueError, match="the cache no longer holds every key that this"):
            call(tokens[:, 16:17], None, cache)
    else:
        for position in (16, 17):
            output, cache = call(tokens[:, position : position + 1], None, cache)
            assert np.isnan(output).all()
            assert not cache.is_proved
    with pytest.raises(ValueError, match="the cache no longer holds every key that this"):
        call.generate(tokens[:, :9], 16, windows=windows)
    with pytest.raises(ValueError, match=r"windows have shape \(2, 3\); expected \(1, 3\)"):
        call.generate(tokens[:, :9], 16, windows=np.repeat(windows, 2, axis=0))


@each_backend
@pytest.mark.parametrize("first", [1, 50])
def test_the_largest_norm_is_not_forgotten(first: int, backend: str) -> None:
    """That of a first key, long after it has gone; the others need few keys."""
    config = dataclasses.replace(BASE, num_layers=1, num_heads=1, slopes=(0.5,))
    key = np.ones((1, 1, 80, 24), np.float32) / 8
    key[:, :, 0] *= first
    is_torch = backend == "torch"
    kind, array = (alibi_torch, torch.tensor) if is_torch else (alibi_flax, jnp.asarray)
    cache: Any = kind.KVCache.empty(config, 1, None, windows=np.array([[40]]))
    options = {"causal": True, "scale": 1.0, "attention_mask": None, "distance": "absolute"}
    options |= {"slopes": array([0.5]), "segment_ids": None}
    is_refused = False
    for start, end in ((0, 30), (30, 60), (60, 80)):
        part = array(key[:, :, start:end] if is_torch else key[:, :, start:end].swapaxes(1, 2))
        inputs = {**options, "query": 0 * part + 0.125, "key": part, "value": part}
        cache = cache.grown(cache.config, (1, end - start), None)
        if is_torch:
            must_fail = first == 50 and start == 60  # only then a key has gone
            with pytest.raises(ValueError, match="no longer") if must_fail else nullcontext():
                cache.attend(0, inputs, "dense")
            is_refused = must_fail
        else:
            _, cache = cache.attend(0, inputs, "dense")
            _, cache = cache.finished(jnp.zeros((1, 1, 24)))
            is_refused = not bool(cache.is_proved)
    assert is_refused == (first == 50)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("torch", "drawn"), ("flax", "drawn"), ("torch", "large gains"), ("torch", "flat slopes")],
)
def test_generation_in_constant_memory(backend: str, kind: str) -> None:
    """The same tokens. Hostile models are allowed whatever they need: their rings are whole."""
    slopes = (1.5, 0.0005, 0.9) if kind == "flat slopes" else BASE.slopes
    config = dataclasses.replace(BASE, slopes=slopes, num_layers=1)
    parameters, tokens, _, _ = _exact(config, False)
    if kind == "large gains":
        parameters = {
            name: array * np.float32(30 if "attn_norm.weight" in name else 1)
            for name, array in parameters.items()
        }
    windows = model_windows(config, parameters)
    call = _Torch(config, parameters) if backend == "torch" else _Flax(config, parameters)
    options = {"do_sample": True, "seed": 5, "temperature": 0.8, "prefill_chunk": 64}
    whole = call.generate(tokens[:, :150], 330, **options)
    kept = call.generate(tokens[:, :150], 330, windows=windows, **options)
    assert (kept == whole).all()
    assert len(np.unique(whole[:, 150:])) > 5
    assert (windows.max() < 330) == (kind == "drawn")


@pytest.mark.slow
@each_backend
def test_twenty_thousand_tokens(backend: str) -> None:
    """In rings of a few hundred positions, the same tokens as with all that was read."""
    parameters, tokens, _, _ = _exact(BASE, False)
    windows = model_windows(BASE, parameters)
    assert max(ring.size for of_layer in rings(BASE, windows, None) for ring in of_layer) < 400
    call = _Torch(BASE, parameters) if backend == "torch" else _Flax(BASE, parameters)
    options = {"do_sample": True, "seed": 2}
    whole = call.generate(tokens[:2, :20], 20_000, **options)
    kept = call.generate(tokens[:2, :20], 20_000, windows=windows, **options)
    assert (kept == whole).all()
    assert len(np.unique(kept[:, -1000:])) > 5


@pytest.mark.parametrize("case", ["unpadded", "padded", "rounded distances"])
def test_a_step_of_a_long_cache_reads_what_it_needs(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without windows from weights too, from some length on: the proof of the step itself.

    Rounded distances are not what it is about: all keys are read.
    """
    monkeypatch.setattr(nearest, "PAYS_FROM", {4: 64})
    monkeypatch.setattr(nearest, "NEAREST", 16)
    read = dict.fromkeys(("all", "nearest"), 0)

    def spied(name: str, attend: Any) -> Any:
        def call(*arguments: Any) -> torch.Tensor:
            read[name] += 1
            return attend(*arguments)

        return call

    monkeypatch.setattr(decode, "attention", spied("all", decode.attention))
    monkeypatch.setattr(nearest, "attention", spied("nearest", nearest.attention))
    distance = "bfloat16" if case == "rounded distances" else "absolute"
    config = dataclasses.replace(GROUPED, distance=distance)
    parameters, tokens, mask, exact = _exact(config, case == "padded")
    call = _Torch(config, parameters)
    cache, limit = call.empty(3, SEQ), BUDGETS["float32", "cpu"].forward
    for start, end in [(0, 440), *itertools.pairwise(range(440, SEQ + 1))]:
        its_mask = None if mask is None else mask[:, start:end]
        output, cache = call(tokens[:, start:end], its_mask, cache)
        seen = np.ones((3, end - start), bool) if mask is None else mask[:, start:end] == 1
        found, expected = (
            np.where(seen[..., None], x, np.float32(0)) for x in (output, exact[:, start:end])
        )
        assert_within(found, expected, limit, f"{start}", dtype="float32")
    steps = 2 * (SEQ - 440)  # of each layer
    proved = {"unpadded": steps, "padded": 2 * (459 - 440), "rounded distances": 0}[case]
    assert read == {"all": steps - proved, "nearest": proved}


class _Torch:
    def __init__(self, config: ALiBiConfig, parameters: Any, dtype: str = "float32") -> None:
        self.model = alibi_torch.ALiBiLM(config).eval()
        self.model.load_state_dict({name: as_torch(array) for name, array in parameters.items()})
        self.model.to(getattr(torch, dtype))
        self.config = config

    def empty(self, *arguments: Any, **options: Any) -> Any:
        return alibi_torch.KVCache.empty(self.config, *arguments, **options)

    def __call__(self, tokens: Any, mask: Any, cache: Any) -> tuple[np.ndarray, Any]:
        mask = None if mask is None else torch.tensor(mask)
        with torch.no_grad():
            output, cache = self.model(torch.tensor(tokens), mask, cache=cache)
        return as_numpy(output), cache

    def generate(self, tokens: np.ndarray, new: int, **options: Any) -> np.ndarray:
        return alibi_torch.generate(self.model, torch.tensor(tokens), new, **options).tokens.numpy()


class _Flax:
    def __init__(self, config: ALiBiConfig, parameters: Any, dtype: str = "float32") -> None:
        # Dense, which compiles in a fraction of the time; its kernels have tests of their own.
        options: Any = {"implementation": "dense", "dtype": dtype, "param_dtype": dtype}
        self.model = alibi_flax.ALiBiLM(config, **options)
        state = {k: as_torch(v).to(getattr(torch, dtype)) for k, v in parameters.items()}
        self.params, self.config, self.dtype = torch_to_flax(state, config), config, dtype
        self._step = jax.jit(
            lambda tokens, mask, cache: self.model.apply(
                {"params": self.params}, tokens, mask, cache=cache
            )
        )

    def empty(self, *arguments: Any, **options: Any) -> Any:
        return alibi_flax.KVCache.empty(self.config, *arguments, dtype=self.dtype, **options)

    def __call__(self, tokens: Any, mask: Any, cache: Any) -> tuple[np.ndarray, Any]:
        output, cache = self._step(tokens, mask, cache)
        return np.asarray(output), cache

    def generate(self, tokens: np.ndarray, new: int, **options: Any) -> np.ndarray:
        call: Any = alibi_flax.generate
        return np.asarray(call(self.model, self.params, tokens, new, **options).tokens)


def _held(cache: Any) -> int:
    """Positions times heads that a cache keeps."""
    return sum(len(ring.heads) * ring.size for of_layer in cache.rings for ring in of_layer)


@lru_cache
def _exact(
    config: ALiBiConfig, is_padded: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None, np.ndarray]:
    """Parameters, tokens, mask, and the logits of the reference."""
    rng = np.random.default_rng(0)
    parameters = {}
    for row in parameter_table(config):
        fan_in = row.shape[-1] if len(row.shape) > 1 else 4
        values = rng.standard_normal(row.shape) / np.sqrt(fan_in)
        parameters[row.name] = (values + (row.init == "ones")).astype(np.float32)
    tokens, mask = rng.integers(0, 31, (3, SEQ)), None
    if is_padded:
        mask = np.ones((3, SEQ), np.int64)
        mask[0, :20] = mask[1, 125:140] = mask[1, 300:440] = mask[2, 459:] = 0
    return parameters, tokens, mask, reference_forward(config, parameters, tokens, mask)["logits"]
