"""How much rounding each dtype and device may cause, every row with its derivation.

Errors are measured against float64, as the largest deviation of any element over the largest
magnitude of the exact array. A sum of n independent roundings of relative size u drifts by about
√n · u, so a budget of b allows for a path of (b / u)² roundings from the inputs to the element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.reference import shared_heads

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Num

    from alibi_spec.config import ALiBiConfig


@dataclass(frozen=True)
class Budget:
    """The errors that one dtype may have on one kind of device.

    Attributes:
        forward: largest relative error of activations and logits.
        ratio: how many times larger one backend's `forward` error may be than the other's.
        gradient: largest relative error of a parameter's gradient.
        gradient_ratio: the same as `ratio`, for gradients.
        divergence: largest Kullback-Leibler divergence, in nats, of a next-token distribution.
        derivation: where the numbers come from.
    """

    forward: float
    ratio: float
    gradient: float
    gradient_ratio: float
    divergence: float
    derivation: str


_FLOAT64 = Budget(
    forward=1e-10,
    ratio=4.0,
    gradient=1e-10,
    gradient_ratio=32.0,
    divergence=1e-12,
    derivation="u = 2^-53. Separates wrong mathematics (at least 1e-6) from rounding (1e-14).",
)
_FLOAT32 = Budget(
    forward=1e-5,
    ratio=4.0,
    gradient=5e-5,
    gradient_ratio=32.0,
    divergence=1e-8,
    derivation="u = 2^-24: forward 168 u, a path of 28,000 roundings; backward five times that, "
    "because a gradient sums over the batch and passes every layer twice. Forward, the backends "
    "sum the same terms in two orders. Backward, torch adds the rows of a norm's gradient one by "
    "one where XLA adds them in pairs: over 900 rows a factor of about 30. Divergence is about "
    "half the squared logit error: (1e-5 · 10)² / 2.",
)
_BFLOAT16 = Budget(
    forward=5e-2,
    ratio=4.0,
    gradient=2e-1,
    gradient_ratio=32.0,
    divergence=1e-3,
    derivation="u = 2^-9: forward 26 u, a path of 650 roundings of stored activations; products "
    "are summed and softmax is taken in float32. Backward, torch adds the rows of a norm's "
    "gradient in bfloat16: over 900 rows three times √900 u. Divergence is about half the squared "
    "logit error: (0.05)² / 2.",
)
_FLOAT16 = Budget(
    forward=6e-3,
    ratio=4.0,
    gradient=2.5e-2,
    gradient_ratio=32.0,
    divergence=2e-5,
    derivation="u = 2^-11, three bits finer than bfloat16: an eighth of its budget. Divergence is "
    "about half the squared logit error: (6e-3)² / 2.",
)

BUDGETS: Mapping[tuple[str, str], Budget] = {
    ("float64", "cpu"): _FLOAT64,
    ("float32", "cpu"): _FLOAT32,
    ("bfloat16", "cpu"): _BFLOAT16,
    ("float16", "cpu"): _FLOAT16,
    ("float64", "gpu"): _FLOAT64,
    ("float32", "gpu"): replace(
        _FLOAT32,
        derivation=f"{_FLOAT32.derivation} Products are IEEE's, in full_precision: with TF32's "
        "factors, u = 2^-11, emulated models err by more than ten times this "
        "(benchmarks/results/precision.json).",
    ),
    ("bfloat16", "gpu"): _BFLOAT16,
    ("float32", "tpu"): replace(
        _FLOAT32,
        derivation=f"{_FLOAT32.derivation} Products are of six bfloat16 passes, in full_precision: "
        "three parts of 8 bits are float32's 24, and emulated models err like float32. Three "
        "passes, u = 2^-16, are at its edge, one pass is far beyond "
        "(benchmarks/results/precision.json).",
    ),
    ("bfloat16", "tpu"): _BFLOAT16,
}


# A number this close to the boundary between two tokens can draw either (SPEC.md §11): logits of
# about 10 err by 1e-5 of that, so probabilities have a relative error of 1e-4, and their sums less.
DRAWING = 1e-4


@dataclass(frozen=True)
class Agreement:
    """How far two computations of one array may differ, relative to its largest magnitude."""

    relative: float
    derivation: str


AGREEMENTS: Mapping[str, Agreement] = {
    "float64 sums": Agreement(1e-12, "u = 2^-53: 9,000 u, two sums of the same 10^7 products."),
    "float32 sums": Agreement(1e-6, "u = 2^-24: 17 u, the sum of 280 products in two orders."),
    "float64 training": Agreement(
        1e-10,
        "u = 2^-53: 10^6 u, the errors of 200 steps that grow to 4,000 times one rounding at most.",
    ),
    "float32 training": Agreement(
        1e-4,
        "u = 2^-24: twenty steps of 3e-3 round a weight of 2 twenty times, in the worst case by "
        "20 · 2 u = 2.4e-6 of 0.06, which is 4e-5; gradients err less.",
    ),
    "kit": Agreement(
        2.0**-23,
        "u = 2^-24: two float64 results that differ by far less can be rounded to neighbours.",
    ),
    "rounding": Agreement(1e-6, "x'/x - 1 errs by u = 2^-53, 2e-9 of the 2^-24 that it measures."),
    "llama.cpp's GELU": Agreement(
        5e-4,
        "u = 2^-11: it looks GELU up in a table of float16, by the input rounded to float16. Each "
        "hidden unit errs by 2 u at most, and the products with some hundred of them average it.",
    ),
    "llama.cpp's GELU, hidden states": Agreement(
        1e-3,
        "That of its table, and as much for tanh, which differs from the exact GELU by 4.8e-4 at "
        "most, in a stream of size 1 behind a norm. No head averages them.",
    ),
    "optimizer": Agreement(
        1e-12,
        "u = 2^-53: 9,000 u. An update is seen as the difference of weights of 1, of which it is "
        "1/512 or more: 512 u, beside the twenty roundings of its rule.",
    ),
}


def relative_error(
    actual: Num[np.ndarray, "*shape"], exact: Float64[np.ndarray, "*shape"], floor: float = 0.0
) -> float:
    """Largest deviation of any element over max(largest finite magnitude of `exact`, `floor`).

    Infinite elements must be equal; a NaN or a misplaced infinity gives inf.
    """
    return float(relative_deviations(actual, exact, floor).max(initial=0.0))


def relative_deviations(
    actual: Num[np.ndarray, "*shape"], exact: Float64[np.ndarray, "*shape"], floor: float = 0.0
) -> Float64[np.ndarray, "*shape"]:
    """What `relative_error` is the largest of."""
    return _over(_deviations(actual, exact), _magnitude(exact, floor))


def activation_errors(
    config: ALiBiConfig,
    found: Mapping[str, Num[np.ndarray, "..."]],
    exact: Mapping[str, Float64[np.ndarray, "..."]],
) -> dict[str, float]:
    """`relative_error` of every intermediate in `found`, in the order of computation.

    Errors of biased logits are relative to their q·k part: relative to the bias, which grows with
    the sequence, any error would look small.
    """
    return {
        name: float(activation_deviations(config, name, found[name], exact).max(initial=0.0))
        for name in exact
        if name in found
    }


def activation_deviations(
    config: ALiBiConfig,
    name: str,
    found: Num[np.ndarray, "..."],
    exact: Mapping[str, Float64[np.ndarray, "..."]],
) -> Float64[np.ndarray, "..."]:
    """What the error of one intermediate is the largest of, element by element."""
    if not name.endswith(".biased_logits"):
        return relative_deviations(found.astype(np.float64), exact[name])
    layer = name.removesuffix(".biased_logits")
    key = shared_heads(exact[f"{layer}.key"], config.num_heads)
    scores = config.scale * (exact[f"{layer}.query"] @ key.swapaxes(-1, -2))
    return _deviations_of_logits(found, exact[name], scores)


def _deviations_of_logits(
    found: Float[np.ndarray, "batch heads seq seq"],
    exact: Float64[np.ndarray, "batch heads seq seq"],
    scores: Float64[np.ndarray, "batch heads seq seq"],
) -> Float64[np.ndarray, "batch heads seq seq"]:
    """Deviations beyond one rounding of the sum, over the largest visible score."""
    visible, excess = np.isfinite(exact), _deviations(found, exact)
    rounding = np.abs(exact[visible]) * float(np.finfo(found.dtype).eps)
    excess[visible] = np.maximum(excess[visible] - rounding, 0.0)
    return _over(excess, float(np.abs(scores[visible]).max(initial=0.0)))


def _deviations(
    found: Num[np.ndarray, "*shape"], exact: Float64[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """The distance of each element; infinite where either is not finite and they are not equal."""
    with np.errstate(invalid="ignore"):
        distance = np.abs(found - exact)
    if np.isfinite(distance).all():
        return distance
    # Equal infinities are NaN apart.
    return np.where(found == exact, 0.0, np.where(np.isnan(distance), np.inf, distance))


def _magnitude(exact: Float64[np.ndarray, "..."], floor: float) -> float:
    """The largest finite one, or `floor`."""
    largest = np.abs(exact).max(initial=0.0)
    if not np.isfinite(largest):
        largest = np.abs(exact[np.isfinite(exact)]).max(initial=0.0)
    return max(float(largest), floor)


def _over(
    deviations: Float64[np.ndarray, "*shape"], magnitude: float
) -> Float64[np.ndarray, "*shape"]:
    """Deviations divided by a magnitude; those from nothing but zeros are infinite, if any."""
    if magnitude:
        return deviations / magnitude
    return np.where(deviations == 0, 0.0, np.inf)


def gradient_floor(gradients: Mapping[str, Float64[np.ndarray, "..."]]) -> float:
    """The least magnitude that the error of a gradient is divided by.

    1/64 of the largest element of all gradients. Some gradients are zero in theory (softmax does
    not see a key's bias), and hold only the rounding of terms that cancel.
    """
    return max(float(np.abs(gradient).max()) for gradient in gradients.values()) / 64
