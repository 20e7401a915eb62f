"""The core of training with AdamW (SPEC.md §18): loss, step and `Trainer`.

`alibi_torch/training.py` is the mirror image. Where batches come from and where results go is not
known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Float, Integer, Key

from alibi_flax.divided import beside
from alibi_flax.kernels.call import has_values_on_host
from alibi_flax.kernels.partition import automatic_mesh
from alibi_flax.model import ALiBiLM, checked_tokens
from alibi_flax.sharding import parameter_tree
from alibi_flax.stacking import is_stacked
from alibi_spec import ALiBiConfig
from alibi_spec.checks import (
    BATCH_OPTIONS,
    check_batch,
    check_counted,
    check_predicts,
    check_recipe,
)
from alibi_spec.sharding import batch_axes
from alibi_spec.training import IGNORED, Metrics, Recipe, decayed, learning_rates

Batch = Mapping[str, Integer[Array, "batch seq"] | Integer[np.ndarray, "batch seq"]]
Params = dict[str, Any]


@lru_cache(maxsize=16)  # a step is compiled for its optimizer
def adamw(config: ALiBiConfig, recipe: Recipe) -> optax.GradientTransformation:
    """An ordinary `optax.adamw` with the recipe's learning rates, for params of this model.

    Gradients are not clipped by it: `train_step` does that.
    """
    decays = decayed(config, recipe)
    return optax.adamw(
        partial(_learning_rate, recipe),
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        mask=lambda params: parameter_tree(
            config, lambda row: decays[row.name.replace("*", "0")], is_stacked(params)
        ),
    )


def loss(
    model: ALiBiLM, params: Params, batch: Batch, dropout_rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Integer[Array, ""]]:
    """Negative log-likelihood of the batch's targets: the sum, in nats, and how many count.

    Args:
        batch: "tokens" and "targets" (-100 does not count), perhaps "segment_ids",
            "attention_mask" and "token_type_ids", all [batch, seq].
        dropout_rng: key for dropout; None is without.

    Returns:
        The sum, float32 (float64), and the number of targets that are not -100.

    Raises:
        ValueError: as for the model's own call; arrays that make no batch.
    """
    check_predicts(model.config.head)
    check_batch({name: array.shape for name, array in batch.items()})
    options: Any = {name: batch[name] for name in BATCH_OPTIONS if name in batch}
    if dropout_rng is not None:
        options |= {"deterministic": False, "rngs": {"dropout": dropout_rng}}
    logits: Any = model.apply({"params": params}, batch["tokens"], **options)
    is_counted, chosen = _targets(model.config, batch)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    every = jax.nn.log_softmax(wide, axis=-1)
    found = jnp.take_along_axis(every, chosen[..., None], axis=-1)[..., 0]
    return -jnp.where(is_counted, found, 0).sum(), is_counted.sum()


def clip_gradients(gradients: Params, max_norm: float | None) -> tuple[Params, Float[Array, ""]]:
    """All gradients times min(1, max_norm / norm), and the norm of all together."""
    squares = [jnp.square(gradient).sum() for gradient in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(jnp.stack(squares).sum())
    if max_norm is None:
        return gradients, norm
    factor = jnp.minimum(max_norm / norm, 1)
    return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients), norm


def train_step(
    model: ALiBiLM,
    optimizer: optax.GradientTransformation,
    params: Params,
    optimizer_state: Any,
    batch: Batch,
    recipe: Recipe,
) -> tuple[Params, Any, Metrics]:
    """Params and optimizer state after one step of `recipe.batch_size` sequences.

    Gradients are those of the mean over all targets, in however many parts they are computed. The
    number of the step, which decides learning rate and dropout, is the optimizer's own. Where the
    loss or the norm is not finite nothing is changed. Compiled; params and state are donated.

    Args:
        optimizer: of `adamw`.
        batch: as for `loss`.

    Raises:
        ValueError: as for `loss`; another number of sequences, a part of the batch that the mesh
            of `jax.set_mesh` does not divide, or no targets (where they can be read without
            waiting for a device; else the loss is NaN).
    """
    check_batch({name: array.shape for name, array in batch.items()}, recipe.batch_size)
    mesh = automatic_mesh()
    if mesh is not None:  # what its devices do not divide, all of them would compute
        part = recipe.batch_size // recipe.accumulation_steps
        batch_axes((part, batch["tokens"].shape[1]), mesh.shape)
    checked_tokens(jnp.asarray(batch["tokens"]), model.config.output_dim)
    is_counted, _ = _targets(model.config, batch)
    if has_values_on_host(is_counted):
        check_counted(int(is_counted.sum()))
    step = compiled_step(params, optimizer_state)
    return step(model, optimizer, recipe, params, optimizer_state, batch)


def compiled_step(params: Params, optimizer_state: Any) -> Any:
    """`_step` that leaves params and state where they are; XLA might move them after every step."""
    places = jax.tree.map(_place_of, (params, optimizer_state))
    leaves, structure = jax.tree.flatten(places, is_leaf=lambda place: place is None)
    return _compiled_step(tuple(leaves), structure)


def _place_of(x: Array) -> NamedSharding | None:
    """Where an array is on a mesh; None where there is none, or the array is traced."""
    place = None if isinstance(x, Tracer) else x.sharding
    return place if isinstance(place, NamedSharding) else None


@lru_cache(maxsize=16)
def _compiled_step(places: tuple[NamedSharding | None, ...], structure: Any) -> Any:
    goals = jax.tree.unflatten(structure, places)
    return jax.jit(
        _step, static_argnums=(0, 1, 2), donate_argnums=(3, 4), out_shardings=(*goals, None)
    )


def _step(
    model: ALiBiLM,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    params: Params,
    optimizer_state: Any,
    batch: Batch,
) -> tuple[Params, Any, Metrics]:
    step = steps_taken(optimizer_state)
    dropout_rng = jax.random.fold_in(jax.random.key(recipe.seed), step)
    count = (batch["targets"] != IGNORED).sum()
    parts = jax.tree.map(
        lambda array: array.reshape(recipe.accumulation_steps, -1, array.shape[1]), dict(batch)
    )

    def mean_of(params: Params, part: Batch, rng: Key[Array, ""]) -> Float[Array, ""]:
        computed = _computed_in(recipe.compute_dtype, model.config, params)
        total, _ = loss(model, computed, part, rng)
        return total / count.astype(total.dtype)

    def added(gradients: Params, part: tuple[Batch, Key[Array, ""]]) -> tuple[Params, Array]:
        mean, new = jax.value_and_grad(mean_of)(params, *part)
        return jax.tree.map(jnp.add, gradients, new), mean

    rngs = jax.random.split(dropout_rng, recipe.accumulation_steps)
    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, means = jax.lax.scan(added, zeros, (parts, rngs))
    gradients, norm = clip_gradients(gradients, recipe.max_grad_norm)
    updates, new_state = optimizer.update(gradients, optimizer_state, params)
    new = (optax.apply_updates(params, updates), new_state)
    is_finite = jnp.isfinite(means.sum()) & jnp.isfinite(norm)
    params, optimizer_state = jax.tree.map(
        partial(jnp.where, is_finite), new, (params, optimizer_state)
    )
    return params, optimizer_state, Metrics(means.sum(), norm, _learning_rate(recipe, step))


def steps_taken(optimizer_state: Any) -> Integer[Array, ""]:
    """How many updates an optimizer of `adamw` has made."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    nodes = jax.tree.leaves(optimizer_state, is_leaf=is_adam)
    return next(node.count for node in nodes if is_adam(node))


