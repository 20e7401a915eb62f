"""The core of training with AdamW (SPEC.md §18): loss, step and `Trainer`.

`alibi_flax/training.py` is the mirror image. Where batches come from and where results go is not
known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from alibi_spec import ALiBiConfig, parameter_table
from alibi_spec.checks import (
    BATCH_OPTIONS,
    check_batch,
    check_counted,
    check_predicts,
    check_recipe,
)
from alibi_spec.training import IGNORED, Metrics, Recipe, decayed, learning_rates
from alibi_torch.divided import PARTS, PARTS_OF_SEQUENCES, own_part, place, summed, total_norm
from alibi_torch.model import ALiBiLM, checked_tokens
from alibi_torch.positions import of_own_positions

Batch = Mapping[str, Integer[Tensor, "batch seq"]]


def adamw(model: ALiBiLM, recipe: Recipe) -> torch.optim.AdamW:
    """An ordinary AdamW over the model's named parameters, in groups that decay and that do not.

    Gradients are not clipped by it, and its learning rate is that of the first step: `train_step`
    does both.
    """
    groups = []
    for decay, weight_decay in ((True, recipe.weight_decay), (False, 0.0)):
        names = [name for name, decays in decayed(model.config, recipe).items() if decays == decay]
        named = [(name, model.get_parameter(name)) for name in names]
        groups += [{"params": named, "weight_decay": weight_decay}] if named else []
    betas, rate = (recipe.beta1, recipe.beta2), float(learning_rates(recipe)[0])
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=recipe.epsilon)


def loss(model: ALiBiLM, batch: Batch) -> tuple[Float[Tensor, ""], Integer[Tensor, ""]]:
    """Negative log-likelihood of the batch's targets: the sum, in nats, and how many count.

    Args:
        model: with dropout if it is in training mode.
        batch: "tokens" and "targets" (-100 does not count), perhaps "segment_ids",
            "attention_mask" and "token_type_ids", all [batch, seq].

    Returns:
        The sum, float32 (float64), and the number of targets that are not -100; of positions that
        are divided over devices, those of this process.

    Raises:
        ValueError: as for the model's own call; arrays that make no batch.
    """
    check_predicts(model.config.head)
    check_batch({name: array.shape for name, array in batch.items()})
    options = {name: batch[name] for name in BATCH_OPTIONS if name in batch}
    with of_own_positions(model) as positions:
        logits = model(batch["tokens"], **options)
    targets = batch["targets"] if positions is None else positions.own(batch["targets"])
    is_counted, chosen = _targets(model.config, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = F.cross_entropy(wide.flatten(0, 1), chosen.flatten(), reduction="none")
    return found.masked_fill(~is_counted.flatten(), 0).sum(), is_counted.sum()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Float[Tensor, ""]:
    """Scale all gradients by min(1, max_norm / norm); returns the norm of all together.

    Of gradients that are divided over devices it is the norm of the whole ones.

    torch's own `clip_grad_norm_` divides by norm + 1e-6 instead.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = total_norm(gradients)
    if max_norm is not None:
        factor = (max_norm / norm).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


def train_step(
    model: ALiBiLM, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe
) -> Metrics:
    """Update the model in place by one step of `recipe.batch_size` sequences.

    Gradients are those of the mean over all targets, in however many parts they are computed. The
    number of the step, which decides learning rate and dropout, is the optimizer's own. Where the
    loss or the norm is not finite nothing is changed.

    Args:
        model: on one device, or divided over a mesh; it may have been compiled
            (`model.compile()`).
        optimizer: of `adamw`.
        batch: as for `loss`, in every process of a mesh the same: each computes its own part.

    Raises:
        ValueError: as for `loss`; another number of sequences, or no targets; a part of the batch
            that the mesh does not divide, or another dtype to compute in than `parallelize` got.
    """
    check_batch({name: array.shape for name, array in batch.items()}, recipe.batch_size)
    is_counted, _ = _targets(model.config, batch["targets"])
    count = is_counted.sum()
    check_counted(int(count))
    step = steps_taken(optimizer)
    rate = float(learning_rates(recipe)[min(step, recipe.steps - 1)])
    model.train()
    optimizer.zero_grad()
    total = torch.zeros((), device=count.device)
    with _dropout_of_step(recipe, step, count.device, model):
        for part in _parts(batch, recipe):
            with _computed_in(recipe.compute_dtype, model):
                mean = loss(model, own_part(part, model.mesh))[0] / count
                mean.backward()
            total = total + mean.detach()
    total = summed(total, model.mesh)
    norm = clip_gradients(model.parameters(), recipe.max_grad_norm)
    if total.isfinite() and norm.isfinite():
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return Metrics(total, norm, rate)


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How many updates an optimizer of `adamw` has made."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


