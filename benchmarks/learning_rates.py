"""Which learning rate suits which positions: `python -m benchmarks.learning_rates demo`.

One model per kind of positions and learning rate, of the first seed, trained as `alibi demo` or
`alibi extrapolate` trains its own, and its held-out loss at the training length. By it the rates in
`alibi_cli.experiments` were chosen.
"""

from __future__ import annotations

import argparse
import os
from importlib.metadata import version
from pathlib import Path

from alibi_cli.commands import load
from alibi_cli.experiments import demo
from alibi_cli.experiments.extrapolation import FACTORS, PRESETS
from alibi_cli.experiments.positions import model_config
from alibi_cli.experiments.texts import Text, read_documents, read_text
from alibi_cli.experiments.torch_models import bits_per_byte
from alibi_cli.experiments.training import Training, in_processes, trained
from benchmarks.compare import write

RATES = {
    "demo": (3e-3, 6e-3, 1.2e-2, 2.4e-2),
    "extrapolate": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
}
LENGTH = 128  # of the models of the experiment
RESULTS = Path(__file__).parent / "results"


def of_demo() -> tuple[list[Training], Text]:
    """What the demo trains, at every rate."""
    parser = argparse.ArgumentParser()
    load("demo").add_arguments(parser)
    options = parser.parse_args([])
    config = model_config(options.layers, options.width, options.heads, options.length)
    trainings = [
        Training(kind, options.seed, rate, config, options.steps, options.batch)
        for kind in demo.LEARNING_RATES
        for rate in RATES["demo"]
    ]
    return trainings, read_text(None, demo.FACTORS[-1] * options.length)


def of_experiment() -> tuple[list[Training], Text]:
    """What the experiment trains at one length, at every rate."""
    cpu = PRESETS["cpu"]
    config = model_config(cpu.layers, cpu.width, cpu.heads, LENGTH)
    trainings = [
        Training(kind, 0, rate, config, cpu.steps, cpu.step_bytes // LENGTH)
        for kind in cpu.positions
        for rate in RATES["extrapolate"]
    ]
    return trainings, read_documents(None, FACTORS[-1] * max(cpu.lengths), cpu.excerpts)


def measured(job: tuple[Training, Text]) -> float:
    """Held-out loss of one model at its training length."""
    training, text = job
    length = training.config.max_len
    return bits_per_byte(trained(training, text.documents), text.excerpts, length, length)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    experiments = {"demo": of_demo, "extrapolate": of_experiment}
    parser.add_argument("experiment", choices=experiments)
    name = parser.parse_args().experiment
    trainings, text = experiments[name]()
    jobs = [(training, text) for training in trainings]
    rows = []
    losses = in_processes(measured, jobs, os.cpu_count() or 1)
    for training, loss in zip(trainings, losses, strict=True):
        names = {"positions": training.positions, "learning_rate": training.learning_rate}
        rows.append(names | {"bits_per_byte": loss})
        print(rows[-1], flush=True)
    first = trainings[0]
    facts = {"versions": {"torch": version("torch")}, "steps": first.steps, "text": text.source}
    write(RESULTS / f"rates_{name}.json", facts | {"length": first.config.max_len, "rows": rows})


if __name__ == "__main__":
    main()
