"""The `alibi` command: arguments in, report out, exit code.

Exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input, 130 interrupted, by SIGINT (Ctrl-C)
or SIGTERM alike. A reader that goes away early (as `head` does) ends the command like any other,
with 128 + SIGPIPE.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alibi_cli.arguments import count, path
from alibi_convert import CheckpointError, MismatchError, Plan, Report, convert, inspect, plan
from alibi_convert.checkpoint import GivenConfig
from alibi_convert.conversion import VERIFY
from alibi_convert.files import read_json
from alibi_convert.formats import FORMATS
from alibi_convert.formats.config_file import OURS, read_config
from alibi_convert.tensors import DTYPES
from alibi_spec import ALiBiConfig
from alibi_verify import Verification, verify_steps

OK, MISMATCH, USAGE, BROKEN = 0, 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    for name in ("absl", "asyncio"):  # orbax's: they log, with tracebacks, what is raised as well
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
    usual = (signal.SIG_DFL, signal.default_int_handler)  # others are somebody's: left alone
    ours = [number for number, handler in before.items() if handler in usual]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # signals reach the main thread alone
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
    except OSError:  # that was the error: what is left cannot be printed either
        _abandon_output()
    return code


def _abandon_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_SOURCE = "checkpoint folder or file, or org/name on the hub"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alibi",
        description="ALiBi checkpoints between PyTorch and Flax, with a proof of parity",
        epilog="exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input, 130 interrupted",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("inspect", help="show what a checkpoint holds")
    command.add_argument("path", type=path, help=_SOURCE)
    _add_source_options(command)
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "plan", help="show what a conversion would do, without reading or writing tensors"
    )
    command.add_argument("source", type=path, help=_SOURCE)
    command.add_argument("destination", type=path, nargs="?", help="where it would go")
    _add_target_options(command)
    _add_source_options(command)
    command.set_defaults(run=_plan)

    command = commands.add_parser("convert", help="convert a checkpoint")
    command.add_argument("source", type=path, help=_SOURCE)
    command.add_argument("destination", type=path, help="a path that does not exist yet")
    _add_target_options(command)
    command.add_argument(
        "--strict-values", action="store_true", help="refuse NaN and infinity, do not report them"
    )
    command.add_argument(
        "--resume", action="store_true", help="keep the shards that a killed run had finished"
    )
    command.add_argument(
        "--progress", action="store_true", help="show progress even where no terminal is"
    )
    command.add_argument(
        "--verify",
        choices=VERIFY,
        default="logits",
        help="bits: read the result back; logits: run both sides too, between families (default); "
        "none: neither",
    )
    _add_source_options(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "verify", help="prove that PyTorch and Flax compute the same from a checkpoint (or two)"
    )
    command.add_argument("source", type=path, help="what PyTorch runs")
    command.add_argument("other", type=path, nargs="?", help="what Flax runs (default: source)")
    command.add_argument(
        "--new-tokens", type=count, default=256, help="greedy tokens that must agree (default: 256)"
    )
    command.add_argument("--seed", type=int, default=0, help="of random inputs (default: 0)")
    _add_source_options(command)
    command.set_defaults(run=_verify)

    from alibi_cli import demo, windows

    command = commands.add_parser(
        "plot-windows", help="draw what share of its attention a model has to compute"
    )
    command.add_argument("source", type=path, help=_SOURCE)
    windows.add_arguments(command)
    _add_source_options(command)
    command.set_defaults(run=_plot_windows)

    command = commands.add_parser(
        "demo", help="train, convert, verify and measure a small model on real text"
    )
    demo.add_arguments(command)
    command.set_defaults(run=_demo)
    return parser


class _Version(argparse.Action):
    """Looked up when it is asked for: a checkout need not be installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        try:
            version = importlib.metadata.version("alibi-duo")
        except importlib.metadata.PackageNotFoundError:
            version = "of a checkout that is not installed"
        print(f"alibi-duo {version}")
        parser.exit()


def _add_target_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--to",
        choices=list(FORMATS),
        help="; ".join(f"{name}: {kind.description}" for name, kind in FORMATS.items())
        + " (default: by the destination's suffix)",
    )
    command.add_argument("--dtype", choices=list(DTYPES), help="cast every tensor")
    command.add_argument(
        "--max-shard-size", metavar="SIZE", help="of the files of a folder (default: 5GB)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")


def _target_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "to": options.to,
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_size,
        "overwrite": options.overwrite,
    }


def _add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=path,
        help="for files that carry none: JSON of an ALiBiConfig, or another config.json",
    )
    command.add_argument(
        "--allow-pt", action="store_true", help="read pickles, by torch's weights_only unpickler"
    )
    command.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="NAME",
        help="of a config.json: one that is not known and changes nothing; may be repeated",
    )
    command.add_argument("--revision", help="branch, tag or commit of a source on the hub")
    command.add_argument(
        "--step", type=int, help="of a folder of orbax's CheckpointManager (default: the latest)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _source_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "config": _read_config(options.config),
        "allow_pt": options.allow_pt,
        "ignore_keys": options.ignore_key,
        "revision": options.revision,
        "step": options.step,
    }


def _read_config(file: Path | None) -> GivenConfig | None:
    if file is None:
        return None
    values = read_json(file)
    if values.get("format") == OURS:
        return read_config(file)
    if "model_type" in values:  # of a family
        return values
    return ALiBiConfig.from_dict(values)


