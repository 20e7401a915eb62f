"""The commands of `alibi`: one module each, one row each.

A module says in `HELP` what its command does, adds its arguments to a parser in
`add_arguments(parser)`, and does it in `run(options)`, which returns an exit code. Slow
imports belong in these functions: `alibi --help` imports all modules, but `add_arguments` is called
only for the named command.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Protocol, cast

# By name, in the order of the help: the module in this folder.
COMMANDS = {
    "inspect": "inspect",
    "plan": "plan",
    "convert": "convert",
    "verify": "verify",
    "parity": "parity",
    "conformance": "conformance",
    "train": "train",
    "generate": "generate",
    "score": "score",
    "encode": "encode",
    "fill": "fill",
    "windows": "windows",
    "plot-windows": "plot_windows",
    "demo": "demo",
    "extrapolate": "extrapolate",
}


class Command(Protocol):
    """The contents of the module of a command."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of this command."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do it; return the exit code. Errors are raised: `alibi_cli.main` knows their codes."""
        ...


def load(name: str) -> Command:
    """The module of a command."""
    return cast(Command, import_module(f"{__name__}.{COMMANDS[name]}"))
