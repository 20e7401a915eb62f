"""`alibi convert`: a checkpoint in another format, or under another family's names."""

from __future__ import annotations

import argparse
import sys

from alibi_cli.arguments import (
    SOURCE,
    add_source_options,
    add_target_options,
    path,
    source_options,
    target_options,
)
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json, print_lines, report_lines

HELP = "convert a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both sides of the conversion, and how it is done."""
    from alibi_convert.conversion import VERIFY

    parser.add_argument("source", type=path, help=SOURCE)
    parser.add_argument("destination", type=path, help="a path that does not exist yet")
    add_target_options(parser)
    parser.add_argument(
        "--strict-values", action="store_true", help="refuse NaN and infinity, not only report them"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the shards of an interrupted conversion"
    )
    parser.add_argument(
        "--progress", action="store_true", help="show progress even without a terminal"
    )
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        default="logits",
        help="bits: read the result back; logits: run both sides too, between families (default); "
        "none: neither",
    )
    parser.add_argument(
        "--tx",
        metavar="module:factory",
        help="a function without arguments that returns the optax transformation that goes on with "
        "the optimizer's state in .msgpack or orbax (default: optax's plain one of its kind)",
    )
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Convert, and print the report.

    Raises:
        ValueError: `--tx` names no transformation.
    """
    from alibi_convert import convert
    from alibi_verify.factories import made_by

    report = convert(
        options.source,
        options.destination,
        verify=options.verify,
        strict_values=options.strict_values,
        resume=options.resume,
        progress=not options.json and (options.progress or sys.stderr.isatty()),
        tx=None if options.tx is None else made_by(options.tx, "transformation"),
        **target_options(options),
        **source_options(options),
    )
    if options.json:
        print_json(report.to_dict())
    else:
        print_lines(report_lines(report))
    return OK
