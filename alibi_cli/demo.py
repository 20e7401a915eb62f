"""`alibi demo`: the whole product on real text in a few minutes.

Trains a byte-level ALiBiLM in PyTorch, converts it to Flax, proves the conversion, and measures
held-out bits per byte in both backends far past the training length, beside a model with sinusoidal
positions that was trained the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sysconfig
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alibi_cli.arguments import count, path
from alibi_convert import convert, torch_to_flax
from alibi_convert.machine import require
from alibi_convert.writing.atomic import check_destination, replacing
from alibi_spec import ALiBiConfig
from alibi_verify import Check, verify_steps

BYTES = 256
LENGTHS = (1, 2, 4, 8)  # times the training length
HELD_OUT = 0.1
EVALUATED = 8  # longest sequences per evaluation
FOLDER, FLAX_FILE = "alibi", "alibi.msgpack"
REPORT, PLOT = "report.json", "extrapolation.png"


@dataclass(frozen=True)
class Curve:
    """Held-out loss of one model in one backend.

    Attributes:
        positions: "ALiBi" or "sinusoidal".
        backend: "PyTorch" or "Flax".
        bits_per_byte: by sequence length.
    """

    positions: str
    backend: str
    bits_per_byte: dict[int, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The knobs of `alibi demo`."""
    parser.add_argument(
        "--text", type=path, help="any file to learn from (default: Python's own library sources)"
    )
    parser.add_argument(
        "--output", type=path, default=Path("demo"), help="folder for results (default: demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    parser.add_argument("--steps", type=count, default=500, help="training steps (default: 500)")
    parser.add_argument("--length", type=count, default=128, help="training length (default: 128)")
    parser.add_argument("--batch", type=count, default=16, help="sequences per step (default: 16)")
    parser.add_argument("--layers", type=count, default=3, help="(default: 3)")
    parser.add_argument("--width", type=count, default=128, help="d_model (default: 128)")
    parser.add_argument("--heads", type=count, default=8, help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


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
    from alibi_cli.demo_models import bits_per_byte_flax, bits_per_byte_torch, train

    # The same initial deviation for both: with it, embeddings scaled by sqrt(d_model) match the
    # sinusoids that are added to them.
    config = ALiBiConfig(
        num_layers=options.layers,
        d_model=options.width,
        num_heads=options.heads,
        max_len=options.length,
        dropout=0.0,
        expansion_factor=4,
        vocab_size=BYTES,
        init_std=options.width**-0.5,
    )
    training, held_out, source = _split(options.text, options.length)
    output: Path = options.output
    earlier = [name for name in (FOLDER, FLAX_FILE, REPORT, PLOT) if (output / name).exists()]
    if earlier and not options.overwrite:
        raise ValueError(
            f"{output} holds {', '.join(earlier)}; pass --overwrite or another --output"
        )
    folder, flax_file = output / FOLDER, output / FLAX_FILE
    for destination in (folder, flax_file):
        check_destination(destination, options.overwrite)
    print(f"text: {source}, {len(training):,} bytes to learn from, {len(held_out):,} held out")

    # Slopes of zero leave attention without any notion of position; sinusoids bring theirs.
    configs = {"ALiBi": config, "sinusoidal": replace(config, slopes=(0.0,) * config.num_heads)}
    models = {}
    for positions, its_config in configs.items():
        print(f"\ntraining with {positions} positions at length {options.length}")
        models[positions] = train(
            its_config,
            training,
            sinusoidal=positions == "sinusoidal",
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
        )

    print("\nconverting and verifying")
    models["ALiBi"].save_pretrained(folder, overwrite=options.overwrite)
    report = convert(folder, flax_file, overwrite=options.overwrite)
    print(f"  {folder} -> {flax_file}: {report.tensors} tensors")
    sample = held_out[: 3 * 2 * options.length].reshape(3, -1)
    checks = []
    for check in verify_steps(folder, flax_file, inputs=sample, seed=options.seed):
        checks.append(check)
        print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.measured}", flush=True)

    print("\nheld-out bits per byte")
    lengths = [options.length * factor for factor in LENGTHS]
    text = held_out[: EVALUATED * lengths[-1] + 1]
    restored = type(models["ALiBi"]).from_pretrained(folder)
    flax_params = {
        "ALiBi": alibi_flax.from_pretrained(flax_file)[1],
        "sinusoidal": torch_to_flax(models["sinusoidal"].state_dict(), configs["sinusoidal"]),
    }
    curves = []
    for positions, model in (("ALiBi", restored), ("sinusoidal", models["sinusoidal"])):
        sinusoidal = positions == "sinusoidal"
        losses = bits_per_byte_torch(model, text, lengths, sinusoidal=sinusoidal)
        curves.append(Curve(positions, "PyTorch", losses))
        flax_model, params = alibi_flax.ALiBiLM(configs[positions]), flax_params[positions]
        losses = bits_per_byte_flax(flax_model, params, text, lengths, sinusoidal=sinusoidal)
        curves.append(Curve(positions, "Flax", losses))
    _print_table(curves, lengths)
    _plot(curves, options.length, output / PLOT)
    _write_report(output / REPORT, options, source, checks, curves)
    passed = all(check.passed for check in checks)
    print(f"\nresults in {output}: {REPORT}, {PLOT}, {FOLDER}/, {FLAX_FILE}")
    print("every check passed" if passed else "a check FAILED")
    return passed


def _split(path: Path | None, length: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Bytes to learn from, bytes held out, and what they are."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(library.glob("*.py"))  # modules alone: the code, without its test suite
        text, source = b"".join(file.read_bytes() for file in files), "Python's standard library"
    else:
        text, source = path.read_bytes(), str(path)
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    held_out_size = int(len(tokens) * HELD_OUT)
    needed = EVALUATED * LENGTHS[-1] * length + 1
    if held_out_size < needed:
        raise ValueError(
            f"{source} has {len(tokens):,} bytes; at least {int(needed / HELD_OUT):,} are needed "
            f"for --length {length}; choose a longer text or a smaller --length"
        )
    return tokens[:-held_out_size], tokens[-held_out_size:], source


def _print_table(curves: list[Curve], lengths: list[int]) -> None:
    print(f"  {'positions':<12}{'backend':<10}" + "".join(f"{length:>9}" for length in lengths))
    for curve in curves:
        cells = "".join(f"{curve.bits_per_byte[length]:>9.4f}" for length in lengths)
        print(f"  {curve.positions:<12}{curve.backend:<10}{cells}")


def _plot(curves: list[Curve], training_length: int, path: Path) -> None:
    """Loss against length: a line per model (PyTorch), crosses on it for Flax."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"ALiBi": "#0b6e99", "sinusoidal": "#c2571a"}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in curves:
        lengths, losses = zip(*curve.bits_per_byte.items(), strict=True)
        style: dict[str, Any] = (
            {"marker": "o", "linewidth": 1.8}
            if curve.backend == "PyTorch"
            else {"marker": "x", "linestyle": "none", "markersize": 11, "markeredgewidth": 1.8}
        )
        label = f"{curve.positions}, {curve.backend}"
        axes.plot(lengths, losses, color=colours[curve.positions], label=label, **style)
    axes.axvline(training_length, color="grey", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    lengths = list(curves[0].bits_per_byte)
    axes.set_xticks(lengths, [f"{n}\n{n // training_length}×" for n in lengths])
    axes.set_xlabel(f"sequence length in bytes (trained at {training_length})")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title("Train short, test long")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path, overwrite=True) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)


def _write_report(
    path: Path, options: argparse.Namespace, source: str, checks: list[Check], curves: list[Curve]
) -> None:
    knobs = ("steps", "length", "batch", "layers", "width", "heads", "seed")
    versions = ("torch", "jax", "flax", "numpy", "python")
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            name: platform.python_version() if name == "python" else version(name)
            for name in versions
        },
        "text": source,
        "options": {name: getattr(options, name) for name in knobs},
        "checks": [asdict(check) for check in checks],
        "bits_per_byte": [asdict(curve) for curve in curves],
    }
    with replacing(path, overwrite=True) as new:
        new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
