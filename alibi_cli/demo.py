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
import shutil
import sysconfig
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert import convert
from alibi_convert.verify import Check, verify_steps
from alibi_spec import ALiBiConfig

BYTES = 256
LENGTHS = (1, 2, 4, 8)  # times the training length
HELD_OUT = 0.1
EVALUATED = 8  # longest sequences per evaluation
RESULTS = (
    "alibi",
    "sinusoidal",
    "alibi.msgpack",
    "alibi.msgpack.json",
    "report.json",
    "extrapolation.png",
)


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
        "--text", type=Path, help="any file to learn from (default: Python's own library sources)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder for results (default: demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: 500)")
    parser.add_argument("--length", type=int, default=128, help="training length (default: 128)")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (default: 16)")
    parser.add_argument("--layers", type=int, default=3, help="(default: 3)")
    parser.add_argument("--width", type=int, default=128, help="d_model (default: 128)")
    parser.add_argument("--heads", type=int, default=8, help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def run(options: argparse.Namespace) -> bool:
    """Run the demo, write its results to `options.output`, and return whether every check passed.

    Raises:
        ValueError: the text is too short, or the output folder holds earlier results.
        OSError: the text cannot be read or the output cannot be written.
    """
    from alibi_cli.demo_models import bits_per_byte_flax, bits_per_byte_torch, train

    config = ALiBiConfig(
        num_layers=options.layers,
        d_model=options.width,
        num_heads=options.heads,
        max_len=options.length,
        dropout=0.0,
        expansion_factor=4,
        vocab_size=BYTES,
    )
    training, held_out, source = _split(options.text, options.length)
    output = _prepare(options.output, options.overwrite)
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
    folders = {}
    for positions, model in models.items():
        folders[positions] = output / positions.lower()
        model.save_pretrained(folders[positions])

    print("\nconverting and verifying")
    flax_file = output / "alibi.msgpack"
    report = convert(folders["ALiBi"], flax_file)
    print(f"  {folders['ALiBi']} -> {flax_file}: {report.tensors} tensors")
    sample = held_out[: 3 * 2 * options.length].reshape(3, -1)
    checks = []
    for check in verify_steps(folders["ALiBi"], flax_file, inputs=sample, seed=options.seed):
        checks.append(check)
        print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.measured}", flush=True)

    print("\nheld-out bits per byte")
    lengths = [options.length * factor for factor in LENGTHS]
    curves = []
    for positions in configs:
        for backend, measure in (("PyTorch", bits_per_byte_torch), ("Flax", bits_per_byte_flax)):
            converted = (positions, backend) == ("ALiBi", "Flax")
            losses = measure(
                flax_file if converted else folders[positions],
                held_out[: EVALUATED * lengths[-1] + 1],
                lengths,
                sinusoidal=positions == "sinusoidal",
            )
            curves.append(Curve(positions, backend, losses))
    _print_table(curves, lengths)
    _plot(curves, options.length, output / "extrapolation.png")
    _write_report(output / "report.json", options, source, checks, curves)
    passed = all(check.passed for check in checks)
    print(f"\nresults in {output}: report.json, extrapolation.png, alibi/, alibi.msgpack")
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


def _prepare(output: Path, overwrite: bool) -> Path:
    """An output folder without earlier results of ours; files of anybody else stay."""
    results = [output / name for name in RESULTS]
    earlier = [path for path in results if path.exists()]
    if earlier and not overwrite:
        raise ValueError(f"{output} holds earlier results; pass --overwrite or another --output")
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    return output


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
    figure.savefig(path, dpi=150)
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
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
