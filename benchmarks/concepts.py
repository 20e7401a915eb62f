"""The pictures of docs/concepts.md, computed by the spec alone: `python -m benchmarks.concepts`.

Weights and inputs are drawn, so that no checkpoint is needed; only NumPy and matplotlib are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alibi_spec import (
    ALiBiConfig,
    bias,
    biased_logits,
    masked_softmax,
    model_slopes,
    reference_forward,
    slopes,
)
from alibi_spec.bounds import model_windows
from alibi_spec.certificate import TOLERANCES, attention_plan, keys_needed
from alibi_spec.parameters import initial_parameters

FOLDER = Path(__file__).parent.parent / "docs" / "concepts"
HEADS = 8
# Larger initial weights than a model's own, so that q·k counts as it does after training.
CONFIG = ALiBiConfig(num_layers=1, d_model=64, num_heads=HEADS, vocab_size=256, init_std=0.12)
LENGTH, BLOCK = 1024, 64


def bias_picture() -> Figure:
    """The bias against the distance, and what it leaves of attention where q·k is the same."""
    figure, (line, share) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    distance = np.arange(65)
    biases = bias(slopes(HEADS), query_len=1, key_len=65)[:, 0, ::-1]  # the query is the last key
    for head, values in enumerate(biases):
        label = f"m = 1/{1 / slopes(HEADS)[head]:g}"
        line.plot(distance, values, color=_color(head), label=label)
        share.plot(distance, masked_softmax(values), color=_color(head))
    line.set(ylim=(-16, 0.5), ylabel="bias, −m · distance")
    figure.legend(frameon=False, loc="outside right center")
    share.set(yscale="log", ylim=(1e-9, 1), ylabel="share of attention, with equal q·k")
    for axes in (line, share):
        _plain(axes, "distance from the query to the key, |i − j|")
    return figure


def windows_picture() -> Figure:
    """How many keys each head can need, by its weights, and did need, in one call."""
    parameters = initial_parameters(CONFIG, seed=0)
    windows = model_windows(CONFIG, parameters)[0]
    needed = _keys_of_one_call(parameters)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    heads = np.arange(HEADS)
    axes.scatter(heads, windows, marker="v", s=60, color="black", label="any input, by the weights")
    axes.vlines(
        *(heads, needed.min(axis=1), needed.max(axis=1)),
        linewidth=9,
        color=[_color(head) for head in heads],
        label="the queries of one call, by their norms",
    )
    axes.set(yscale="log", ylabel="keys that can matter", xticks=heads)
    _plain(axes, "head, from the steepest slope to the flattest")
    axes.legend(frameon=False)
    return figure


def certificate_picture() -> Figure:
    """The shares of attention of all keys, and the blocks that the certificate leaves."""
    query, key = np.random.default_rng(0).standard_normal((2, 1, HEADS, LENGTH, 64))
    query, key = query.astype(np.float32), key.astype(np.float32)
    plan = attention_plan(query, key, slopes(HEADS), block_size=BLOCK)
    probabilities = masked_softmax(biased_logits(query, key, slopes(HEADS)))[0]
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    image = None
    for axes, head in zip(panels, (0, 2, 3), strict=True):
        image = axes.imshow(
            _largest_of_blocks(probabilities[head]),
            extent=(0, LENGTH, LENGTH, 0),
            norm=matplotlib.colors.LogNorm(vmin=TOLERANCES["float32"] ** 2, vmax=1),
            cmap="viridis",
        )
        edges = np.arange(LENGTH // BLOCK + 1) * BLOCK
        axes.stairs(plan.first[0, head] * BLOCK, edges, orientation="horizontal", color="red")
        axes.set_title(f"m = 1/{1 / slopes(HEADS)[head]:g}: {plan.share[0, head]:.0%} computed")
        axes.set_xlabel("key")
        axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0))
    panels[0].set_ylabel("query")
    figure.colorbar(
        image, ax=panels, label=f"largest share in a block of {BLOCK} × {BLOCK}", shrink=0.9
    )
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "bias": bias_picture,
    "windows": windows_picture,
    "certificate": certificate_picture,
}


def _keys_of_one_call(parameters: dict[str, Any]) -> np.ndarray:
    """How many keys each query of one text of drawn tokens needs, [heads, seq]."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, LENGTH))
    trace = reference_forward(CONFIG, parameters, tokens)
    query, key = (trace[f"layers.0.{name}"].astype(np.float32) for name in ("query", "key"))
    largest = np.linalg.norm(key.astype(np.float64), axis=-1).max(axis=-1)
    return keys_needed(query, key, largest, model_slopes(CONFIG)[0])[0]


def _largest_of_blocks(probabilities: np.ndarray) -> np.ma.MaskedArray:
    blocks = LENGTH // BLOCK
    largest = probabilities.reshape(blocks, BLOCK, blocks, BLOCK).max(axis=(1, 3))
    return np.ma.masked_equal(largest, 0.0)  # the future is white


def _color(head: int) -> Any:
    return plt.get_cmap("viridis")(head / HEADS)


def _plain(axes: Any, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        figure = picture()
        figure.savefig(folder / f"{name}.png", dpi=90)
        plt.close(figure)
        print(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
