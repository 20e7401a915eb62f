"""The results of the demo: a table, a picture, and a report with all figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alibi_cli.demo.training import LEARNING_RATES
from alibi_convert.writing.atomic import replacing
from alibi_verify import Check

OPTIONS = ("steps", "length", "batch", "layers", "width", "heads", "seed", "seeds")
VERSIONS = ("torch", "jax", "flax", "numpy", "python")
COLOURS = {"ALiBi": "#0b6e99", "rotary": "#4b8b3b", "sinusoidal": "#c2571a"}


@dataclass(frozen=True)
class Curve:
    """Held-out loss of the models with one kind of positions, in one backend.

    Attributes:
        positions: "ALiBi", "rotary" or "sinusoidal".
        backend: "PyTorch" or "Flax".
        lengths: of the sequences.
        bits_per_byte: of the model of each seed, at each length.
    """

    positions: str
    backend: str
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
            "positions": self.positions,
            "backend": self.backend,
            "mean": by_length(self.mean.tolist()),
            "spread": by_length(self.spread.tolist()),
            "bits_per_byte": by_length(np.transpose(self.bits_per_byte).tolist()),
        }


def table_lines(curves: Sequence[Curve]) -> Iterator[str]:
    """Mean and spread of every curve."""
    lengths = curves[0].lengths
    yield f"  {'positions':<12}{'backend':<10}" + "".join(f"{length:>16}" for length in lengths)
    for curve in curves:
        cells = zip(curve.mean, curve.spread, strict=True)
        texts = [f"{mean:.4f} ± {spread:.4f}" for mean, spread in cells]
        line = "".join(f"{text:>16}" for text in texts)
        yield f"  {curve.positions:<12}{curve.backend:<10}{line}"


def draw(curves: Sequence[Curve], training_length: int, seeds: int, path: Path) -> None:
    """Loss against length: a line and a band per kind of positions, crosses on it for Flax."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in curves:
        colour = COLOURS[curve.positions]
        style: dict[str, Any] = (
            {"marker": "o", "linewidth": 1.8}
            if curve.backend == "PyTorch"
            else {"marker": "x", "linestyle": "none", "markersize": 11, "markeredgewidth": 1.8}
        )
        label = f"{curve.positions}, {curve.backend}"
        axes.plot(curve.lengths, curve.mean, color=colour, label=label, **style)
        if curve.backend == "PyTorch":
            low, high = np.min(curve.bits_per_byte, axis=0), np.max(curve.bits_per_byte, axis=0)
            axes.fill_between(curve.lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axvline(training_length, color="grey", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    lengths = curves[0].lengths
    axes.set_xticks(lengths, [f"{n}\n{n // training_length}×" for n in lengths])
    axes.set_xlabel(f"sequence length in bytes (trained at {training_length})")
    axes.set_ylabel("held-out bits per byte")
    title = "Train short, test long"
    axes.set_title(title if seeds == 1 else f"{title}: mean and range of {seeds} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path, overwrite=True) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)


def write_report(
    path: Path,
    options: argparse.Namespace,
    source: str,
    checks: Sequence[Check],
    curves: Sequence[Curve],
) -> None:
    """Every figure, with machine, versions and date."""
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            name: platform.python_version() if name == "python" else version(name)
            for name in VERSIONS
        },
        "text": source,
        "options": {name: getattr(options, name) for name in OPTIONS},
        "learning_rates": LEARNING_RATES,
        "checks": [asdict(check) for check in checks],
        "bits_per_byte": [curve.to_dict() for curve in curves],
    }
    with replacing(path, overwrite=True) as new:
        new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
