"""`alibi verify`: the proof that both backends compute the same from a checkpoint."""

from __future__ import annotations

import argparse

from alibi_cli.arguments import add_source_options, count, path, source_options
from alibi_cli.exit_codes import MISMATCH, OK
from alibi_cli.rendering import check_line, print_json

HELP = "prove that PyTorch and Flax compute the same from a checkpoint (or two)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One checkpoint or two, and how much is compared."""
    parser.add_argument("source", type=path, help="what PyTorch runs")
    parser.add_argument("other", type=path, nargs="?", help="what Flax runs (default: source)")
    parser.add_argument(
        "--new-tokens", type=count, default=256, help="greedy tokens that must agree (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default: 0)")
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print every check as soon as it is done."""
    from alibi_verify import Verification, verify_steps

    checks = []
    for check in verify_steps(
        options.source,
        options.other,
        new_tokens=options.new_tokens,
        seed=options.seed,
        **source_options(options),
    ):
        checks.append(check)
        if not options.json:
            print(check_line(check), flush=True)
    result = Verification(tuple(checks))
    if options.json:
        print_json(result.to_dict())
    return OK if result.passed else MISMATCH
