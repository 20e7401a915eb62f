"""What both models promise alike: dropout, generation, and one clear error per bad argument."""

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
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.small_models import BARE, CONFIG, MASK, TOKENS, flax_model, torch_model


@pytest.mark.parametrize(
    "rates",
    [{"dropout": 0.2, "attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.2}],
)
def test_each_kind_of_dropout_is_applied(rates: dict[str, float]) -> None:
    """On residual branches and on probabilities, each on its own, in both backends."""
    config = ALiBiConfig(num_layers=1, d_model=30, num_heads=5, **rates)
    x = np.random.default_rng(0).standard_normal((1, 9, 30)).astype(np.float32)
    ours = alibi_torch.ALiBiTransformer(config).train()
    assert not torch.equal(ours(torch.from_numpy(x)), ours(torch.from_numpy(x)))
    theirs = alibi_flax.ALiBiTransformer(config)
    params = theirs.init(jax.random.key(0), x)
    kept = theirs.apply(params, x)
    dropped = theirs.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not (kept == dropped).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
def test_tokens_of_any_integer_dtype(dtype: type) -> None:
    model, (module, params) = torch_model(), flax_model()
    narrow = TOKENS.astype(dtype)
    expected = as_numpy(model(torch.from_numpy(TOKENS)))
    assert_bitwise(as_numpy(model(torch.from_numpy(narrow))), expected, "torch")
    expected = np.asarray(module.apply({"params": params}, jnp.asarray(TOKENS)))
    found = np.asarray(module.apply({"params": params}, jnp.asarray(narrow)))
    assert_bitwise(found, expected, "flax")


@pytest.mark.parametrize(("given", "expected"), [("float64", "float64"), ("bfloat16", "float32")])
def test_embeddings_of_another_dtype(given: str, expected: str) -> None:
    """Residual branches compute in the common dtype of what enters and the weights."""
    model, module = alibi_torch.ALiBiTransformer(BARE), alibi_flax.ALiBiTransformer(BARE)
    x = jnp.ones((1, 2, 30), given)
    params = module.init(jax.random.key(0), x)
    assert str(module.apply(params, x).dtype) == expected
    assert model(torch.ones(1, 2, 30, dtype=getattr(torch, given))).dtype == getattr(
        torch, expected
    )


def test_arguments_that_are_no_arrays() -> None:
    model, (module, params) = torch_model(), flax_model()
    with pytest.raises(ValueError, match=r"tokens is a list; expected a torch\.Tensor"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="tokens is a list; expected a JAX or NumPy array"):
        module.apply({"params": params}, [[1, 2]])
    with pytest.raises(ValueError, match=r"attention_mask is a ndarray; expected a torch\.Tensor"):
        model(torch.from_numpy(TOKENS), MASK)


def test_token_types_are_added() -> None:
    """Against the reference, in both backends; the default is type 0; other models refuse them."""
    config, rng = CONFIGS["masked-lm"], np.random.default_rng(0)
    parameters, tokens = draw_parameters(config), rng.integers(0, 101, (2, 9))
    types = rng.integers(0, 2, (2, 9))
    state = {name: as_torch(array) for name, array in parameters.items()}
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict(state)
    params = torch_to_flax(state, config)
    for given in (None, types):
        exact = reference_forward(config, parameters, tokens, token_type_ids=given)["logits"]
        ours, theirs = (
            alibi_torch.trace(
                model,
                torch.from_numpy(tokens),
                token_type_ids=None if given is None else torch.from_numpy(given),
            ),
            alibi_flax.trace(
                alibi_flax.ALiBiLM(config),
                params,
                jnp.asarray(tokens),
                token_type_ids=None if given is None else jnp.asarray(given),
            ),
        )
        limit = BUDGETS["float32", "cpu"].forward
        for name, logits in {"torch": as_numpy(ours["logits"]), "flax": theirs["logits"]}.items():
            assert_within(np.asarray(logits), exact, limit, name, dtype="float32")
    with pytest.raises(ValueError, match="token type 2 is outside the vocabulary; expected 0 … 1"):
        model(torch.from_numpy(tokens), token_type_ids=torch.from_numpy(types + 1))
    with pytest.raises(ValueError, match="token_type_ids need a model with type_vocab_size"):
        torch_model()(torch.from_numpy(TOKENS), token_type_ids=torch.from_numpy(TOKENS))
    module, plain = flax_model()
    with pytest.raises(ValueError, match="token_type_ids need a model with type_vocab_size"):
        module.apply({"params": plain}, jnp.asarray(TOKENS), token_type_ids=jnp.asarray(TOKENS))


def test_adaptive_heads_give_probabilities() -> None:
    """They sum to one over the vocabulary, in both backends."""
    config = CONFIGS["adaptive"]
    tokens = np.arange(12).reshape(2, 6)
    torch.manual_seed(0)
    ours = as_numpy(alibi_torch.ALiBiLM(config).eval()(torch.from_numpy(tokens)))
    model = alibi_flax.ALiBiLM(config)
    theirs = model.apply(model.init(jax.random.key(0), tokens), tokens)
    for logits in (ours, np.asarray(theirs)):
        total = np.exp(logits.astype(np.float64)).sum(axis=-1)
        assert_within(total, np.ones((2, 6)), BUDGETS["float32", "cpu"].forward, "sum")


@pytest.mark.parametrize("backend", [alibi_torch, alibi_flax], ids=["torch", "flax"])
def test_a_configuration_of_the_other_class(backend: Any) -> None:
    with pytest.raises(ValueError, match="ALiBiLM needs vocab_size; pass it to ALiBiConfig"):
        backend.ALiBiLM(BARE)
    with pytest.raises(ValueError, match="vocab_size=23 describes an ALiBiLM"):
        backend.ALiBiTransformer(CONFIG)


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (TOKENS[0], None, r"tokens have shape \[40\]; .*add a batch axis with tokens\[None\]"),
        (TOKENS.astype(np.float32), None, "tokens are not integers; pass token ids"),
        (TOKENS[:, :0], None, "with at least one position"),
        (TOKENS + 23, None, r"token 4\d is outside the vocabulary; expected 0 … 22"),
        (TOKENS - 5, None, r"token -\d is outside the vocabulary"),
        (TOKENS, MASK[:, :9], r"attention_mask has shape \[2, 9\]; expected \[batch=2, seq=40\]"),
        (TOKENS, MASK[:1], r"attention_mask has shape \[1, 40\]"),
        (TOKENS, MASK.astype(np.float32), "attention_mask is floating point"),
    ],
)
def test_bad_tokens_and_masks(
    backend: str, tokens: np.ndarray, mask: np.ndarray | None, message: str
) -> None:
    if backend == "torch":
        call = torch_model()
        arguments = [None if each is None else torch.from_numpy(each) for each in (tokens, mask)]
    else:
        model, params = flax_model()

        def call(*arguments: Any) -> Any:
            return model.apply({"params": params}, *arguments)

        arguments = [None if each is None else jnp.asarray(each) for each in (tokens, mask)]
    with pytest.raises(ValueError, match=message):
        call(*arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 5, 29), np.float32), r"embeddings have shape \[2, 5, 29\]; .*d_model=30"),
        (np.zeros((5, 30), np.float32), r"embeddings have shape \[5, 30\]"),
        (np.zeros((2, 5, 30), np.int64), "embeddings are not floating point; pass tokens to"),
    ],
)
def test_bad_embeddings(x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alibi_torch.ALiBiTransformer(BARE)(torch.from_numpy(x))
    with pytest.raises(ValueError, match=message):
        alibi_flax.ALiBiTransformer(BARE).init(jax.random.key(0), jnp.asarray(x))


def test_greedy_generation_agrees_and_is_greedy() -> None:
    """Each new token is the argmax of the last logits, and both backends choose the same."""
    model = torch_model()
    for parameter in model.parameters():  # far from initial values, where margins are wide
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    params = torch_to_flax(model.state_dict(), CONFIG)
    prompt, new_tokens = TOKENS[:, :6], 80
    ours = as_numpy(alibi_torch.generate(model, torch.from_numpy(prompt), new_tokens).tokens)
    module = alibi_flax.ALiBiLM(CONFIG)
    theirs = np.asarray(alibi_flax.generate(module, params, jnp.asarray(prompt), new_tokens).tokens)
    assert_bitwise(ours[:, :6], prompt, "prompt")
    assert_bitwise(ours, theirs, "tokens")
    logits = model(torch.from_numpy(ours))
    assert_bitwise(
        as_numpy(logits.argmax(-1))[:, 5:-1], ours[:, 6:], "argmax of the whole sequence"
    )
    assert len(np.unique(ours)) > 3


@pytest.mark.parametrize("slopes", ["paper", "learned"])
@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_generation_from_narrow_prompts_past_the_interpolation(slopes: str, dtype: str) -> None:
    """Slopes are those of the keys so far; tokens are at least int32, whatever the prompt's are."""
    config = dataclasses.replace(
        CONFIG, vocab_size=50_304, num_layers=1, slope_interpolation=9, slopes=slopes
    )
    torch.manual_seed(0)
    model = alibi_torch.ALiBiLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.token_embedding.weight.data[: np.iinfo(dtype).max + 1] *= 0.1  # the others are likelier
    params = torch_to_flax(model.state_dict(), config)
    prompt = np.arange(5, dtype=dtype)[None]
    ours = as_numpy(alibi_torch.generate(model, torch.from_numpy(prompt), 24).tokens)
    module = alibi_flax.ALiBiLM(config)
    theirs = alibi_flax.generate(module, params, jnp.asarray(prompt), 24)
    assert_bitwise(np.asarray(theirs.tokens), ours.astype(np.int32), "tokens")
    none = alibi_flax.generate(module, params, jnp.asarray(prompt), 0)
    assert_bitwise(np.asarray(none.tokens), prompt.astype(np.int32), "no new tokens")
    assert ours.max() > np.iinfo(dtype).max


def test_models_take_an_implementation() -> None:
    """Of attention: every call gets it, "dense" has second derivatives, and names are checked."""
    config, long = dataclasses.replace(CONFIG, num_layers=1), np.arange(300)[None] % 23
    torch.manual_seed(0)
    model = alibi_torch.ALiBiLM(config, implementation="dense").eval()
    loss = model(torch.from_numpy(long)).square().mean()
    slope = model.transformer.layers[0].attn.query.weight
    (gradient,) = torch.autograd.grad(loss, slope, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), slope)[0].isfinite().all()
    module = alibi_flax.ALiBiLM(config, implementation="pallas_gpu")
    params = torch_to_flax(model.state_dict(), config)
    with pytest.raises(ValueError, match="implementation='pallas_gpu' cannot compute this"):
        module.apply({"params": params}, jnp.asarray(long))
    for backend in (alibi_torch, alibi_flax):
        for build, described in (
            (backend.ALiBiLM, config),
            (backend.ALiBiTransformer, BARE),
        ):
            with pytest.raises(ValueError, match="implementation='fast' is not known; expected"):
                build(described, implementation="fast")


