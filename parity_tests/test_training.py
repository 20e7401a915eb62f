"""Both backends train alike, and as `alibi_spec.training` says (SPEC.md §18)."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_flax.training
import alibi_torch
import alibi_torch.training
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import (
    ALiBiConfig,
    Metrics,
    Recipe,
    masked_lm_batch,
    next_token_targets,
    parameter_table,
    reference_forward,
)
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from alibi_spec.training import (
    IGNORED,
    adamw_start,
    adamw_update,
    clipped_gradients,
    decayed,
    learning_rates,
    negative_log_likelihood,
)
from parity_tests.cases import draw_parameters
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within

SUMS = AGREEMENTS["float64 sums"].relative
BATCH, SEQ, VOCAB = 8, 12, 23

_SMALL: dict[str, Any] = {"num_layers": 1, "d_model": 30, "vocab_size": VOCAB, "dropout": 0.0}
CONFIGS = {
    "decoder": ALiBiConfig(**_SMALL, num_heads=5),
    "gated": ALiBiConfig(
        **_SMALL,
        num_heads=3,
        num_kv_heads=1,
        norm="rms",
        norm_bias=False,
        gated_ffn=True,
        tie_embeddings=False,
        slopes="learned",
    ),
    "masked": ALiBiConfig(
        **_SMALL,
        num_heads=5,
        causal=False,
        head="masked_lm",
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        type_vocab_size=2,
    ),
}
# An epsilon that counts, and a learning rate that differs from step to step.
RECIPE = Recipe(
    steps=20,
    batch_size=BATCH,
    accumulation_steps=4,
    learning_rate=3e-3,
    warmup_steps=3,
    epsilon=1e-3,
    beta2=0.98,
)
NORMS = {"decoder": 1.8, "gated": 2.1, "masked": 4.5}  # the median of the norms, about
each_case = pytest.mark.parametrize("case", CONFIGS)
each_backend = pytest.mark.parametrize("backend", ["torch", "flax"])


def recipe_of(case: str, **options: Any) -> Recipe:
    objective = "masked_lm" if case == "masked" else "next_token"
    options = {"objective": objective, "max_grad_norm": NORMS[case], **options}
    return dataclasses.replace(RECIPE, **options)


def batch_of(case: str, step: int = 0) -> dict[str, np.ndarray]:
    """Packed documents and padding, so that the parts of a step have unequal numbers of targets."""
    tokens = np.random.default_rng(step).integers(0, VOCAB, (BATCH, SEQ))
    position, row = np.arange(SEQ), np.arange(BATCH)[:, None]
    masks = {
        "segment_ids": (position > row + 2).astype(np.int64),
        "attention_mask": (position < SEQ - row).astype(np.int64),
    }
    if case != "masked":
        return {"tokens": tokens, "targets": next_token_targets(tokens, **masks), **masks}
    options: Any = {"seed": 5, "first_sequence": BATCH * step}
    mask = masks["attention_mask"]
    batch = masked_lm_batch(tokens, VOCAB - 1, VOCAB, attention_mask=mask, **options)
    return batch | masks | {"token_type_ids": position % 2 + 0 * row}


def trainer_of(
    backend: str,
    config: ALiBiConfig,
    recipe: Recipe,
    parameters: dict[str, np.ndarray],
    dtype: str = "float64",
) -> Any:
    parameters = {name: array.astype(dtype) for name, array in parameters.items()}
    if backend == "torch":
        model = alibi_torch.ALiBiLM(config).to(getattr(torch, dtype))
        model.load_state_dict({name: as_torch(array) for name, array in parameters.items()})
        return alibi_torch.Trainer(model, recipe)
    model = alibi_flax.ALiBiLM(config)
    return alibi_flax.Trainer(model, flax_tree(Tensors.of(parameters), config), recipe)


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    if isinstance(trainer, alibi_flax.Trainer):
        return canonical_tensors(trainer.params, trainer.config)
    return {name: as_numpy(each.detach()).copy() for name, each in trainer.model.named_parameters()}


def moments_of(trainer: Any, name: str) -> dict[str, np.ndarray]:
    """AdamW's "mean" or "mean_square" of each parameter."""
    if isinstance(trainer, alibi_flax.Trainer):
        leaf = getattr(trainer.optimizer_state[0], {"mean": "mu", "mean_square": "nu"}[name])
        return canonical_tensors(leaf, trainer.config)
    key = {"mean": "exp_avg", "mean_square": "exp_avg_sq"}[name]
    states = trainer.optimizer.state
    return {name: as_numpy(states[p][key]) for name, p in trainer.model.named_parameters()}


