"""`alibi demo`: the whole product on real text in a few minutes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from alibi_cli.arguments import count, path
from alibi_cli.exit_codes import MISMATCH, OK

HELP = "train, convert, verify and measure small models on real text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the results, the models and their training."""
    parser.add_argument(
        "--text", type=path, help="any file to learn from (default: Python's own library sources)"
    )
    parser.add_argument(
        "--output", type=path, default=Path("demo"), help="folder for results (default: demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    parser.add_argument("--steps", type=count, default=1500, help="training steps (default: 1500)")
    parser.add_argument("--length", type=count, default=64, help="training length (default: 64)")
    parser.add_argument("--batch", type=count, default=16, help="sequences per step (default: 16)")
    parser.add_argument("--layers", type=count, default=2, help="(default: 2)")
    parser.add_argument("--width", type=count, default=64, help="d_model (default: 64)")
    parser.add_argument("--heads", type=count, default=4, help="(default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--seeds", type=count, default=3, help="models of each kind, one per seed (default: 3)"
    )
    parser.add_argument(
        "--processes",
        type=count,
        default=os.cpu_count() or 1,
        help="models that are trained at a time (default: one per core)",
    )


def run(options: argparse.Namespace) -> int:
    """Train, convert, verify, measure, draw."""
    from alibi_cli.experiments.demo import run as run_demo

    return OK if run_demo(options) else MISMATCH
