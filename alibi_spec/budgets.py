"""How much rounding each dtype and device may cause, every row with its derivation.

Errors are measured against float64, as the largest deviation of any element over the largest
magnitude of the exact array. A sum of n independent roundings of relative size u drifts by about
√n · u, so a budget of b allows for a path of (b / u)² roundings from the inputs to the element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64, Num


@dataclass(frozen=True)
class Budget:
    """What one dtype may cost on one kind of device.

    Attributes:
        forward: largest relative error of activations and logits.
        gradient: largest relative error of a parameter's gradient.
        ratio: how many times larger one backend's error may be than the other's.
        divergence: largest Kullback-Leibler divergence, in nats, of a next-token distribution.
        derivation: where the numbers come from.
    """

    forward: float
    gradient: float
    ratio: float
    divergence: float
    derivation: str


_FLOAT64 = Budget(
    1e-10, 1e-10, 100.0, 1e-15,
    "u = 2^-53. Separates wrong mathematics (at least 1e-6) from rounding (about 1e-14).",
)  # fmt: skip
_FLOAT32 = Budget(
    1e-5, 5e-5, 4.0, 1e-8,
    "u = 2^-24: forward 168 u, a path of 28,000 roundings; backward five times that path's drift, "
    "because a gradient sums over the batch and passes every layer twice. The ratio covers two "
    "orders of summation of the same terms. Divergence is about error²: (1e-5 · 10)².",
)  # fmt: skip
_BFLOAT16 = Budget(
    5e-2, 1e-1, 4.0, 1e-3,
    "u = 2^-9: forward 26 u, a path of 650 roundings of stored activations; products are summed "
    "and softmax is taken in float32. KL is about half the squared logit error: (0.05)² / 2.",
)  # fmt: skip

BUDGETS: Mapping[tuple[str, str], Budget] = {
    ("float64", "cpu"): _FLOAT64,
    ("float32", "cpu"): _FLOAT32,
    ("bfloat16", "cpu"): _BFLOAT16,
    ("float64", "gpu"): _FLOAT64,
    ("float32", "gpu"): _FLOAT32,  # with IEEE matmuls, not TF32
    ("bfloat16", "gpu"): _BFLOAT16,
    ("float32", "tpu"): _FLOAT32,  # with precision "highest", six bfloat16 passes
    ("bfloat16", "tpu"): _BFLOAT16,
}


def relative_error(
    actual: Num[np.ndarray, "*shape"], exact: Float64[np.ndarray, "*shape"], floor: float = 0.0
) -> float:
    """Largest deviation of any element over max(largest finite magnitude of `exact`, `floor`).

    Infinite elements must be equal; a NaN or a misplaced infinity gives inf.
    """
    finite = np.isfinite(exact)
    if not np.array_equal(np.where(finite, 0.0, exact), np.where(finite, 0.0, actual)):
        return float("inf")
    deviation = np.abs(np.where(finite, actual, 0.0) - np.where(finite, exact, 0.0))
    if not np.isfinite(deviation).all():
        return float("inf")
    magnitude = max(float(np.abs(exact[finite]).max(initial=0.0)), floor)
    largest = float(deviation.max(initial=0.0))
    return largest / magnitude if magnitude else (0.0 if largest == 0 else float("inf"))


def gradient_floor(gradients: Mapping[str, Float64[np.ndarray, "..."]]) -> float:
    """The least magnitude that a parameter's gradient error is measured against.

    1/64 of the largest element of all. Some gradients are zero in theory (softmax does not see a
    key's bias): what is left of them is the rounding of terms that cancel.
    """
    return max(float(np.abs(gradient).max()) for gradient in gradients.values()) / 64
