"""Types of arguments of the command line, and the options that several commands share.

Other packages are imported only when they are needed: `alibi --help` stays fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from alibi_convert.checkpoint import GivenConfig

SOURCE = "checkpoint folder or file, or org/name on the hub"


def count(text: str) -> int:
    """A number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def path(text: str) -> Path:
    """A path; a `~` that the shell left there, as in `--output=~/x`, is the user's home."""
    return Path(os.path.expanduser(text))


def tolerance(text: str) -> str | float:
    """A share of attention mass, or "dtype"."""
    return text if text == "dtype" else float(text)


class GivenText(NamedTuple):
    """A text from the command line, and where it stands: "line 3 of FILE"."""

    place: str
    text: str


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Several texts: the lines of a file, or of the standard input, or one by one."""
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "file",
        type=path,
        nargs="?",
        help="UTF-8, one text in each line (default: the standard input)",
    )
    texts.add_argument("--text", action="append", help="a text instead; may be repeated")


def given_texts(options: argparse.Namespace) -> list[GivenText]:
    """The texts of `add_text_options`.

    Raises:
        ValueError: none, an empty one, or a file that is not UTF-8.
    """
    if options.text is not None:
        texts, kind, origin = options.text, "--text", "the command line"
    elif options.file is not None:
        texts, kind, origin = _lines_of_file(options.file), "line", options.file
    else:
        texts, kind, origin = _lines(sys.stdin), "line", "the standard input"
    found = [GivenText(f"{kind} {n} of {origin}", text) for n, text in enumerate(texts, 1)]
    if not found:
        raise ValueError(f"{origin} holds no text; expected one in each line")
    for place, text in found:
        if not text.strip():
            raise ValueError(f"{place} is empty; expected a text")
    return found


def _lines_of_file(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as opened:
        try:
            return _lines(opened)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None


def _lines(opened: Iterable[str]) -> list[str]:
    return [line.removesuffix("\n") for line in opened]


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Which backend runs the model."""
    parser.add_argument(
        "--backend", choices=("torch", "flax"), default="torch", help="(default: torch)"
    )


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Over which devices the model is divided."""
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=SIZE,...",
        help="divide the model over devices: axes data, fsdp, sequence, tensor, such as "
        "fsdp=4,tensor=2; in PyTorch over the processes of torchrun, in JAX over all devices",
    )


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis of a mesh."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise argparse.ArgumentTypeError(
                f"{part!r} in {text!r}; expected AXIS=SIZE, each axis once, as in fsdp=4,tensor=2"
            )
        sizes[axis] = int(size)
    return sizes


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is read; and `--json`."""
    parser.add_argument(
        "--config",
        type=path,
        help="for files without one: JSON of an ALiBiConfig, or another config.json",
    )
    parser.add_argument(
        "--allow-pt", action="store_true", help="read pickles, by torch's weights_only unpickler"
    )
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="NAME",
        help="an unknown key of a config.json that changes nothing; may be repeated",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a source on the hub")
    parser.add_argument(
        "--step", type=int, help="of a folder of orbax's CheckpointManager (default: the latest)"
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="LoRA that peft saved, to be merged: a folder, or org/name on the hub",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_source_options` as arguments of `open_checkpoint`."""
    return {
        "config": _read_config(options.config),
        "allow_pt": options.allow_pt,
        "ignore_keys": options.ignore_key,
        "revision": options.revision,
        "step": options.step,
        "adapter": options.adapter,
    }


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """What a conversion writes."""
    from alibi_convert.formats import FORMATS
    from alibi_convert.tensors import DTYPES

    parser.add_argument(
        "--to",
        choices=list(FORMATS),
        help="; ".join(f"{name}: {kind.description}" for name, kind in FORMATS.items())
        + " (default: by the destination's suffix)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="cast every tensor")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of the files of a folder (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")


def target_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_target_options` as arguments of `plan` and `convert`."""
    return {
        "to": options.to,
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_size,
        "overwrite": options.overwrite,
    }


def _read_config(file: Path | None) -> GivenConfig | None:
    if file is None:
        return None
    from alibi_convert.files import read_json
    from alibi_convert.formats.config_file import OURS, read_config
    from alibi_spec import ALiBiConfig

    values = read_json(file)
    if values.get("format") == OURS:
        return read_config(file)
    if "model_type" in values:  # of a family
        return values
    return ALiBiConfig.from_dict(values)
