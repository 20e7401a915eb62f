"""`alibi demo`: trains small models on real text, converts one, and measures all in both backends.

Byte-level language models with ALiBi, rotary and sinusoidal positions are trained in PyTorch, alike
and from several seeds. The first ALiBi model is converted to Flax, and the conversion proved.
Held-out bits per byte are then measured far past the training length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alibi_cli.experiments.positions import (
    ALIBI,
    ROTARY,
    SINUSOIDAL,
    config_for,
    model_config,
)
from alibi_cli.rendering import check_line, print_lines
from alibi_convert import convert, torch_to_flax
from alibi_convert.machine import require
from alibi_convert.writing.atomic import check_destination
from alibi_verify import Check, verify_steps

if TYPE_CHECKING:
    from alibi_cli.experiments.texts import Text

FOLDER, FLAX_FILE = "alibi", "alibi.msgpack"
REPORT, PICTURE = "report.json", "extrapolation.png"
FACTORS = (1, 2, 4, 8)  # times the training length
# Kinds of positions, with the best rate of `benchmarks.learning_rates` by the loss at the training
# length.
LEARNING_RATES = {ALIBI: 1.2e-2, ROTARY: 3e-3, SINUSOIDAL: 6e-3}


def run(options: argparse.Namespace) -> bool:
    """Run the demo, write its results to `options.output`, and return whether every check passed.

    Raises:
        ValueError: the text is too short, a package is missing, or the output folder holds earlier
            results.
        OSError: the text cannot be read or the output cannot be written.
    """
    for module, extra in (("torch", "torch"), ("flax", "flax"), ("matplotlib", "demo")):
        require(module, extra, "the demo")
    import torch
    from tqdm import tqdm

    import alibi_flax
    from alibi_cli.experiments import flax_models, torch_models
    from alibi_cli.experiments.curves import Curve
    from alibi_cli.experiments.demo_report import draw, table_lines, write_report
    from alibi_cli.experiments.texts import read_text
    from alibi_cli.experiments.training import Training, in_processes, trained_weights
    from alibi_torch import ALiBiLM

    config = model_config(options.layers, options.width, options.heads, options.length)
    lengths = [options.length * factor for factor in FACTORS]
    text = read_text(options.text, lengths[-1])
    output: Path = options.output
    _check_output(output, options.overwrite)
    print(
        f"text: {text.source}, {text.training_bytes:,} bytes to learn from, "
        f"{text.excerpts.size:,} held out"
    )

    print(f"\ntraining at length {options.length}", flush=True)
    jobs = [
        (Training(kind, seed, rate, config, options.steps, options.batch), text.documents)
        for kind, rate in LEARNING_RATES.items()
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    weights = in_processes(trained_weights, jobs, options.processes)
    weights = iter(tqdm(weights, total=len(jobs), unit="model"))
    models: dict[str, list[ALiBiLM]] = {kind: [] for kind in LEARNING_RATES}
    for (training, _), arrays in zip(jobs, weights, strict=True):
        model = torch_models.new_model(config, training.positions)
        model.load_state_dict({name: torch.from_numpy(each) for name, each in arrays.items()})
        models[training.positions].append(model.eval())

    print("\nconverting and verifying")
    models[ALIBI][0].save_pretrained(output / FOLDER, overwrite=options.overwrite)
    checks = _convert_and_verify(output, text, options)
    models[ALIBI][0] = ALiBiLM.from_pretrained(output / FOLDER)  # measured as it was written

    print("\nheld-out bits per byte")
    curves = []
    for kind, of_seeds in models.items():
        losses = [
            [torch_models.bits_per_byte(model, text.excerpts, each, each) for each in lengths]
            for model in of_seeds
        ]
        curves.append(Curve({"positions": kind, "backend": "PyTorch"}, lengths, losses))
        measured = flax_models.bits_per_byte(config, kind)
        its_config = config_for(kind, config)
        params = [torch_to_flax(model.state_dict(), its_config) for model in of_seeds]
        if kind == ALIBI:
            params[0] = alibi_flax.from_pretrained(output / FLAX_FILE)[1]
        losses = [[measured(tree, text.excerpts, each) for each in lengths] for tree in params]
        curves.append(Curve({"positions": kind, "backend": "Flax"}, lengths, losses))
    print_lines(table_lines(curves))
    draw(curves, options.length, options.seeds, output / PICTURE)
    write_report(output / REPORT, options, LEARNING_RATES, text.source, checks, curves)
    passed = all(check.passed for check in checks)
    print(f"\nresults in {output}: {REPORT}, {PICTURE}, {FOLDER}/, {FLAX_FILE}")
    print("every check passed" if passed else "a check FAILED")
    return passed


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace files, before any training."""
    earlier = [name for name in (FOLDER, FLAX_FILE, REPORT, PICTURE) if (output / name).exists()]
    if earlier and not overwrite:
        raise ValueError(
            f"{output} holds {', '.join(earlier)}; pass --overwrite or another --output"
        )
    for name in (FOLDER, FLAX_FILE):
        check_destination(output / name, overwrite)


def _convert_and_verify(output: Path, text: Text, options: argparse.Namespace) -> list[Check]:
    """The first ALiBi model in Flax, and what `alibi verify` says about both."""
    folder, flax_file = output / FOLDER, output / FLAX_FILE
    report = convert(folder, flax_file, overwrite=options.overwrite)
    print(f"  {folder} -> {flax_file}: {report.tensors} tensors")
    sample = text.excerpts[:3, : 2 * options.length].astype(np.int64)
    checks = []
    for check in verify_steps(folder, flax_file, inputs=sample, seed=options.seed):
        checks.append(check)
        print(f"  {check_line(check)}", flush=True)
    return checks