def _inspect(options: argparse.Namespace) -> int:
    contents = inspect(options.path, **_source_options(options))
    if options.json:
        print(json.dumps(contents, indent=2))
        return OK
    print(f"{contents['path']}: {contents['model']}, {contents['family']} ({contents['format']})")
    print(f"{contents['parameters']:,} parameters, {contents['nbytes']:,} bytes")
    print("configuration (*: not the default):")
    defaults = ALiBiConfig().to_dict()
    for name, value in contents["config"].items():
        print(f"  {name} = {value}" + ("" if value == defaults[name] else "  *"))
    width = max(map(len, contents["tensors"]))
    for name, tensor in contents["tensors"].items():
        print(f"  {name:{width}}  {tensor['dtype']:9} {tensor['shape']}")
    _print_wrappers(contents["wrappers"])
    for name, reason in contents["derived"].items():
        print(f"  {name:{width}}  not carried over: {reason}")
    _print_ignored(contents["ignored"])
    return OK


def _plan(options: argparse.Namespace) -> int:
    planned = plan(
        options.source,
        options.destination,
        **_target_options(options),
        **_source_options(options),
    )
    if options.json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        _print_plan(planned)
    return OK if planned.possible else BROKEN


def _print_plan(planned: Plan) -> None:
    print(
        f"{planned.source} ({planned.family}, {planned.source_format}) -> "
        f"{planned.destination_format}"
    )
    for name, value in planned.config.items():
        print(f"  {name} = {value}")
    width = max(map(len, planned.tensors))
    for name, row in planned.tensors.items():
        dtype = row.dtype if row.dtype == row.source_dtype else f"{row.source_dtype} -> {row.dtype}"
        origin = "" if row.sources == (name,) else f"  from {', '.join(row.sources)}"
        print(f"  {name:{width}}  {dtype} {list(row.shape)} {row.nbytes:,} bytes{origin}")
    _print_differences(planned.dropped, planned.folded)
    _print_ignored(planned.ignored)
    for file, names in planned.files.items():
        print(f"{file}: {len(names)} tensors")
    free = planned.free_disk_bytes
    free_text = "unknown" if free is None else f"{free:,}"
    print(
        f"{planned.nbytes:,} bytes to write, {free_text} free; "
        f"about {planned.peak_memory_bytes:,} bytes of memory"
    )
    for problem in planned.problems:
        print(f"{'problem' if problem.stops else 'note'}: {problem.cause}; {problem.mend}")


def _print_wrappers(wrappers: Sequence[str]) -> None:
    if wrappers:
        print(f"  left out of the names: {', '.join(wrappers)}")


def _print_differences(dropped: Mapping[str, str], folded: Mapping[str, str]) -> None:
    for name, reason in dropped.items():
        print(f"  not carried over: {name} ({reason})")
    for name, reason in folded.items():
        print(f"  computed: {name} ({reason})")


def _print_ignored(ignored: Mapping[str, Any]) -> None:
    for name, value in ignored.items():
        print(f"  ignored: {name}={value!r}")


def _convert(options: argparse.Namespace) -> int:
    report = convert(
        options.source,
        options.destination,
        verify=options.verify,
        strict_values=options.strict_values,
        resume=options.resume,
        progress=not options.json and (options.progress or sys.stderr.isatty()),
        **_target_options(options),
        **_source_options(options),
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    return OK


def _print_report(report: Report) -> None:
    print(
        f"{report.source} ({report.family}, {report.source_format}) -> "
        f"{report.destination} ({report.destination_format})"
    )
    print(f"{report.tensors} tensors, {report.nbytes:,} bytes, {report.seconds:.1f} s")
    _print_wrappers(report.wrappers)
    _print_differences(report.dropped, report.folded)
    _print_ignored(report.ignored)
    for cast in report.casts:
        where = f" in {cast.where}" if cast.where else ""
        print(
            f"{cast.tensors} tensors cast from {cast.source} to {cast.target}: largest relative "
            f"rounding error {cast.rounding:.1e}{where}"
        )
    for name, elements in report.nonfinite.items():
        print(f"  NaN or infinite: {elements:,} elements of {name}")
    if report.kept:
        print(f"kept from the killed run: {', '.join(report.kept)}")
    if report.copied:
        print(f"copied: {', '.join(report.copied)}")
    if report.left_behind:
        print(f"left behind: {', '.join(report.left_behind)}")
    for name, xxh3 in report.destination_xxh3.items():
        print(f"  xxh3 {xxh3}  {name}")
    if report.verified:
        print("read back: bitwise what was meant")
        _print_logits(report.verification["logits"])
    else:
        print("not read back")


def _print_logits(logits: Mapping[str, Any]) -> None:
    if "not_run" in logits:
        print(f"outputs not compared: {logits['not_run']}")
        return
    errors = ", ".join(f"{name} {error:.1e}" for name, error in logits["errors"].items())
    limit = f"{logits['dtype']}, {logits['budget']:.0e} is allowed"
    print(f"outputs against {logits['against']}: {errors} ({limit})")
    if "no_peer" in logits:
        print(f"  its own library was not run: {logits['no_peer']}")


def _verify(options: argparse.Namespace) -> int:
    checks = []
    for check in verify_steps(
        options.source,
        options.other,
        new_tokens=options.new_tokens,
        seed=options.seed,
        **_source_options(options),
    ):
        checks.append(check)
        if not options.json:
            mark = "ok  " if check.passed else "FAIL"
            print(f"{mark} {check.name}: {check.measured}", flush=True)
    result = Verification(tuple(checks))
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    return OK if result.passed else MISMATCH


def _plot_windows(options: argparse.Namespace) -> int:
    from alibi_cli.windows import run

    run(options, _source_options(options))
    return OK


def _demo(options: argparse.Namespace) -> int:
    from alibi_cli.demo import run

    return OK if run(options) else MISMATCH