class Trainer:
    """A model that is trained by a recipe, step by step.

    Attributes:
        config: of the model.
        recipe: how it is trained.
        model: computes with `params`.
        params: begin as a copy; every step replaces them.
        optimizer: an ordinary `optax.adamw`.
        optimizer_state: every step replaces it.

    Raises:
        ValueError: the model cannot be trained like this, or its weights are not float32 or
            float64.
    """

    def __init__(self, model: ALiBiLM, params: Params, recipe: Recipe) -> None:
        dtypes = {str(each.dtype) for each in jax.tree.leaves(params)}
        check_recipe(model.config, recipe, dtypes)
        self.config, self.recipe = model.config, recipe
        self.model = model.clone(recompute=model.recompute or recipe.recompute)
        self.params = jax.tree.map(jnp.array, params)
        self.optimizer = adamw(model.config, recipe)
        self.optimizer_state = beside(self.params, self.optimizer.init(self.params))

    @property
    def step_count(self) -> int:
        """How many steps have changed the weights."""
        return int(steps_taken(self.optimizer_state))

    def step(self, batch: Mapping[str, Any]) -> Metrics:
        """`train_step`, of arrays of JAX or NumPy."""
        arguments = (self.model, self.optimizer, self.params, self.optimizer_state)
        self.params, self.optimizer_state, metrics = train_step(*arguments, batch, self.recipe)
        return metrics

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """`loss` without dropout, of arrays of JAX or NumPy."""
        total, count = _evaluated(self.model, self.recipe.compute_dtype, self.params, batch)
        return float(total), int(count)


@partial(jax.jit, static_argnums=(0, 1))
def _evaluated(
    model: ALiBiLM, compute_dtype: str, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Integer[Array, ""]]:
    return loss(model, _computed_in(compute_dtype, model.config, params), batch)


def _learning_rate(recipe: Recipe, step: Any) -> Float[Array, ""]:
    return jnp.asarray(learning_rates(recipe))[jnp.minimum(step, recipe.steps - 1)]


def _targets(config: ALiBiConfig, batch: Batch) -> tuple[Array, Array]:
    """Which positions count, and a token for each: 0 where it does not."""
    is_counted = jnp.asarray(batch["targets"]) != IGNORED
    chosen = jnp.where(is_counted, batch["targets"], 0)
    return is_counted, checked_tokens(chosen, config.output_dim, "target")


def _computed_in(dtype: str, config: ALiBiConfig, params: Params) -> Params:
    """Params rounded to bfloat16, through which gradients reach the model's own."""
    if dtype == "float32":
        return params
    return jax.tree.map(
        lambda is_wide, leaf: leaf if is_wide else leaf.astype(jnp.bfloat16),
        parameter_tree(config, lambda row: row.is_wide, is_stacked(params)),
        params,
    )
