"""The results of the demo: a table, a picture, and a report with all figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from alibi_cli.experiments.curves import COLOURS, Curve, origin
from alibi_convert.writing.atomic import replacing
from alibi_verify import Check

OPTIONS = ("steps", "length", "batch", "layers", "width", "heads", "seed", "seeds")
PACKAGES = ("torch", "jax", "flax", "numpy")


def table_lines(curves: Sequence[Curve]) -> Iterator[str]:
    """Mean and spread of every curve."""
    lengths = curves[0].lengths
    yield f"  {'positions':<12}{'backend':<10}" + "".join(f"{length:>16}" for length in lengths)
    for curve in curves:
        cells = zip(curve.mean, curve.spread, strict=True)
        texts = [f"{mean:.4f} ± {spread:.4f}" for mean, spread in cells]
        line = "".join(f"{text:>16}" for text in texts)
        yield f"  {curve.names['positions']:<12}{curve.names['backend']:<10}{line}"


def draw(curves: Sequence[Curve], training_length: int, seeds: int, path: Path) -> None:
    """Loss against length: a line and a band per kind of positions, crosses on it for Flax."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in curves:
        colour = COLOURS[curve.names["positions"]]
        style: dict[str, Any] = (
            {"marker": "o", "linewidth": 1.8}
            if curve.names["backend"] == "PyTorch"
            else {"marker": "x", "linestyle": "none", "markersize": 11, "markeredgewidth": 1.8}
        )
        label = f"{curve.names['positions']}, {curve.names['backend']}"
        axes.plot(curve.lengths, curve.mean, color=colour, label=label, **style)
        if curve.names["backend"] == "PyTorch":
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
    learning_rates: Mapping[str, float],
    source: str,
    checks: Sequence[Check],
    curves: Sequence[Curve],
) -> None:
    """Every figure, with machine, versions and date."""
    report = origin(PACKAGES) | {
        "text": source,
        "options": {name: getattr(options, name) for name in OPTIONS},
        "learning_rates": dict(learning_rates),
        "checks": [asdict(check) for check in checks],
        "bits_per_byte": [curve.to_dict() for curve in curves],
    }
    with replacing(path, overwrite=True) as new:
        new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