class Trainer:
    """A model that is trained by a recipe, step by step.

    Attributes:
        config: of the model.
        recipe: how it is trained.
        model: is trained in place.
        optimizer: an ordinary `torch.optim.AdamW`.

    Raises:
        ValueError: the model cannot be trained like this, or its weights are not float32 or
            float64.
    """

    def __init__(self, model: ALiBiLM, recipe: Recipe) -> None:
        dtypes = {str(each.dtype).removeprefix("torch.") for each in model.parameters()}
        check_recipe(model.config, recipe, dtypes)
        self.config, self.recipe = model.config, recipe
        self.model = model
        self.model.transformer.recompute |= recipe.recompute
        self.optimizer = adamw(model, recipe)

    @property
    def step_count(self) -> int:
        """How many steps have changed the weights."""
        return steps_taken(self.optimizer)

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict."""
        return self.optimizer.state_dict()

    def step(self, batch: Mapping[str, Any]) -> Metrics:
        """`train_step`, of arrays of torch or NumPy."""
        return train_step(self.model, self.optimizer, self._placed(batch), self.recipe)

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """`loss` without dropout, of arrays of torch or NumPy.

        A batch that a mesh does not divide, every process computes as a whole.
        """
        self.model.eval()
        batch, mesh = self._placed(batch), self.model.mesh
        divides = len(batch["tokens"]) % place(mesh)[1] == 0
        with _computed_in(self.recipe.compute_dtype, self.model):
            total, count = loss(self.model, own_part(batch, mesh) if divides else batch)
        axes = PARTS if divides else PARTS_OF_SEQUENCES
        return float(summed(total, mesh, axes)), int(summed(count, mesh, axes))

    def _placed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {
            name: (array if isinstance(array, Tensor) else torch.tensor(array)).to(device)
            for name, array in batch.items()
        }


def _targets(config: ALiBiConfig, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions count, and a token for each: 0 where it does not."""
    is_counted = targets != IGNORED
    chosen = targets.masked_fill(~is_counted, 0)
    return is_counted, checked_tokens(chosen, config.output_dim, "target")


def _parts(batch: Batch, recipe: Recipe) -> Iterator[Batch]:
    size = recipe.batch_size // recipe.accumulation_steps
    for start in range(0, recipe.batch_size, size):
        yield {name: array[start : start + size] for name, array in batch.items()}


@contextmanager
def _dropout_of_step(
    recipe: Recipe, step: int, device: torch.device, model: ALiBiLM
) -> Iterator[None]:
    """Dropout that depends on seed, step and part alone; torch's generators go on as if unused."""
    key = np.array([recipe.seed, step], np.uint64)
    counter = np.array([0, 0, 0, place(model.mesh)[0]], np.uint64)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.Philox(key=key, counter=counter).random_raw()))
        yield


@contextmanager
def _computed_in(dtype: str, model: ALiBiLM) -> Iterator[None]:
    """With parameters rounded to bfloat16, whose gradients are added to the model's own.

    The backward pass must be inside: it may compute blocks again.
    """
    if model.gathered_dtype not in (None, dtype):
        raise ValueError(
            f"compute_dtype={dtype!r} and a model whose weights FSDP gathers in "
            f"{model.gathered_dtype}; pass parallelize(..., compute_dtype={dtype!r})"
        )
    if dtype == "float32" or model.gathered_dtype is not None:
        yield
        return
    places = [row.name.rpartition(".") for row in parameter_table(model.config) if not row.is_wide]
    owners = [(model.get_submodule(owner), leaf) for owner, _, leaf in places]
    weights = [getattr(module, leaf) for module, leaf in owners]
    rounded = [nn.Parameter(each.detach().bfloat16(), each.requires_grad) for each in weights]
    try:
        for (module, leaf), each in zip(owners, rounded, strict=True):
            setattr(module, leaf, each)
        yield
    finally:
        for (module, leaf), each in zip(owners, weights, strict=True):
            setattr(module, leaf, each)
    for weight, each in zip(weights, rounded, strict=True):
        if each.grad is not None:
            gradient = each.grad.to(weight.dtype)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
