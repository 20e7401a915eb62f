"""`alibi conformance`: a third implementation against the kit of cases."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from alibi_cli.exit_codes import MISMATCH, OK
from alibi_cli.rendering import conformance_lines, outcome_line, print_json, print_lines

HELP = "run another implementation of these models through the kit of cases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The implementation, and the levels that it must have."""
    from alibi_spec.conformance import LEVELS

    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "implementation",
        nargs="?",
        metavar="module:factory",
        help="a function without arguments that returns the implementation",
    )
    which.add_argument(
        "--command",
        metavar="'PROGRAM ARGS'",
        help="a program in any language that answers lines of JSON",
    )
    parser.add_argument(
        "--level",
        action="append",
        choices=list(LEVELS),
        help="must be offered, and no other is run; may be repeated (default: all that are)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print every outcome as soon as it is known, then what can be claimed.

    Raises:
        ValueError: there is no such implementation, or it does not offer a level.
        DamagedKitError: a file of the kit is damaged.
    """
    from alibi_verify.conformance import conformance_of, conformance_steps

    outcomes = []
    with _opened(options) as implementation:
        for outcome in conformance_steps(implementation, options.level):
            outcomes.append(outcome)
            if not options.json:
                print(outcome_line(outcome), flush=True)
        result = conformance_of(implementation, outcomes, options.level)
    if options.json:
        print_json(result.to_dict())
    else:
        print_lines(conformance_lines(result))
    return OK if result.passed else MISMATCH


def _opened(options: argparse.Namespace) -> AbstractContextManager[Any]:
    from alibi_verify.factories import made_by
    from alibi_verify.programs import Program

    if options.command is not None:
        return Program(options.command)
    return nullcontext(made_by(options.implementation, "implementation"))
