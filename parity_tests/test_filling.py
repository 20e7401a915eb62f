"""Masks filled by both backends: the reference's tokens, and those of a published model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alibi_flax
import alibi_flax.filling as flax_filling
import alibi_torch
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from alibi_spec.filling import likeliest
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_within
from parity_tests.peers import mosaicbert, published
from parity_tests.peers.encoders import SMALL, VOCAB, head_shapes

CONFIG, MASK = CONFIGS["masked-lm"], 100
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 20))
# The second sequence has no mask. The others have a further one each, in their padding.
POSITIONS = np.array([[0, 4], [0, 11], [0, 19], [2, 0], [2, 12]])
TOKENS[tuple(POSITIONS.T)] = TOKENS[0, 1] = TOKENS[2, 18] = MASK
VISIBLE = np.ones((3, 20), int)
VISIBLE[0, :4] = VISIBLE[2, 13:] = 0


def _fillers(
    config: ALiBiConfig, arrays: dict[str, np.ndarray]
) -> dict[str, Callable[..., tuple[np.ndarray, ...]]]:
    """`fill_masks` of one model in both backends, from NumPy's arrays to NumPy's."""
    dtype = as_torch(arrays["token_embedding.weight"]).dtype
    model = alibi_torch.ALiBiLM(config).eval().to(dtype)
    model.load_state_dict({name: as_torch(array) for name, array in arrays.items()})
    module, params = alibi_flax.ALiBiLM(config), torch_to_flax(model.state_dict(), config)

    def ours(tokens: Any, mask_token_id: int, mask: Any = None, top_k: int = 5) -> Any:
        tokens, mask = torch.tensor(tokens), None if mask is None else torch.tensor(mask)
        options: Any = {"attention_mask": mask, "top_k": top_k}
        found = alibi_torch.fill_masks(model, tokens, mask_token_id, **options)
        return tuple(as_numpy(each) for each in vars(found).values())

    def theirs(tokens: Any, mask_token_id: int, mask: Any = None, top_k: int = 5) -> Any:
        options: Any = {"attention_mask": mask, "top_k": top_k}
        found = alibi_flax.fill_masks(module, params, tokens, mask_token_id, **options)
        return tuple(np.asarray(each) for each in vars(found).values())

    return {"torch": ours, "flax": theirs}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("head", ["masked_lm", "linear"])
def test_masks_are_filled_as_the_reference_does(head: str, dtype: str) -> None:
    """Several in a sequence, none in another, others in padding of either side."""
    config = dataclasses.replace(CONFIG, head=head, num_layers=1)
    arrays = {name: array.astype(dtype) for name, array in draw_parameters(config).items()}
    logits = reference_forward(config, arrays, TOKENS, VISIBLE)["logits"]
    tokens, probabilities = likeliest(logits[tuple(POSITIONS.T)], 7)
    limit = BUDGETS[dtype, "cpu"].forward
    for backend, fill in _fillers(config, arrays).items():
        positions, found, likely = fill(TOKENS, MASK, VISIBLE, top_k=7)
        np.testing.assert_array_equal(positions, POSITIONS, backend)
        np.testing.assert_array_equal(found, tokens, backend)
        assert_within(likely, probabilities, limit, backend, dtype=dtype)


def test_masks_are_filled_as_mosaicbert_does(tmp_path: Path) -> None:
    """From its folder: the tokens that its published formula gives the largest probabilities."""
    arrays = published.draw(mosaicbert.shapes() | head_shapes("decoder.bias"))
    folder = published.write_folder(tmp_path / "mosaicbert", SMALL, arrays)
    tokens, places = TOKENS[1] % (VOCAB - 1), [2, 3, 17]
    tokens[places] = VOCAB - 1
    logits = mosaicbert.forward(True, arrays, tokens, 0 * tokens)[places]
    expected = published.softmax(logits)
    model: Any = alibi_torch.ALiBiLM.from_pretrained(folder)
    ours = alibi_torch.fill_masks(model, torch.tensor(tokens[None]), VOCAB - 1, top_k=VOCAB)
    module, params = alibi_flax.from_pretrained(folder)
    call: Any = alibi_flax.fill_masks
    theirs = call(module, params, tokens[None], VOCAB - 1, top_k=VOCAB)
    for backend, found in {"torch": ours, "flax": theirs}.items():
        assert found.positions[:, 1].tolist() == places
        order, probabilities = np.asarray(found.tokens), np.asarray(found.probabilities)
        np.testing.assert_array_equal(order, (-logits).argsort(axis=1), backend)
        by_id = np.take_along_axis(probabilities, order.argsort(axis=1), axis=1)
        assert_within(by_id, expected, BUDGETS["float64", "cpu"].forward, backend)


def test_of_equal_tokens_the_lower_id_comes_first() -> None:
    """The logits are those of the bias alone, which has only three different values."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    bias = np.random.default_rng(1).integers(0, 3, 101).astype(np.float32)
    arrays = draw_parameters(config)
    arrays |= {"token_embedding.weight": np.zeros((101, 48), np.float32), "head_bias": bias}
    expected = sorted(range(101), key=lambda token: (-bias[token], token))
    for backend, fill in _fillers(config, arrays).items():
        tokens = fill(TOKENS, MASK, top_k=101)[1]
        np.testing.assert_array_equal(tokens, [expected] * len(tokens), backend)
    np.testing.assert_array_equal(likeliest(bias[None], 101)[0][0], expected)


def test_flax_compiles_once_for_the_masks_of_a_bucket() -> None:
    config = dataclasses.replace(CONFIG, norm_eps=4e-5, num_layers=1)  # nobody else's
    fill = _fillers(config, draw_parameters(config))["flax"]
    programs: Any = (flax_filling._hidden_states, flax_filling._likeliest)
    before = [each._cache_size() for each in programs]
    for masks in (1, 5, 16):
        tokens = np.where(np.arange(20) < masks, MASK, 0)[None]
        assert len(fill(tokens, MASK)[0]) == masks
    assert [each._cache_size() for each in programs] == [count + 1 for count in before]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, (99,), r"tokens hold no mask \(token 99\); put it where a token is to be found"),
        ({}, (MASK, TOKENS != MASK), "tokens hold no mask"),
        ({}, (MASK, VISIBLE[:2]), "attention_mask has shape .*; expected .batch=3, seq=20"),
        ({}, (101,), "mask_token_id 101 is outside the vocabulary; expected 0 … 100"),
        ({}, (-1,), "mask_token_id -1 is outside the vocabulary; expected 0 … 100"),
        ({}, (MASK, None, 0), "top_k=0 is not valid; expected an integer in 1 … 101"),
        ({}, (MASK, None, 102), "top_k=102 is not valid; expected an integer in 1 … 101"),
        ({"head": "none"}, (MASK,), "predicts no tokens; use one with its masked-language head"),
        ({"head": "linear", "causal": True}, (MASK,), r"a decoder .* fills no mask; use a masked"),
    ],
)
def test_bad_input(change: dict[str, Any], arguments: tuple[Any, ...], message: str) -> None:
    config = dataclasses.replace(CONFIG, num_layers=1, **change)
    for fill in _fillers(config, draw_parameters(config)).values():
        with pytest.raises(ValueError, match=message):
            fill(TOKENS, *arguments)


def test_a_model_in_training_mode() -> None:
    model = alibi_torch.ALiBiLM(dataclasses.replace(CONFIG, num_layers=1))
    with pytest.raises(ValueError, match="the model is in training mode"):
        alibi_torch.fill_masks(model, torch.tensor(TOKENS), MASK)
