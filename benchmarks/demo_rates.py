"""Which learning rate suits which positions in `alibi demo`: `python -m benchmarks.demo_rates`.

One model per kind of positions and learning rate, trained as the demo trains its first seed, and
its held-out loss, by which `LEARNING_RATES` of `alibi_cli.demo.training` were chosen.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from alibi_cli.commands import load
from alibi_cli.demo.measuring import in_torch
from alibi_cli.demo.positions import POSITIONS, model_config
from alibi_cli.demo.text import read_text
from alibi_cli.demo.training import Task, Training, train
from benchmarks.compare import write

RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
RESULTS = Path(__file__).parent / "results" / "demo_rates.json"


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    load("demo").add_arguments(parser)
    demo = parser.parse_args()
    config = model_config(demo.layers, demo.width, demo.heads, demo.length)
    text = read_text(demo.text, demo.length)
    tasks = [Task(kind, demo.seed, rate) for kind in POSITIONS for rate in RATES]
    models = train(Training(config, text.training, demo.steps, demo.batch), tasks, demo.processes)
    rows = []
    for model, task in zip(models, tasks, strict=True):
        losses = in_torch(model, task.positions, text.evaluated, text.lengths)
        by_length = dict(zip(text.lengths, losses, strict=True))
        names = {"positions": task.positions, "learning_rate": task.learning_rate}
        rows.append(names | {"bits_per_byte": by_length})
        print(rows[-1])
    head = {"versions": {"torch": version("torch")}, "steps": demo.steps, "text": text.source}
    write(RESULTS, head | {"rows": rows})


if __name__ == "__main__":
    main()
