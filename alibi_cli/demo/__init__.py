"""`alibi demo`: trains small models on real text, converts one, and measures all in both backends.

Byte-level language models with ALiBi, rotary and sinusoidal positions are trained in PyTorch, alike
and from several seeds. The first ALiBi model is converted to Flax, and the conversion proved.
Held-out bits per byte are then measured far past the training length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from alibi_cli.rendering import check_line, print_lines
from alibi_convert import convert, torch_to_flax
from alibi_convert.machine import require
from alibi_convert.writing.atomic import check_destination
from alibi_verify import Check, verify_steps

if TYPE_CHECKING:
    from alibi_cli.demo.text import Text

FOLDER, FLAX_FILE = "alibi", "alibi.msgpack"
REPORT, PICTURE = "report.json", "extrapolation.png"


def run(options: argparse.Namespace) -> bool:
    """Run the demo, write its results to `options.output`, and return whether every check passed.

    Raises:
        ValueError: the text is too short, a package is missing, or the output folder holds earlier
            results.
        OSError: the text cannot be read or the output cannot be written.
    """
    for module, extra in (("torch", "torch"), ("flax", "flax"), ("matplotlib", "demo")):
        require(module, extra, "the demo")
    require("tqdm", "demo", "the demo")
    import alibi_flax
    from alibi_cli.demo.measuring import in_flax, in_torch
    from alibi_cli.demo.positions import ALIBI, POSITIONS, config_for, model_config
    from alibi_cli.demo.report import Curve, draw, table_lines, write_report
    from alibi_cli.demo.text import read_text
    from alibi_cli.demo.training import LEARNING_RATES, Task, Training, train
    from alibi_torch import ALiBiLM

    config = model_config(options.layers, options.width, options.heads, options.length)
    text = read_text(options.text, options.length)
    output: Path = options.output
    _check_output(output, options.overwrite)
    print(
        f"text: {text.source}, {len(text.training):,} bytes to learn from, "
        f"{len(text.held_out):,} held out"
    )

    print(f"\ntraining at length {options.length}", flush=True)
    training = Training(config, text.training, options.steps, options.batch)
    tasks = [
        Task(kind, seed, LEARNING_RATES[kind])
        for kind in POSITIONS
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    trained = train(training, tasks, options.processes)
    models = {
        kind: [model for model, task in zip(trained, tasks, strict=True) if task.positions == kind]
        for kind in POSITIONS
    }

    print("\nconverting and verifying")
    models[ALIBI][0].save_pretrained(output / FOLDER, overwrite=options.overwrite)
    checks = _convert_and_verify(output, text, options)
    models[ALIBI][0] = ALiBiLM.from_pretrained(output / FOLDER)  # measured as it was written

    print("\nheld-out bits per byte")
    curves = []
    for kind, of_seeds in models.items():
        held_out = (kind, text.evaluated, text.lengths)
        losses = [in_torch(model, *held_out) for model in of_seeds]
        curves.append(Curve(kind, "PyTorch", text.lengths, losses))
        measured = in_flax(config, *held_out)
        its_config = config_for(kind, config)
        params = [torch_to_flax(model.state_dict(), its_config) for model in of_seeds]
        if kind == ALIBI:
            params[0] = alibi_flax.from_pretrained(output / FLAX_FILE)[1]
        losses = [measured(each) for each in params]
        curves.append(Curve(kind, "Flax", text.lengths, losses))
    print_lines(table_lines(curves))
    draw(curves, options.length, options.seeds, output / PICTURE)
    write_report(output / REPORT, options, text.source, checks, curves)
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
    sample = text.held_out[: 3 * 2 * options.length].reshape(3, -1)
    checks = []
    for check in verify_steps(folder, flax_file, inputs=sample, seed=options.seed):
        checks.append(check)
        print(f"  {check_line(check)}", flush=True)
    return checks
