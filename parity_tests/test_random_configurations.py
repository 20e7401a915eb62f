"""Configurations at random: what is valid is computed alike by all, what is not is refused."""

from __future__ import annotations

import dataclasses
import shlex
from collections import defaultdict
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import torch

from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.biases import DISTANCES, SLOPE_RULES
from alibi_spec.config import ACTIVATIONS, HEADS, NORM_PLACEMENTS, NORMS
from alibi_spec.options import FLAG, kind_of
from parity_tests import random_configurations
from parity_tests.cases import draw_inputs, draw_parameters
from parity_tests.random_configurations import (
    SIZES,
    ModelCall,
    careless_options,
    cases,
    check,
    is_ordinary,
    options,
)

WIDTH, SIZE = ((3, 2),), ((2, 9),)  # of the quick tests, so that JAX compiles for few shapes


@hypothesis.settings(deadline=None, max_examples=5, derandomize=True)
@hypothesis.given(cases(WIDTH, SIZE))
def test_configurations(case: Any) -> None:
    """Outputs alone: what JAX would compile for the rest takes too long."""
    config, call = case
    check(config, dataclasses.replace(call, has_gradients=False, has_cache=False))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{} of {}".format(*size))
def test_many_configurations(size: tuple[int, int]) -> None:
    """A thousand in all, size by size: JAX keeps what it compiles, for all of them 5 GB."""

    @hypothesis.settings(deadline=None, max_examples=200)
    @hypothesis.given(cases(sizes=(size,)))
    def try_all(case: Any) -> None:
        check(*case)

    try_all()
    jax.clear_caches()


def drawn_values() -> dict[str, set[Any]]:
    """What each option was in many configurations."""
    values: dict[str, set[Any]] = defaultdict(set)

    @hypothesis.settings(max_examples=150, derandomize=True, database=None)
    @hypothesis.given(options())
    def draw(drawn: dict[str, Any]) -> None:
        for name in drawn:
            values[name].add(drawn[name])

    draw()
    return values


def test_every_option_is_drawn() -> None:
    """A new one must join; each takes several values, and each word that it may be."""
    values = drawn_values()
    fields = {field.name: field for field in dataclasses.fields(ALiBiConfig)}
    assert set(values) == set(fields)
    assert [name for name, found in values.items() if len(found) < 2] == []
    flags = [name for name, field in fields.items() if kind_of(field) is FLAG]
    words = {"activation": ACTIVATIONS, "norm": NORMS, "head": HEADS, "distance": DISTANCES}
    words |= {"norm_placement": NORM_PLACEMENTS, "slopes": SLOPE_RULES}
    words |= dict.fromkeys(flags, (False, True))
    assert [name for name, expected in words.items() if not values[name] >= set(expected)] == []


def configured(values: dict[str, Any], changed: list[str]) -> ALiBiConfig | None:
    """The configuration, or None where it is refused by the name of an option that was changed."""
    try:
        return ALiBiConfig.from_dict(values)
    except ValueError as error:
        problem = str(error)
    assert any(name in problem for name in changed), problem
    return None


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(careless_options())
def test_careless_options(case: tuple[dict[str, Any], list[str]]) -> None:
    """Each is refused, and the error names an option; or it is a configuration like any other."""
    config = configured(*case)
    if config is not None:
        assert ALiBiConfig.from_json(config.to_json()) == config


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(careless_options())
def test_careless_options_that_are_valid_agree(case: tuple[dict[str, Any], list[str]]) -> None:
    config = configured(*case)
    if config is not None and is_ordinary(config):
        check(config, ModelCall(2, 9))


def test_a_failure_prints_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command fails alike as long as the fault is there, and then no more."""
    config = ALiBiConfig(num_layers=1, d_model=6, num_heads=3, activation="relu", vocab_size=11)
    call = ModelCall(2, 9, padding="left")
    with monkeypatch.context() as patch:
        patch.setitem(
            random_configurations.alibi_torch.model.ACTIVATION_FUNCTIONS, "relu", torch.tanh
        )
        with pytest.raises(AssertionError, match=r"torch layers\.0\.ffn: relative") as first:
            check(config, call)
        lines = first.value.__notes__[-1].splitlines()
        assert len(lines) == 2
        python, option, module, *arguments = shlex.split(lines[0].removesuffix("\\") + lines[1])
        assert (python, option, module) == ("python", "-m", random_configurations.__name__)
        with pytest.raises(AssertionError) as again:
            random_configurations.main(arguments)
        assert str(again.value) == str(first.value)
    assert random_configurations.main(arguments) == 0
    assert capsys.readouterr().out == "all agree\n"


def test_a_refusal_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refused what it can compute would not be compared with anything."""
    monkeypatch.setattr("alibi_torch.kernels.windowed.plain.refuses_bias", lambda _: "it is tired")
    with pytest.raises(AssertionError, match="torch blockwise refuses without need: it is tired"):
        check(ALiBiConfig(num_layers=1, d_model=6, num_heads=3), ModelCall(2, 9))


def test_the_reference_reads_empty_batches_and_checks_token_types() -> None:
    """As the backends do."""
    config = ALiBiConfig(num_layers=1, d_model=6, num_heads=3, vocab_size=11, type_vocab_size=2)
    parameters, tokens = draw_parameters(config), draw_inputs(config, batch=0, seq=4)
    assert reference_forward(config, parameters, tokens, None, tokens)["logits"].shape == (0, 4, 11)
    tokens = draw_inputs(config, batch=1, seq=4)
    for types, message in (
        (np.full((1, 4), 2), "token type 2 is outside the vocabulary; expected 0 … 1"),
        (np.full((1, 4), -1), "token type -1 is outside the vocabulary"),
        (np.zeros((1, 4)), "tokens are not integers"),
    ):
        with pytest.raises(ValueError, match=message):
            reference_forward(config, parameters, tokens, None, types)
    config = dataclasses.replace(config, type_vocab_size=None)
    with pytest.raises(ValueError, match="token_type_ids need a model with type_vocab_size"):
        reference_forward(config, parameters, tokens, None, np.zeros((1, 4), int))
