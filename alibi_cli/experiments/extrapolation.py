"""`alibi extrapolate`: train short, test long (Press et al. 2021, figures 1 and 4), in small.

Byte-level language models of every kind of positions are trained at several lengths, and read
held-out documents in sequences of up to sixteen times their length: in sequences that do not
overlap, and in sliding windows. ALiBi is also read with its slopes times L / L', where L' is longer
than the training length L (arXiv 2310.13017).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_cli.experiments.positions import (
    ALIBI,
    LEARNED,
    NONE,
    ROTARY,
    SINUSOIDAL,
    model_config,
)
from alibi_cli.rendering import print_json, print_lines
from alibi_convert.files import read_json
from alibi_convert.machine import require
from alibi_convert.writing.atomic import replacing

if TYPE_CHECKING:
    from alibi_cli.experiments.curves import Curve
    from alibi_cli.experiments.texts import Text

POSITIONS = (ALIBI, SINUSOIDAL, ROTARY, LEARNED, NONE)
INTERPOLATED = "ALiBi, slopes × L/L'"  # models of ALiBi, read otherwise
FACTORS = (1, 2, 4, 8, 16)  # of the training length, that are read
APART, SLIDING = "apart", "sliding"
STRIDES = {APART: 1, SLIDING: 2}  # a window starts after this part of the one before
RESULTS, PICTURE, UNFINISHED = "results.json", "extrapolation.png", "unfinished.json"


@dataclass(frozen=True)
class Experiment:
    """What decides the results, apart from the text.

    Attributes:
        positions: kinds, of `POSITIONS`.
        lengths: of training, in bytes.
        seeds: models of each kind and length.
        steps: of training.
        step_bytes: that are read in a step, in whole sequences: as many for every length.
        layers, width, heads: of the models.
        excerpts: documents that are read, at most.
        learning_rates: of each kind.
    """

    positions: Sequence[str]
    lengths: Sequence[int]
    seeds: int
    steps: int
    step_bytes: int
    layers: int
    width: int
    heads: int
    excerpts: int
    learning_rates: Mapping[str, float]


# The rates are the best of `python -m benchmarks.learning_rates extrapolate`.
_CPU = Experiment(
    positions=POSITIONS,
    lengths=(64, 128, 256, 512),
    seeds=3,
    steps=1600,
    step_bytes=1024,
    layers=2,
    width=64,
    heads=4,
    excerpts=8,
    learning_rates=dict.fromkeys(POSITIONS, 1.2e-2) | {NONE: 6e-3},
)
_GPU = replace(
    _CPU,
    steps=4000,
    step_bytes=32_768,
    layers=6,
    width=384,
    heads=6,
    excerpts=24,
    learning_rates=dict.fromkeys(POSITIONS, 1e-3),  # no others were tried at this size
)
PRESETS = {"cpu": _CPU, "gpu": _GPU}


@dataclass(frozen=True)
class Job:
    """A model to train and to read with.

    Attributes:
        experiment: the model's part in it follows.
        positions, length, seed: of the model.
        text: to learn from and to read.
        device: of PyTorch.
    """

    experiment: Experiment
    positions: str
    length: int
    seed: int
    text: Text
    device: str


def run(options: argparse.Namespace) -> None:
    """Run the experiment, or go on with it, and write its results to `options.output`.

    Raises:
        ValueError: the text is too short, a package is missing, or the folder holds other results.
        OSError: the text cannot be read or the results cannot be written.
    """
    for module, extra in (("torch", "torch"), ("matplotlib", "extrapolate")):
        require(module, extra, "the experiment")
    from tqdm import tqdm

    from alibi_cli.experiments.curves import origin
    from alibi_cli.experiments.texts import read_documents
    from alibi_cli.experiments.training import in_processes

    experiment = _experiment(options)
    span = FACTORS[-1] * max(experiment.lengths)
    text = read_documents(options.text, span, experiment.excerpts)
    device = options.device or {"cpu": "cpu", "gpu": "cuda"}[options.preset]
    processes = options.processes or (os.cpu_count() or 1 if device == "cpu" else 1)
    facts = asdict(experiment) | {"text": text.source, "device": device}
    output: Path = options.output
    if (output / RESULTS).exists() and not options.overwrite:
        raise ValueError(f"{output} holds {RESULTS}; pass --overwrite or another --output")
    progress = _Progress(output / UNFINISHED, _identity(facts, text), options.overwrite)

    jobs = [
        Job(experiment, positions, length, seed, text, device)
        for length in sorted(experiment.lengths, reverse=True)  # the slowest first
        for positions in experiment.positions
        for seed in range(experiment.seeds)
    ]
    left = [job for job in jobs if not progress.has(job)]
    if not options.json:
        print(
            f"text: {text.source}, {text.training_bytes:,} bytes to learn from, "
            f"{len(text.excerpts)} × {span:,} bytes held out\n"
            f"{len(left)} of {len(jobs)} models to train",
            flush=True,
        )
    hidden = options.json or not sys.stderr.isatty()
    results = in_processes(measured, left, processes) if left else iter(())
    for model in tqdm(results, total=len(left), unit="model", disable=hidden):
        progress.add(model)

    curves = curves_of(experiment, progress.models)
    report = origin(("torch", "numpy")) | {
        "cpu_minutes": sum(model["cpu_seconds"] for model in progress.models) / 60,
        "experiment": facts,
        "curves": [curve.to_dict() for curve in curves],
    }
    draw(curves, experiment, output / PICTURE)
    with replacing(output / RESULTS, overwrite=True) as new:
        new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.finish()
    if options.json:
        print_json(report)
        return
    print_lines(table_lines(curves))
    print(f"\nresults in {output}: {RESULTS}, {PICTURE}")


def measured(job: Job) -> dict[str, Any]:
    """Train a model, and read held-out text with it at all lengths, in all ways."""
    started = time.process_time()
    from alibi_cli.experiments.torch_models import bits_per_byte
    from alibi_cli.experiments.training import Training, trained
    from alibi_torch import ALiBiLM

    experiment, length = job.experiment, job.length
    training = Training(
        positions=job.positions,
        seed=job.seed,
        learning_rate=experiment.learning_rates[job.positions],
        config=model_config(experiment.layers, experiment.width, experiment.heads, length),
        steps=experiment.steps,
        batch=max(1, experiment.step_bytes // length),
    )
    model = trained(training, job.text.documents, job.device)
    models = {job.positions: model}
    if job.positions == ALIBI:
        interpolated = ALiBiLM(replace(model.config, slope_interpolation=length))
        interpolated.load_state_dict(model.state_dict())
        models[INTERPOLATED] = interpolated.to(job.device).eval()
    # There is no vector for a position that training did not have.
    factors = (1,) if job.positions == LEARNED else FACTORS
    losses = [
        {
            "positions": positions,
            "windows": windows,
            "length": read,
            "bits_per_byte": bits_per_byte(each, job.text.excerpts, read, max(1, read // part)),
        }
        for positions, each in models.items()
        for windows, part in STRIDES.items()
        for read in (factor * length for factor in factors)
    ]
    seconds = time.process_time() - started
    return _names(job) | {"cpu_seconds": seconds, "losses": losses}


def _names(job: Job) -> dict[str, Any]:
    return {"positions": job.positions, "training_length": job.length, "seed": job.seed}


def curves_of(experiment: Experiment, models: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Loss by length of every kind, training length and way of reading."""
    from alibi_cli.experiments.curves import Curve

    found: dict[tuple[str, str, int], dict[int, dict[int, float]]] = {}
    for model in models:
        for loss in model["losses"]:
            key = (loss["windows"], loss["positions"], model["training_length"])
            of_seed = found.setdefault(key, {}).setdefault(model["seed"], {})
            of_seed[loss["length"]] = loss["bits_per_byte"]
    curves = []
    kinds = (ALIBI, INTERPOLATED, *POSITIONS[1:])
    for key in itertools.product(STRIDES, kinds, experiment.lengths):
        if key in found:
            windows, positions, length = key
            names = {"windows": windows, "positions": positions, "training_length": length}
            seeds = [by_length for _, by_length in sorted(found[key].items())]
            lengths = sorted(seeds[0])
            losses = [[by_length[each] for each in lengths] for by_length in seeds]
            curves.append(Curve(names, lengths, losses))
    return curves


