"""`alibi inspect | convert | verify | demo`: arguments in, report out, exit code.

Exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alibi_convert import CheckpointError, MismatchError, convert, inspect
from alibi_convert.formats import FORMATS
from alibi_convert.store import FORMAT, parse_config, parse_json
from alibi_convert.tensors import DTYPES
from alibi_convert.verify import Verification, verify_steps
from alibi_spec import ALiBiConfig

OK, MISMATCH, USAGE, BROKEN = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except MismatchError as error:
        return _fail(error, MISMATCH)
    except (CheckpointError, OSError) as error:
        return _fail(error, BROKEN)
    except ValueError as error:
        return _fail(error, USAGE)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alibi",
        description="ALiBi checkpoints between PyTorch and Flax, with a proof of parity",
        epilog="exit codes: 0 ok, 1 mismatch, 2 usage, 3 unsafe or broken input",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("inspect", help="show what a checkpoint holds")
    command.add_argument("path", type=Path, help="checkpoint folder or file")
    _add_source_options(command)
    command.set_defaults(run=_inspect)

    command = commands.add_parser("convert", help="convert a checkpoint")
    command.add_argument("source", type=Path, help="checkpoint folder or file")
    command.add_argument("destination", type=Path, help="a path that does not exist yet")
    command.add_argument(
        "--to",
        choices=list(FORMATS),
        help="; ".join(f"{name}: {kind.description}" for name, kind in FORMATS.items())
        + " (default: by the destination's suffix)",
    )
    command.add_argument("--dtype", choices=list(DTYPES), help="cast every tensor")
    command.add_argument("--no-verify", action="store_true", help="do not read the result back")
    command.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    _add_source_options(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "verify", help="prove that PyTorch and Flax compute the same from a checkpoint (or two)"
    )
    command.add_argument("source", type=Path, help="what PyTorch runs")
    command.add_argument("other", type=Path, nargs="?", help="what Flax runs (default: source)")
    command.add_argument(
        "--new-tokens", type=int, default=256, help="greedy tokens that must agree (default: 256)"
    )
    command.add_argument("--seed", type=int, default=0, help="of random inputs (default: 0)")
    _add_source_options(command)
    command.set_defaults(run=_verify)

    from alibi_cli.demo import add_arguments

    command = commands.add_parser(
        "demo", help="train, convert, verify and measure a small model on real text"
    )
    add_arguments(command)
    command.set_defaults(run=_demo)
    return parser


def _add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, help="JSON of an ALiBiConfig, for files that carry none"
    )
    command.add_argument(
        "--allow-pt", action="store_true", help="read pickles, by torch's weights_only unpickler"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _source_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"config": _read_config(options.config), "allow_pt": options.allow_pt}


def _read_config(path: Path | None) -> ALiBiConfig | None:
    if path is None:
        return None
    values = parse_json(path.read_bytes(), str(path))
    if values.get("format") == FORMAT:
        return parse_config(path.read_bytes(), str(path))
    return ALiBiConfig.from_dict(values)


def _inspect(options: argparse.Namespace) -> int:
    contents = inspect(options.path, **_source_options(options))
    if options.json:
        print(json.dumps(contents, indent=2))
        return OK
    print(f"{contents['path']}: {contents['model']}, {contents['family']} ({contents['format']})")
    print(f"{contents['parameters']:,} parameters, {contents['nbytes']:,} bytes")
    defaults = ALiBiConfig().to_dict()
    for name, value in contents["config"].items():
        print(f"  {name} = {value}" + ("" if value == defaults[name] else "  *"))
    width = max(map(len, contents["tensors"]))
    for name, tensor in contents["tensors"].items():
        print(f"  {name:{width}}  {tensor['dtype']:9} {tensor['shape']}")
    for name, reason in contents["derived"].items():
        print(f"  {name:{width}}  not carried over: {reason}")
    return OK


def _convert(options: argparse.Namespace) -> int:
    report = convert(
        options.source,
        options.destination,
        to=options.to,
        dtype=options.dtype,
        verify=not options.no_verify,
        overwrite=options.overwrite,
        **_source_options(options),
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
        return OK
    print(
        f"{report.source} ({report.family}, {report.source_format}) -> "
        f"{report.destination} ({report.destination_format})"
    )
    print(f"{report.tensors} tensors, {report.nbytes:,} bytes")
    for name, reason in report.dropped.items():
        print(f"  not carried over: {name} ({reason})")
    if report.rounding is not None:
        print(f"cast to {options.dtype}: largest relative rounding error {report.rounding:.1e}")
    if report.verified:
        print("read back: bitwise what was meant")
    return OK


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


def _demo(options: argparse.Namespace) -> int:
    from alibi_cli.demo import run

    return OK if run(options) else MISMATCH


if __name__ == "__main__":
    sys.exit(main())
