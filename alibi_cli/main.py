"""The `alibi` command: its parser, its signals, and the exit codes of its errors.

Exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input, 130 interrupted, by SIGINT (Ctrl-C)
or SIGTERM alike, and 128 + SIGPIPE if the reader of the output ends early (as `head` does).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alibi_cli.arguments import path
from alibi_cli.commands import COMMANDS, load
from alibi_cli.exit_codes import BROKEN, BROKEN_PIPE, INTERRUPTED, MISMATCH, USAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser(words).parse_args(words)
    except BrokenPipeError:  # of --print-completion
        _abandon_output()
        return BROKEN_PIPE
    from alibi_convert import CheckpointError, MismatchError  # now, so that --help is fast

    for name in ("absl", "asyncio"):  # orbax's: they also log raised errors
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with _interruptible():
            code = options.run(options)
            sys.stdout.flush()
    except MismatchError as error:
        return _fail(f"error: {error}", MISMATCH)
    except BrokenPipeError:
        _abandon_output()
        return BROKEN_PIPE
    except (CheckpointError, OSError) as error:
        return _fail(f"error: {error}", BROKEN)
    except ValueError as error:
        return _fail(f"error: {error}", USAGE)
    except KeyboardInterrupt as interruption:
        return _fail("; ".join(("interrupted", *interruption.args)), INTERRUPTED)
    return code


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt; a second one ends the process where it is."""

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = (signal.SIG_DFL, signal.default_int_handler)  # the caller's own handlers stay
    ours = [number for number, handler in before.items() if handler in usual]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # signals reach only the main thread
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the output is closed: discard the rest
        _abandon_output()
    return code


def _abandon_output() -> None:
    """Discard what is still buffered, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alibi",
        description="ALiBi checkpoints between PyTorch and Flax, with a proof of parity",
        epilog="exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input, 130 interrupted",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print what makes a shell complete this command, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        command = load(name)
        its_parser = commands.add_parser(name, help=command.HELP)
        its_parser.set_defaults(run=command.run)
        if name in words:  # other commands' arguments can be slow to import
            command.add_arguments(its_parser)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked: a checkout need not be installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        try:
            version = importlib.metadata.version("alibi-duo")
        except importlib.metadata.PackageNotFoundError:
            version = "of a checkout that is not installed"
        print(f"alibi-duo {version}")
        parser.exit()


class _Completion(argparse.Action):
    """Prints a script of shtab, which completes paths where an argument is one."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: object) -> None:
        import shtab

        whole = _parser([*COMMANDS])  # with the arguments of every command
        for each in _parsers_of(whole):
            for action in each._actions:
                if action.type is path:
                    action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        print(shtab.complete(whole, shell), flush=True)
        parser.exit()


def _parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those of the commands; argparse keeps them among the choices of one action."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()
