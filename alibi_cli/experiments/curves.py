"""Loss against length, over seeds; and where figures come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np

from alibi_cli.experiments.positions import ALIBI, LEARNED, NONE, ROTARY, SINUSOIDAL

COLOURS = {
    ALIBI: "#0b6e99",
    ROTARY: "#4b8b3b",
    SINUSOIDAL: "#c2571a",
    LEARNED: "#8a5aa3",
    NONE: "#777777",
}


@dataclass(frozen=True)
class Curve:
    """Held-out loss of models that differ in their seed alone.

    Attributes:
        names: what is the same for all, such as "positions".
        lengths: of the sequences.
        bits_per_byte: of the model of each seed, at each length.
    """

    names: dict[str, Any]
    lengths: list[int]
    bits_per_byte: list[list[float]]

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds, at each length."""
        return np.mean(self.bits_per_byte, axis=0)

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation over the seeds, at each length; 0 for one seed."""
        if len(self.bits_per_byte) == 1:
            return np.zeros(len(self.lengths))
        return np.std(self.bits_per_byte, axis=0, ddof=1)

    def to_dict(self) -> dict[str, Any]:
        """By length, as plain JSON values."""

        def by_length(values: Sequence[Any]) -> dict[int, Any]:
            return dict(zip(self.lengths, values, strict=True))

        return {
            **self.names,
            "mean": by_length(self.mean.tolist()),
            "spread": by_length(self.spread.tolist()),
            "bits_per_byte": by_length(np.transpose(self.bits_per_byte).tolist()),
        }


def origin(packages: Iterable[str]) -> dict[str, Any]:
    """Date, machine and versions."""
    versions = {name: version(name) for name in packages}
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions | {"python": platform.python_version()},
    }
