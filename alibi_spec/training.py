"""How a model is trained: targets, loss, learning rates and updates in float64 (SPEC.md §18).

The backends do the same with `torch.optim` and optax. Where batches come from and where results go
is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from alibi_spec.config import ALiBiConfig
from alibi_spec.options import (
    COUNT,
    FLAG,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    Options,
    one_of,
    option,
    or_none,
    with_options_documented,
)
from alibi_spec.parameters import parameter_table
from alibi_spec.reference import log_softmax

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Integer

    from alibi_spec.masks import AttentionMask

Arrays = Mapping[str, Any]  # by the names of parameters

IGNORED = -100  # the target of a position that does not count, in torch and in transformers
OBJECTIVES = ("next_token", "masked_lm")
SCHEDULES = ("cosine", "linear", "constant")
DECAYS = ("matrices", "all")
COMPUTE_DTYPES = ("float32", "bfloat16")

# Names of our options in other libraries, where the nearest spelling is a wrong option.
_ELSEWHERE = {
    "lr": "learning_rate",
    "max_steps": "steps",
    "num_train_steps": "steps",
    "gradient_accumulation_steps": "accumulation_steps",
    "lr_scheduler_type": "schedule",
    "min_lr": "final_learning_rate",
    "eps": "epsilon",
    "wd": "weight_decay",
    "clip": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "precision": "compute_dtype",
    "dtype": "compute_dtype",
    "remat": "recompute",
    "gradient_checkpointing": "recompute",
}


@with_options_documented
@dataclass(frozen=True)
class Recipe(Options):
    """How a model is trained, independent of framework and device.

    `help(Recipe)` lists the options.

    Raises:
        ValueError: an unknown option, or one with an impossible value; the message names it and
            the fix.
    """

    KIND: ClassVar[str] = "recipe"
    ELSEWHERE: ClassVar[Mapping[str, str]] = _ELSEWHERE

    objective: str = option(
        "next_token",
        one_of(OBJECTIVES),
        '"next_token" (decoders) or "masked_lm" (encoders).',
    )
    steps: int = option(1000, COUNT, "updates of the weights.")
    batch_size: int = option(32, COUNT, "sequences of one step, those of all its parts.")
    accumulation_steps: int = option(
        1,
        COUNT,
        "parts of a step, whose gradients are added; a divisor of `batch_size`.",
    )
    learning_rate: float = option(1e-3, POSITIVE, "the highest learning rate.")
    schedule: str = option(
        "cosine",
        one_of(SCHEDULES),
        'how the learning rate falls after the warm-up: "cosine", "linear", or "constant", '
        "not at all.",
    )
    warmup_steps: int = option(
        0,
        NATURAL,
        "steps in which the learning rate rises, fewer than `steps`.",
    )
    final_learning_rate: float = option(
        0.1,
        SHARE,
        "learning rate of the last step, as a share of the highest.",
    )
    beta1: float = option(0.9, RATE, "decay of the mean of gradients.")
    beta2: float = option(0.95, RATE, "decay of the mean of squared gradients.")
    epsilon: float = option(1e-8, POSITIVE, "is added to the root of the mean square.")
    weight_decay: float = option(0.1, NOT_NEGATIVE, "share, times the learning rate, of a weight.")
    decay: str = option(
        "matrices",
        one_of(DECAYS),
        '"matrices": weights of linear maps decay, and no bias, norm, embedding or slope; "all".',
    )
    max_grad_norm: float | None = option(
        1.0,
        or_none(POSITIVE),
        "gradients whose norm, of all together, is larger are scaled to it; None never.",
    )
    compute_dtype: str = option(
        "float32",
        one_of(COMPUTE_DTYPES),
        '"float32": a step computes in the dtype of the weights; "bfloat16": with weights '
        "rounded to it.",
    )
    recompute: bool = option(
        False,
        FLAG,
        "blocks are computed again in the backward pass instead of keeping what it needs.",
    )
    seed: int = option(0, NATURAL, "of dropout and of masked tokens.")

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.batch_size % self.accumulation_steps != 0,
            f"accumulation_steps={self.accumulation_steps} does not divide "
            f"batch_size={self.batch_size}",
        )
        yield (
            self.warmup_steps >= self.steps,
            f"warmup_steps={self.warmup_steps} leaves none of steps={self.steps}",
        )


class Metrics(NamedTuple):
    """What a step tells; `float` reads a number that is still on a device.

    Attributes:
        loss: mean negative log-likelihood of the step's targets, in nats, before the update.
        grad_norm: norm of the gradients of all parameters together, before they are clipped.
        learning_rate: of the step. Where loss or norm is not finite nothing was updated.
    """

    loss: Any
    grad_norm: Any
    learning_rate: Any


def next_token_targets(
    tokens: Integer[np.ndarray, "batch seq"],
    segment_ids: Integer[np.ndarray, "batch seq"] | None = None,
    attention_mask: AttentionMask | None = None,
) -> Integer[np.ndarray, "batch seq"]:
    """The token after each one; -100 where that is none, padding, or of another document."""
    is_followed = np.ones_like(tokens[:, 1:], dtype=bool)
    if segment_ids is not None:
        is_followed &= segment_ids[:, 1:] == segment_ids[:, :-1]
    if attention_mask is not None:
        is_followed &= (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    targets = np.full(tokens.shape, IGNORED, np.int64)
    targets[:, :-1] = np.where(is_followed, tokens[:, 1:], IGNORED)
    return targets


def masked_lm_batch(
    tokens: Integer[np.ndarray, "batch seq"],
    mask_token_id: int,
    vocab_size: int,
    *,
    seed: int,
    first_sequence: int = 0,
    attention_mask: AttentionMask | None = None,
    special_token_ids: Collection[int] = (),
) -> dict[str, Integer[np.ndarray, "batch seq"]]:
    """Corrupted tokens, and as targets what they were (Devlin et al. 2019).

    15 % of the tokens are chosen; of these 80 % become the mask, 10 % any token, and 10 % stay.
    What happens to a sequence depends on the seed and its number alone: its numbers are those of
    NumPy's Philox4x64-10 with the key (seed, number).

    Args:
        first_sequence: the number of the first sequence, of all sequences of the training.
        attention_mask: padding is never chosen.
        special_token_ids: nor are these tokens.
    """
    first, (rows, seq) = first_sequence, tokens.shape
    keys = [np.array([seed, first + row], np.uint64) for row in range(rows)]
    drawn = [np.random.Generator(np.random.Philox(key=key)).random((3, seq)) for key in keys]
    chosen, what, which = np.stack(drawn, axis=1)
    is_chosen = (chosen < 0.15) & ~np.isin(tokens, list(special_token_ids))
    if attention_mask is not None:
        is_chosen &= attention_mask != 0
    replaced = np.where(what < 0.8, mask_token_id, np.floor(which * vocab_size).astype(np.int64))
    corrupted = np.where(is_chosen & (what < 0.9), replaced, tokens)
    return {"tokens": corrupted, "targets": np.where(is_chosen, tokens, IGNORED)}


def negative_log_likelihood(
    logits: Float[np.ndarray, "batch seq vocab"], targets: Integer[np.ndarray, "batch seq"]
) -> tuple[float, int]:
    """The sum over all targets, in nats, and how many count."""
    is_counted = targets != IGNORED
    which = np.where(is_counted, targets, 0)[..., None]
    found = np.take_along_axis(log_softmax(logits.astype(np.float64)), which, axis=-1)[..., 0]
    return -float(found[is_counted].sum()), int(is_counted.sum())


@lru_cache(maxsize=16)
def learning_rates(recipe: Recipe) -> Float64[np.ndarray, " steps"]:
    """The learning rate of every step, read-only; after its steps the last one stays."""
    step, final = np.arange(recipe.steps), recipe.final_learning_rate
    falling = np.maximum(0, step - recipe.warmup_steps)
    progress = falling / max(1, recipe.steps - 1 - recipe.warmup_steps)
    share = {
        "cosine": (1 + np.cos(np.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": np.ones(recipe.steps),
    }[recipe.schedule]
    rising = np.minimum(1, (step + 1) / (recipe.warmup_steps + 1))
    rates = recipe.learning_rate * rising * (final + (1 - final) * share)
    rates.setflags(write=False)
    return rates


def decayed(config: ALiBiConfig, recipe: Recipe) -> dict[str, bool]:
    """Of each parameter, in the order of the table, whether it decays."""
    return {row.name: recipe.decay == "all" or row.is_matrix for row in parameter_table(config)}


class AdamWState(NamedTuple):
    """What AdamW remembers.

    Attributes:
        step: updates so far.
        mean, mean_square: of the gradients so far, of each parameter, not corrected.
    """

    step: int
    mean: Arrays
    mean_square: Arrays


def adamw_start(parameters: Arrays) -> AdamWState:
    """What AdamW remembers before the first step."""
    zeros = {name: np.zeros(array.shape) for name, array in parameters.items()}
    return AdamWState(0, zeros, zeros)


def clipped_gradients(gradients: Arrays, max_norm: float | None) -> tuple[Arrays, float]:
    """Gradients times min(1, max_norm / norm), and the norm of all together."""
    norm = float(np.sqrt(sum(float((array**2).sum()) for array in gradients.values())))
    factor = 1.0 if max_norm is None or norm <= max_norm else max_norm / norm
    return {name: array * factor for name, array in gradients.items()}, norm


def adamw_update(
    config: ALiBiConfig, recipe: Recipe, parameters: Arrays, gradients: Arrays, state: AdamWState
) -> tuple[dict[str, Any], AdamWState]:
    """The parameters after a step, from clipped gradients (SPEC.md §18.4)."""
    beta1, beta2, step = recipe.beta1, recipe.beta2, state.step + 1
    rate = learning_rates(recipe)[min(state.step, recipe.steps - 1)]
    new, mean, mean_square = {}, {}, {}
    for name, decays in decayed(config, recipe).items():
        mean[name] = beta1 * state.mean[name] + (1 - beta1) * gradients[name]
        squared = gradients[name] ** 2
        mean_square[name] = beta2 * state.mean_square[name] + (1 - beta2) * squared
        root = np.sqrt(mean_square[name] / (1 - beta2**step))
        move = mean[name] / (1 - beta1**step) / (root + recipe.epsilon)
        if decays:
            move = move + recipe.weight_decay * parameters[name]
        new[name] = parameters[name] - rate * move
    return new, AdamWState(step, mean, mean_square)