def table_lines(curves: Sequence[Curve]) -> Iterator[str]:
    """Mean and spread of every curve."""
    for windows, several in itertools.groupby(curves, lambda curve: curve.names["windows"]):
        yield f"\nbits per byte, windows {windows}; trained at L, read in windows of:"
        heads = "".join(f"{f'{factor} L' if factor > 1 else 'L':>16}" for factor in FACTORS)
        yield f"  {'positions':<22}{'L':>5}{heads}"
        for curve in several:
            cells = (
                f"{mean:.4f} ± {spread:.4f}"
                for mean, spread in zip(curve.mean, curve.spread, strict=True)
            )
            line = "".join(f"{cell:>16}" for cell in cells)
            yield f"  {curve.names['positions']:<22}{curve.names['training_length']:>5}{line}"


def draw(curves: Sequence[Curve], experiment: Experiment, path: Path) -> None:
    """Loss against length: a panel for each training length and way of reading."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from alibi_cli.experiments.curves import COLOURS

    lengths = sorted(experiment.lengths)
    figure, panels = plt.subplots(
        len(STRIDES),
        len(lengths),
        figsize=(3 * len(lengths) + 1, 6.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for curve in curves:
        names = curve.names
        row = list(STRIDES).index(names["windows"])
        axes = panels[row][lengths.index(names["training_length"])]
        interpolated = names["positions"] == INTERPOLATED
        axes.plot(
            curve.lengths,
            curve.mean,
            color=COLOURS[ALIBI if interpolated else names["positions"]],
            linestyle="--" if interpolated else "-",
            marker="o",
            markersize=3.5,
            linewidth=1.6,
            label=names["positions"],
        )
        low, high = np.min(curve.bits_per_byte, axis=0), np.max(curve.bits_per_byte, axis=0)
        colour = axes.lines[-1].get_color()
        axes.fill_between(curve.lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    for row, windows in enumerate(STRIDES):
        panels[row][0].set_ylabel(f"bits per byte, windows {windows}")
        for column, length in enumerate(lengths):
            axes = panels[row][column]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.minorticks_off()
            read = [factor * length for factor in FACTORS]
            axes.set_xticks(read, [f"{each:,}" for each in read], fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(f"trained at {length}", fontsize=10)
    ticks = [tick for tick in (1.5, 2, 2.5, 3, 4, 5, 6, 8) if _within(tick, panels[0][0])]
    panels[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("bytes in a sequence", fontsize=10)
    with replacing(path, overwrite=True) as new:
        figure.savefig(new, dpi=130)
    plt.close(figure)


def _within(value: float, axes: Any) -> bool:
    low, high = axes.get_ylim()
    return low <= value <= high


def _experiment(options: argparse.Namespace) -> Experiment:
    """The preset, with what was given in its place."""
    names = ("positions", "lengths", "seeds", "steps", "step_bytes", "layers", "width", "heads")
    given = {name: getattr(options, name) for name in (*names, "excerpts")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("positions", "lengths"):
        if name in given:
            given[name] = tuple(dict.fromkeys(given[name]))
    return replace(PRESETS[options.preset], **given)


def _identity(facts: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """What an experiment that goes on must have in common with the one that was stopped."""
    digest = hashlib.sha256()
    for part in (*text.documents, text.excerpts):
        digest.update(part.tobytes())
    return json.loads(json.dumps(dict(facts) | {"sha256_of_text": digest.hexdigest()}))


class _Progress:
    """What has been measured, kept in a file so that an experiment that was stopped can go on."""

    def __init__(self, file: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
        self._file, self._identity = file, identity
        self.models: list[dict[str, Any]] = []
        if not file.exists():
            return
        kept = read_json(file)
        other = kept.get("identity", {})
        differing = [name for name in identity if identity[name] != other.get(name)]
        if not differing:
            self.models = kept["models"]
        elif not overwrite:
            raise ValueError(
                f"{file} is of another experiment, which differs in {', '.join(differing)}; pass "
                "--overwrite or another --output"
            )

    def has(self, job: Job) -> bool:
        """Whether a model was measured."""
        return any(_names(job).items() <= model.items() for model in self.models)

    def add(self, model: dict[str, Any]) -> None:
        """What was measured of one more."""
        self.models.append(model)
        kept = {"identity": self._identity, "models": self.models}
        with replacing(self._file, overwrite=True) as new:
            new.write_text(json.dumps(kept) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Remove the file: the results are written."""
        self._file.unlink(missing_ok=True)