def test_generation_refuses_encoders() -> None:
    config = ALiBiConfig(num_layers=1, d_model=8, num_heads=1, vocab_size=5, causal=False)
    with pytest.raises(ValueError, match="an encoder"):
        alibi_torch.generate(alibi_torch.ALiBiLM(config), torch.zeros(1, 1, dtype=int), 1)
    with pytest.raises(ValueError, match="an encoder"):
        alibi_flax.generate(alibi_flax.ALiBiLM(config), {}, jnp.zeros((1, 1), int), 1)
    masked = dataclasses.replace(config, causal=True, head="masked_lm")
    with pytest.raises(ValueError, match="head='masked_lm' cannot generate; it predicts no next"):
        alibi_torch.generate(alibi_torch.ALiBiLM(masked), torch.zeros(1, 1, dtype=int), 1)
    with pytest.raises(ValueError, match="the model is in training mode"):
        alibi_torch.generate(torch_model().train(), torch.zeros(1, 1, dtype=int), 1)
    with pytest.raises(ValueError, match=r"max_new_tokens=2\.0 is not valid; expected an integer"):
        alibi_torch.generate(torch_model(), torch.zeros(1, 1, dtype=int), 2.0)
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        alibi_torch.generate(torch_model(), torch.zeros(1, 1, dtype=int), -1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (TOKENS + 100, "is outside the vocabulary"),
        (TOKENS[0], "add a batch axis"),
        (TOKENS[:, :0], "at least one position"),
    ],
)
def test_bad_prompts(prompt: np.ndarray, message: str) -> None:
    module, params = flax_model()
    with pytest.raises(ValueError, match=message):
        alibi_torch.generate(torch_model(), torch.from_numpy(prompt), 0)
    with pytest.raises(ValueError, match=message):
        alibi_flax.generate(module, params, jnp.asarray(prompt), 3)


def test_generated_tokens_can_be_trained_on() -> None:
    model = torch_model()
    tokens = alibi_torch.generate(model, torch.from_numpy(TOKENS[:, :4]), 3).tokens
    model(tokens).square().mean().backward()
    assert model.token_embedding.weight.grad is not None
