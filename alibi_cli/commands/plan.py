"""`alibi plan`: what a conversion would do."""

from __future__ import annotations

import argparse

from alibi_cli.arguments import (
    SOURCE,
    add_source_options,
    add_target_options,
    path,
    source_options,
    target_options,
)
from alibi_cli.exit_codes import BROKEN, OK
from alibi_cli.rendering import plan_lines, print_json, print_lines

HELP = "show what a conversion would do, without reading or writing tensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both sides of the conversion."""
    parser.add_argument("source", type=path, help=SOURCE)
    parser.add_argument("destination", type=path, nargs="?", help="where it would go")
    add_target_options(parser)
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan; it fails if the conversion would."""
    from alibi_convert import plan

    planned = plan(
        options.source,
        options.destination,
        **target_options(options),
        **source_options(options),
    )
    if options.json:
        print_json(planned.to_dict())
    else:
        print_lines(plan_lines(planned))
    return OK if planned.possible else BROKEN