@partial(jax.jit, static_argnums=0)
def _flax_gradients(model: alibi_flax.ALiBiLM, params: Any, batch: Any) -> Any:
    def mean(params: Any) -> Any:
        total, count = alibi_flax.loss(model, params, batch)
        return total / count

    return jax.grad(mean)(params)


def gradients_of(trainer: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the mean over all targets of the whole batch at once."""
    if isinstance(trainer, alibi_flax.Trainer):
        found = _flax_gradients(trainer.model, trainer.params, batch)
        return canonical_tensors(found, trainer.config)
    placed = {name: torch.tensor(array) for name, array in batch.items()}
    total, count = alibi_torch.loss(trainer.model, placed)
    names = [name for name, _ in trainer.model.named_parameters()]
    found = torch.autograd.grad(total / count, list(trainer.model.parameters()))
    return dict(zip(names, map(as_numpy, found), strict=True))


@cache
def walk(backend: str, case: str, steps: int, dtype: str = "float64") -> Any:
    """What a trainer's steps tell, and all weights after them."""
    config = CONFIGS[case]
    recipe = recipe_of(case, steps=steps)
    trainer = trainer_of(backend, config, recipe, draw_parameters(config), dtype)
    told = [trainer.step(batch_of(case, step)) for step in range(steps)]
    assert trainer.step_count == steps
    return np.array([[float(number) for number in each] for each in told]), weights_of(trainer)


@each_case
@each_backend
def test_every_update_is_the_oracles(backend: str, case: str) -> None:
    """Twenty steps in four parts each; the oracle gets the gradient of the whole batch."""
    config, recipe = CONFIGS[case], recipe_of(case)
    expected = {name: array.astype(np.float64) for name, array in draw_parameters(config).items()}
    state, norms = adamw_start(expected), []
    trainer = trainer_of(backend, config, recipe, expected)
    for step in range(recipe.steps):
        batch = batch_of(case, step)
        gradients, norm = clipped_gradients(gradients_of(trainer, batch), recipe.max_grad_norm)
        expected, state = adamw_update(config, recipe, expected, gradients, state)
        metrics = trainer.step(batch)
        for name, array in weights_of(trainer).items():
            assert_within(array, expected[name], SUMS, f"step {step} {name}")
        assert_within(np.float64(metrics.grad_norm), np.float64(norm), SUMS, f"norm of {step}")
        assert float(metrics.learning_rate) == learning_rates(recipe)[step]
        norms.append(norm)
    for name in ("mean", "mean_square"):
        for parameter, array in moments_of(trainer, name).items():
            exact = getattr(state, name)[parameter]
            assert_within(array, exact, SUMS, f"{name} of {parameter}", floor=1.0)
    assert min(norms) < recipe.max_grad_norm < max(norms)


@each_case
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_both_backends_walk_together(case: str, steps: int) -> None:
    """In float64, what rounding leaves grows little."""
    (ours, weights), (theirs, others) = (walk(each, case, steps) for each in ("torch", "flax"))
    limit = AGREEMENTS["float64 training"].relative
    assert_within(ours, theirs, limit, "metrics")
    for name, array in weights.items():
        assert_within(others[name], array, limit, name)


@each_backend
@pytest.mark.parametrize(
    "case",
    ["decoder", *(pytest.param(case, marks=pytest.mark.slow) for case in ("gated", "masked"))],
)
def test_float32_stays_near_float64(backend: str, case: str) -> None:
    """That of the other backend: how far twenty steps move each weight, relative to the longest way
    of its tensor; of biases of keys, which move nowhere, relative to a step."""
    other = {"torch": "flax", "flax": "torch"}[backend]
    (ours, found), (theirs, exact) = walk(backend, case, 20, "float32"), walk(other, case, 20)
    assert_within(ours, theirs, BUDGETS["float32", "cpu"].gradient, "metrics")
    for name, start in draw_parameters(CONFIGS[case]).items():
        moved, exactly = (each[name] - start.astype(np.float64) for each in (found, exact))
        assert found[name].dtype == np.float32
        limit = AGREEMENTS["float32 training"].relative
        assert_within(moved, exactly, limit, name, floor=RECIPE.learning_rate)


@each_case
@each_backend
def test_the_loss_is_that_of_the_reference(backend: str, case: str) -> None:
    config, batch = CONFIGS[case], batch_of(case)
    parameters = draw_parameters(config)
    options = {name: batch[name] for name in batch if name not in ("tokens", "targets")}
    logits = reference_forward(config, parameters, batch["tokens"], **options)["logits"]
    total, count = negative_log_likelihood(logits, batch["targets"])
    trainer = trainer_of(backend, config, recipe_of(case), parameters)
    found, its_count = trainer.evaluate(batch)
    assert_within(np.float64(found), np.float64(total), SUMS, "sum")
    assert count == its_count == (batch["targets"] != IGNORED).sum()


@each_backend
def test_parts_change_nothing(backend: str) -> None:
    """Though they have unequal numbers of targets."""
    config, parameters = CONFIGS["decoder"], draw_parameters(CONFIGS["decoder"])
    runs = []
    for parts in (1, 4):
        recipe = recipe_of("decoder", accumulation_steps=parts)
        trainer = trainer_of(backend, config, recipe, parameters)
        told = [trainer.step(batch_of("decoder", step)) for step in range(2)]
        losses = np.array([[float(number) for number in each] for each in told])
        runs.append({"metrics": losses, **weights_of(trainer)})
    for name, array in runs[0].items():
        assert_within(runs[1][name], array, SUMS, name)


@each_backend
def test_dropout_depends_on_seed_and_step(backend: str) -> None:
    """The same run has the same bits; another step, and another seed, drops other things."""
    config = dataclasses.replace(CONFIGS["decoder"], dropout=0.3)
    parameters, batch = draw_parameters(config), batch_of("decoder")
    recipe = recipe_of("decoder", learning_rate=1e-30)
    runs = []
    for seed in (0, 0, 1):
        recipe = dataclasses.replace(recipe, seed=seed)
        trainer = trainer_of(backend, config, recipe, parameters, "float32")
        runs.append([float(trainer.step(batch).loss) for _ in range(2)])
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 4
    if backend == "torch":  # in Flax the call says so
        assert trainer.evaluate(batch) == trainer.evaluate(batch)


def test_torchs_generator_goes_on_as_if_unused() -> None:
    config = dataclasses.replace(CONFIGS["decoder"], dropout=0.3)
    trainer = trainer_of("torch", config, recipe_of("decoder"), draw_parameters(config))
    before = torch.get_rng_state()
    trainer.step(batch_of("decoder"))
    assert torch.equal(before, torch.get_rng_state())


@each_backend
@pytest.mark.parametrize("wrong", [np.nan, 1e200])
def test_what_is_not_finite_changes_nothing(backend: str, wrong: float) -> None:
    """Of a loss, or of a norm alone; weights, moments and the number of steps stay."""
    config, batch = CONFIGS["decoder"], batch_of("decoder")
    trainer = trainer_of(backend, config, recipe_of("decoder"), draw_parameters(config))
    trainer.step(batch)
    name = "token_embedding"
    if backend == "torch":
        trainer.model.get_parameter(f"{name}.weight").data[3] = wrong
    else:
        table = trainer.params[name]["embedding"].at[3].set(wrong)
        trainer.params = trainer.params | {name: {"embedding": table}}
    before = [weights_of(trainer), moments_of(trainer, "mean"), moments_of(trainer, "mean_square")]
    before = [{key: array.copy() for key, array in each.items()} for each in before]
    metrics = trainer.step(batch)
    assert not (np.isfinite(float(metrics.loss)) and np.isfinite(float(metrics.grad_norm)))
    after = [weights_of(trainer), moments_of(trainer, "mean"), moments_of(trainer, "mean_square")]
    for old, new in zip(before, after, strict=True):
        for key, array in old.items():
            assert_bitwise(new[key], array, key)
    assert trainer.step_count == 1


LEARNED = dataclasses.replace(CONFIGS["decoder"], slopes="learned")


@each_backend
def test_bfloat16_over_float32_weights(backend: str) -> None:
    """Gradients of the rounded weights, which the mean after one step shows; weights stay wide."""
    recipe = recipe_of("decoder", compute_dtype="bfloat16", max_grad_norm=None)
    parameters, batch = draw_parameters(LEARNED, "bfloat16"), batch_of("decoder")
    exact = gradients_of(trainer_of("torch", LEARNED, recipe, parameters), batch)
    trainer = trainer_of(backend, LEARNED, recipe, parameters, "float32")
    wide, _ = trainer_of("torch", LEARNED, RECIPE, parameters).evaluate(batch)
    total, count = trainer.evaluate(batch)
    budget = BUDGETS["bfloat16", "cpu"]
    metrics = trainer.step(batch)
    mean = np.float64(wide / count)
    for found in (total / count, float(metrics.loss)):
        assert found != mean
        assert_within(np.float64(found), mean, budget.forward, "loss")
    found = {
        name: array / np.float32(1 - recipe.beta1)
        for name, array in moments_of(trainer, "mean").items()
    }
    assert_gradients_within(found, exact, budget.gradient, backend, dtype="float32")
    assert {array.dtype for array in weights_of(trainer).values()} == {np.dtype("float32")}


def test_slopes_are_never_computed_in_bfloat16() -> None:
    parameters = draw_parameters(LEARNED)
    model = trainer_of("torch", LEARNED, RECIPE, parameters, "float32").model
    with alibi_torch.training._computed_in("bfloat16", model):
        ours = {name: str(each.dtype) for name, each in model.named_parameters()}
    params = flax_tree(Tensors.of(parameters), LEARNED)
    theirs = alibi_flax.training._computed_in("bfloat16", LEARNED, params)
    for row in parameter_table(LEARNED):
        leaf = theirs
        for key in row.flax_path:
            leaf = leaf[key]
        expected = "float32" if row.init == "slopes" else "bfloat16"
        assert (ours[row.name], str(leaf.dtype)) == (f"torch.{expected}", expected)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_recomputes_the_same_bits(dtype: str) -> None:
    """With dropout, and with weights that are rounded for the step."""
    config = dataclasses.replace(CONFIGS["gated"], dropout=0.3)
    runs = []
    for recompute in (False, True):
        recipe = recipe_of("gated", recompute=recompute, compute_dtype=dtype)
        trainer = trainer_of("torch", config, recipe, draw_parameters(config), "float32")
        trainer.step(batch_of("gated"))
        assert trainer.model.transformer.recompute == recompute
        runs.append(weights_of(trainer))
    for name, array in runs[0].items():
        assert_bitwise(runs[1][name], array, name)


@pytest.mark.slow
def test_flax_recomputes_the_same() -> None:
    config, found = dataclasses.replace(CONFIGS["gated"], dropout=0.3), []
    for recompute in (False, True):
        recipe = recipe_of("gated", recompute=recompute)
        trainer = trainer_of("flax", config, recipe, draw_parameters(config))
        trainer.step(batch_of("gated"))
        assert trainer.model.recompute == recompute
        found.append(weights_of(trainer))
    for name, array in found[0].items():
        assert_within(found[1][name], array, SUMS, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_torch_model_trains_alike(dtype: str) -> None:
    config, runs = CONFIGS["decoder"], []
    for is_compiled in (False, True):
        recipe = recipe_of("decoder", compute_dtype=dtype)
        trainer = trainer_of("torch", config, recipe, draw_parameters(config), "float32")
        if is_compiled:
            trainer.model.compile(backend="aot_eager", fullgraph=True)
        for step in range(3):
            trainer.step(batch_of("decoder", step))
        runs.append(weights_of(trainer))
    for name, array in runs[0].items():
        assert_within(runs[1][name], array, BUDGETS["float32", "cpu"].gradient, name)


def test_what_decays() -> None:
    every = {**decayed(CONFIGS["masked"], RECIPE), **decayed(CONFIGS["gated"], RECIPE)}
    shown = {name.removeprefix("transformer.layers.0.") for name in every if every[name]}
    matrices = ["attn.query", "attn.key", "attn.value", "attn.output", "ffn.fc1", "ffn.fc2"]
    matrices += ["ffn.gate", "head_transform", "lm_head"]
    assert shown == {f"{name}.weight" for name in matrices}
    assert all(decayed(CONFIGS["gated"], dataclasses.replace(RECIPE, decay="all")).values())


def test_torchs_groups_have_names() -> None:
    """Each parameter is in one, under its name, and there is no group without parameters."""
    for decay, sizes in (("matrices", 2), ("all", 1)):
        model = alibi_torch.ALiBiLM(CONFIGS["gated"])
        recipe = dataclasses.replace(RECIPE, decay=decay)
        groups = alibi_torch.adamw(model, recipe).param_groups
        names = [name for group in groups for name in group["param_names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert len(groups) == sizes


def test_schedules() -> None:
    shared: dict[str, Any] = {"steps": 7, "learning_rate": 8.0, "warmup_steps": 3, "batch_size": 1}
    rates = partial(Recipe, **shared)
    for schedule, final, expected in (
        ("linear", 0.25, [2, 4, 6, 8, 6, 4, 2]),
        ("constant", 0.25, [2, 4, 6, 8, 8, 8, 8]),
        ("cosine", 0.0, [2, 4, 6, 8, 6, 2, 0]),
        ("cosine", 1.0, [2, 4, 6, 8, 8, 8, 8]),
    ):
        found = learning_rates(rates(schedule=schedule, final_learning_rate=final))
        assert_within(found, np.array(expected, np.float64), SUMS, schedule)
    assert learning_rates(Recipe(steps=1, batch_size=1, learning_rate=2.0)).tolist() == [2.0]


def test_the_last_learning_rate_stays() -> None:
    config, batch = CONFIGS["decoder"], batch_of("decoder")
    recipe = recipe_of("decoder", steps=2, warmup_steps=0)
    trainer = trainer_of("torch", config, recipe, draw_parameters(config))
    rates = learning_rates(recipe)[[0, 1, 1, 1]].tolist()
    assert [trainer.step(batch).learning_rate for _ in rates] == rates
    theirs = partial(alibi_flax.training._learning_rate, recipe)
    assert [float(theirs(jnp.asarray(step))) for step in range(4)] == rates


def test_next_tokens() -> None:
    """Neither across documents nor into or out of padding."""
    tokens = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    segments = np.array([[0, 0, 0, 1, 1, 1], [7, 7, 7, 7, 7, 7]])
    mask = np.array([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    no = IGNORED
    assert next_token_targets(tokens)[0].tolist() == [2, 3, 4, 5, 6, no]
    assert next_token_targets(tokens, segments)[0].tolist() == [2, 3, no, 5, 6, no]
    assert next_token_targets(tokens, segments, mask).tolist() == [
        [2, 3, no, 5, no, no],
        [no, no, 4, 5, 6, no],
    ]


def test_masked_tokens() -> None:
    """15 % are chosen, 80, 10 and 10 % of these masked, replaced and kept: within 5 deviations."""
    rng = np.random.default_rng(0)
    tokens, vocab = rng.integers(10, 100, (200, 500)), 100
    mask = np.arange(500) < 400
    mask = np.broadcast_to(mask, tokens.shape).astype(np.int64)
    draw = partial(masked_lm_batch, mask_token_id=3, vocab_size=vocab, seed=1)
    batch = draw(tokens, attention_mask=mask, special_token_ids=[10, 11])
    chosen = batch["targets"] != IGNORED
    assert not chosen[mask == 0].any()
    assert not chosen[np.isin(tokens, [10, 11])].any()
    assert (batch["targets"] == tokens)[chosen].all()
    assert (batch["tokens"] == tokens)[~chosen].all()
    became = batch["tokens"][chosen]
    shares = [
        (chosen.sum(), (mask & ~np.isin(tokens, [10, 11])).sum(), 0.15),
        ((became == 3).sum(), chosen.sum(), 0.8 + 0.1 / vocab),
        ((became == tokens[chosen]).sum(), chosen.sum(), 0.1 + 0.1 / vocab),
    ]
    for found, of, share in shares:
        assert abs(found - of * share) < 5 * np.sqrt(of * share * (1 - share))
    assert {*range(vocab)} - {*became.tolist()} == set()  # every token can replace one
    later = draw(tokens[150:], first_sequence=150, attention_mask=mask[150:])
    assert (draw(tokens, attention_mask=mask)["tokens"][150:] == later["tokens"]).all()


def test_clipping() -> None:
    """Of all gradients together, and exactly: torch's own adds 1e-6."""
    arrays = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    for limit, factor in ((1.0, 0.2), (5.0, 1.0), (6.0, 1.0), (None, 1.0)):
        parameters = [torch.nn.Parameter(torch.tensor(array)) for array in arrays.values()]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        norm = alibi_torch.clip_gradients(parameters, limit)
        theirs, their_norm = alibi_flax.clip_gradients(jax.tree.map(jnp.asarray, arrays), limit)
        assert float(norm) == float(their_norm) == 5.0
        for parameter, (name, array) in zip(parameters, arrays.items(), strict=True):
            for found in (as_numpy(parameter.grad), np.asarray(theirs[name])):
                assert_within(found, array * factor, SUMS, f"{limit} {name}")
    zero = {"a": jnp.zeros(2)}
    assert not np.asarray(alibi_flax.clip_gradients(zero, 1.0)[0]["a"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1.0}, "unknown option 'lr' in the recipe; did you mean learning_rate?"),
        ({"warmup_step": 1}, "did you mean warmup_steps?"),
        ({"accumulation_steps": 3}, "accumulation_steps=3 does not divide batch_size=32"),
        ({"warmup_steps": 1000}, "warmup_steps=1000 leaves none of steps=1000"),
        ({"warmup_steps": False}, "warmup_steps=False is not valid; expected an integer of at"),
        ({"beta2": 1.0}, r"beta2=1.0 is not valid; expected a number in \[0, 1\)"),
        ({"final_learning_rate": 1.1}, r"expected a number in \[0, 1\]"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not valid; expected a number of at least 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 is not valid; expected None or a number above 0"),
        ({"schedule": "cos"}, "schedule='cos' is not valid; expected one of"),
    ],
)
def test_recipes_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_recipes_are_json() -> None:
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert Recipe(steps=np.int64(5), batch_size=1) == Recipe(steps=5, batch_size=1)
    listed = str(Recipe.__doc__).split("Attributes:")[1]
    for field in dataclasses.fields(Recipe):
        assert listed.count(f"\n        {field.name}: ") == 1


@each_backend
@pytest.mark.parametrize(
    ("config", "options", "dtype", "message"),
    [
        (CONFIGS["masked"], {"objective": "next_token"}, "float32", "needs a decoder"),
        (CONFIGS["decoder"], {"objective": "masked_lm"}, "float32", "needs an encoder"),
        (
            *(dataclasses.replace(CONFIGS["decoder"], head="none"), {}, "float32"),
            "head='none' predicts no tokens",
        ),
        (
            *(CONFIGS["decoder"], {}, "float16"),
            "weights are float16; expected float32 or float64",
        ),
    ],
)
def test_models_that_are_refused(
    backend: str, config: ALiBiConfig, options: Any, dtype: str, message: str
) -> None:
    recipe = dataclasses.replace(RECIPE, **options)
    with pytest.raises(ValueError, match=message):
        trainer_of(backend, config, recipe, draw_parameters(config), dtype)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("targets"), "the batch has no targets; it has tokens, segment"),
        (
            lambda batch: batch.update(labels=batch["targets"]),
            "'labels' is no array of a batch; expected tokens, targets and perhaps segment_ids",
        ),
        (
            lambda batch: batch.update(targets=batch["targets"][:, 1:]),
            r"targets has shape \[8, 11\] and tokens \[8, 12\]; expected one entry per token",
        ),
        (
            lambda batch: batch.update({name: array[:4] for name, array in batch.items()}),
            "the batch has 4 sequences and the recipe batch_size=8",
        ),
        (
            lambda batch: batch.update(targets=np.full_like(batch["targets"], IGNORED)),
            r"no position of the batch has a target: all are ignored \(-100\)",
        ),
        (
            lambda batch: batch.update(targets=batch["targets"] + 100),
            "target 122 is outside the vocabulary; expected 0 … 22",
        ),
        (
            lambda batch: batch.update(tokens=batch["tokens"] + 100),
            "token 122 is outside the vocabulary; expected 0 … 22",
        ),
    ],
)
def test_batches_that_are_refused(backend: str, change: Any, message: str) -> None:
    config, batch = CONFIGS["decoder"], batch_of("decoder")
    trainer = trainer_of(backend, config, recipe_of("decoder"), draw_parameters(config))
    change(batch)
    with pytest.raises(ValueError, match=message):
        trainer.step(batch)
    assert trainer.step_count == 0


def test_trainers_are_used_alike() -> None:
    """By one loop, which knows no framework."""
    config, names = CONFIGS["decoder"], []
    for backend in ("torch", "flax"):
        trainer = trainer_of(backend, config, recipe_of("decoder"), draw_parameters(config))
        names.append({name for name in dir(trainer) if not name.startswith("_")})
    assert names[1] - names[0] == {"params"}
    attributes = {"config", "recipe", "model", "optimizer", "optimizer_state", "step_count"}
    assert names[0] == attributes | {"step", "evaluate"}


def test_params_of_the_caller_stay() -> None:
    """A step donates params: the trainer's, which are copies."""
    config = CONFIGS["decoder"]
    params = jax.tree.map(jnp.asarray, flax_tree(Tensors.of(draw_parameters(config)), config))
    trainer = alibi_flax.Trainer(alibi_flax.ALiBiLM(config), params, recipe_of("decoder"))
    assert isinstance(trainer.step(batch_of("decoder")), Metrics)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
