"""`alibi inspect`: what a checkpoint holds."""

from __future__ import annotations

import argparse

from alibi_cli.arguments import SOURCE, add_source_options, path, source_options
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import inspection_lines, print_json, print_lines

HELP = "show what a checkpoint holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and how it is read."""
    parser.add_argument("path", type=path, help=SOURCE)
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print configuration and tensors."""
    from alibi_convert import inspect

    contents = inspect(options.path, **source_options(options))
    if options.json:
        print_json(contents)
    else:
        print_lines(inspection_lines(contents))
    return OK
