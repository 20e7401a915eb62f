"""One vector for each sequence: both backends, in any batches, against the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import alibi_flax
import alibi_torch
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_flax.encoding import _encoded
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.batching import batches_by_length
from alibi_spec.budgets import BUDGETS
from alibi_spec.pooling import POOLINGS, pooled
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_bitwise, assert_within

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 101, length).tolist() for length in (5, 40, 1, 41, 5, 12)]


def _models(config: ALiBiConfig) -> tuple[Any, Any, Any]:
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({k: as_torch(v) for k, v in draw_parameters(config).items()})
    return model, alibi_flax.ALiBiLM(config), torch_to_flax(model.state_dict(), config)


@pytest.mark.parametrize("config_name", ["headless", "masked-lm", "lm-tied"])
def test_vectors_are_the_references(config_name: str) -> None:
    """Each sequence by itself, without padding, in the order given."""
    config = CONFIGS[config_name]
    model, module, params = _models(config)
    traces = [
        reference_forward(config, draw_parameters(config), np.array([sequence]))["output"]
        for sequence in SEQUENCES
    ]
    limit = BUDGETS["float32", "cpu"].forward
    for pooling in POOLINGS if config_name == "headless" else ("mean",):
        for normalize in (True, False) if pooling == "mean" else (True,):
            options: Any = {"pooling": pooling, "normalize": normalize, "batch_size": 3}
            exact = np.concatenate(
                [pooled(x, np.ones(x.shape[:2], bool), pooling, normalize) for x in traces]
            )
            ours = as_numpy(alibi_torch.encode(model, SEQUENCES, **options))
            theirs = np.asarray(alibi_flax.encode(module, params, SEQUENCES, **options))
            assert_within(ours, exact, limit, f"torch, {options}", dtype="float32")
            assert_within(theirs, exact, limit, f"flax, {options}", dtype="float32")


@pytest.mark.parametrize("causal", [True, False])
def test_interpolated_slopes_are_those_of_each_sequence(causal: bool) -> None:
    """Padding would count as keys, that of a batch and that of a bucket, past the limit of 12."""
    config = dataclasses.replace(
        CONFIGS["lm-tied"], num_layers=1, causal=causal, slope_interpolation=12
    )
    model, module, params = _models(config)
    hidden = [
        reference_forward(config, draw_parameters(config), np.array([sequence]))["output"]
        for sequence in SEQUENCES
    ]
    exact = np.concatenate([pooled(x, np.ones(x.shape[:2], bool)) for x in hidden])
    ours = as_numpy(alibi_torch.encode(model, SEQUENCES, batch_size=4))
    theirs = np.asarray(alibi_flax.encode(module, params, SEQUENCES, batch_size=4))
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(ours, exact, limit, "torch", dtype="float32")
    assert_within(theirs, exact, limit, "flax", dtype="float32")


def test_batches_are_as_large_as_slopes_allow() -> None:
    sequences = [[1] * length for length in (5, 9, 3, 9, 8, 9, 2, 7)]
    for limit, expected in (
        (None, [[9, 9, 9], [8, 7, 5], [3, 2]]),
        (8, [[9, 9, 9], [8, 7, 5], [3, 2]]),
        (4, [[9, 9, 9], [8], [7], [5], [3, 2]]),
    ):
        found = [lengths.tolist() for _, _, lengths in batches_by_length(sequences, 3, limit)]
        assert found == expected


def test_the_reference_hides_padding() -> None:
    hidden = RNG.standard_normal((2, 6, 4))
    visible = np.array([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    expected = {"mean": hidden[0, 1:3].mean(axis=0), "cls": hidden[0, 1], "last": hidden[0, 2]}
    for pooling, vector in expected.items():
        assert_bitwise(pooled(hidden, visible, pooling, normalize=False)[0], vector, pooling)
        length = np.linalg.norm(pooled(hidden, visible, pooling), axis=1)
        assert abs(length - 1).max() < 1e-15


def test_flax_compiles_once_for_sequences_of_a_bucket() -> None:
    config = dataclasses.replace(CONFIGS["lm-tied"], norm_eps=4e-5, num_layers=1)  # nobody else's
    _, module, params = _models(config)
    before = _encoded._cache_size()
    for number, length in ((4, 17), (1, 24), (3, 20)):
        alibi_flax.encode(module, params, [[1] * length] * number, batch_size=2)
    assert _encoded._cache_size() == before + 1


def test_bad_input() -> None:
    model, module, params = _models(dataclasses.replace(CONFIGS["lm-tied"], num_layers=1))
    for sequences, options, message in (
        ([[1, 2], []], {}, "sequence 1 has no tokens; expected at least one"),
        ([[1]], {"pooling": "max"}, "pooling='max' is not known; expected one of"),
        ([[1]], {"batch_size": 0}, "batch_size=0 is not valid; expected an integer of at least 1"),
        ([[101]], {}, "token 101 is outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            alibi_torch.encode(model, sequences, **options)
        with pytest.raises(ValueError, match=message):
            alibi_flax.encode(module, params, sequences, **options)
    with pytest.raises(ValueError, match="the model is in training mode"):
        alibi_torch.encode(model.train(), [[1]])
    assert alibi_torch.encode(model.eval(), []).shape == (0, 48)
    assert alibi_flax.encode(module, params, []).shape == (0, 48)
