"""Documents that share a row are computed as if each were alone (SPEC.md §4.3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_gradients_within, assert_within

FLOAT32, FLOAT64 = BUDGETS["float32", "cpu"], BUDGETS["float64", "cpu"]

DECODER = ALiBiConfig(num_layers=1, d_model=30, num_heads=5, vocab_size=23)
ENCODER = dataclasses.replace(DECODER, causal=False, head="masked_lm", type_vocab_size=2)
# Of each row, the lengths of its documents; what is left is padding.
SHORT = (25, ((7, 12, 6), (1, 17)))
LONG = (620, ((300, 190, 130), (20, 500)))  # over windows


class Row:
    """A batch of packed rows, and its documents as (row, start, end)."""

    def __init__(self, seq: int, lengths: tuple[tuple[int, ...], ...]) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 23, (len(lengths), seq))
        self.mask, self.segment_ids = np.zeros((2, len(lengths), seq), np.int64)
        self.documents: list[tuple[int, int, int]] = []
        for row, its_lengths in enumerate(lengths):
            ends = np.cumsum(its_lengths)
            self.mask[row, : ends[-1]] = 1
            for number, (length, end) in enumerate(zip(its_lengths, ends, strict=True)):
                self.documents.append((row, end - length, end))
                self.segment_ids[row, end:] = number + 1


@pytest.mark.parametrize(
    "rows", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.parametrize("config", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_packed_documents_are_as_if_alone(config: ALiBiConfig, rows: Any) -> None:
    """Logits by the reference of each document, gradients by torch's float64 of each."""
    batch, parameters = Row(*rows), draw_parameters(config)
    cotangent = np.random.default_rng(1).standard_normal((*batch.tokens.shape, 23))
    cotangent *= batch.mask[..., None]
    exact = np.zeros_like(cotangent)
    wide = _torch_model(config, parameters).double()
    for row, start, end in batch.documents:
        document = batch.tokens[row : row + 1, start:end]
        exact[row, start:end] = reference_forward(config, parameters, document)["logits"][0]
        wide(as_torch(document)).backward(as_torch(cotangent[row : row + 1, start:end]))
    gradients = {name: as_numpy(each.grad) for name, each in wide.named_parameters()}
    packed = reference_forward(
        config, parameters, batch.tokens, batch.mask, segment_ids=batch.segment_ids
    )
    logits = packed["logits"] * batch.mask[..., None]
    assert_within(logits, exact, FLOAT64.forward, "reference")
    for backend in (_torch, _flax):
        logits, found = backend(config, parameters, batch, cotangent.astype(np.float32))
        logits, name = logits * batch.mask[..., None].astype(np.float32), backend.__name__
        assert_within(logits, exact, FLOAT32.forward, name, dtype="float32")
        assert_gradients_within(found, gradients, FLOAT32.gradient, name, dtype="float32")


def _torch_model(config: ALiBiConfig, parameters: Any) -> alibi_torch.ALiBiLM:
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({name: as_torch(array) for name, array in parameters.items()})
    return model


def _torch(config: ALiBiConfig, parameters: Any, batch: Row, cotangent: np.ndarray) -> Any:
    model = _torch_model(config, parameters)
    tokens, mask, segment_ids = map(as_torch, (batch.tokens, batch.mask, batch.segment_ids))
    logits = model(tokens, mask, segment_ids=segment_ids)
    logits.backward(as_torch(cotangent))
    gradients = {name: as_numpy(each.grad) for name, each in model.named_parameters()}
    return as_numpy(logits.detach()), gradients


def _flax(config: ALiBiConfig, parameters: Any, batch: Row, cotangent: np.ndarray) -> Any:
    model = alibi_flax.ALiBiLM(config)

    @jax.jit
    def pulled_back(params: Any) -> Any:
        options = {"segment_ids": batch.segment_ids}
        logits, pullback = jax.vjp(
            lambda params: model.apply({"params": params}, batch.tokens, batch.mask, **options),
            params,
        )
        return logits, pullback(jnp.asarray(cotangent))[0]

    params = jax.tree.map(jnp.asarray, flax_tree(Tensors.of(parameters), config))
    logits, gradients = pulled_back(params)
    return np.asarray(logits), canonical_tensors(gradients, config)


def _call(backend: str, config: ALiBiConfig, seq: int, segment_ids: Any, cached: bool) -> None:
    tokens = np.zeros((2, seq), np.int64)
    if backend == "reference":
        from alibi_spec.cache import Cache

        cache = Cache.empty(config, 2) if cached else None
        options = {"segment_ids": segment_ids, "cache": cache}
        reference_forward(config, draw_parameters(config), tokens, **options)
        return
    package = {"torch": alibi_torch, "flax": alibi_flax}[backend]
    cache = package.KVCache.empty(config, 2, 100) if cached else None
    model = package.ALiBiLM(config)
    if backend == "torch":
        model.eval()(torch.tensor(tokens), segment_ids=torch.tensor(segment_ids), cache=cache)
    else:
        options = {"segment_ids": segment_ids, "cache": cache}
        jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), tokens, **options))


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
@pytest.mark.parametrize(
    ("options", "shape", "dtype", "cached", "message"),
    [
        ({}, (2, 5), int, True, "segment_ids and a cache do not go together: a cache holds one"),
        ({"distance": "bfloat16"}, (2, 5), int, False, "counts its keys from the first one of a"),
        (
            *({"slope_interpolation": 4}, (2, 5), int, False),
            "rows of 5 positions are longer than slope_interpolation=4.*pack rows of at most 4",
        ),
        ({}, (2, 4), int, False, r"segment_ids has shape \[2, 4\]; expected \[batch=2, seq=5\]"),
        ({}, (2, 5), float, False, "segment_ids is floating point"),
    ],
)
def test_segments_that_are_refused(
    backend: str, options: Any, shape: Any, dtype: type, cached: bool, message: str
) -> None:
    config = dataclasses.replace(DECODER, **options)
    with pytest.raises(ValueError, match=message):
        _call(backend, config, 5, np.zeros(shape, dtype), cached)


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_slopes_may_be_interpolated_beyond_the_row(backend: str) -> None:
    """Up to the limit nothing depends on the length."""
    config = dataclasses.replace(CONFIGS["gated-rms"], slope_interpolation=5)
    _call(backend, config, 5, np.zeros((2, 5), int), cached=False)
