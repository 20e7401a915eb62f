"""`alibi generate`: continue texts with the model of a checkpoint, in either backend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from alibi_cli.arguments import (
    SOURCE,
    add_backend_option,
    add_mesh_options,
    add_source_options,
    count,
    path,
    source_options,
)
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json

if TYPE_CHECKING:
    import numpy as np

    from alibi_cli.tokens import Bytes, Subwords
    from alibi_convert.checkpoint import Checkpoint

HELP = "continue texts"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SETTINGS = "generation_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompts, how tokens are chosen, and by which backend."""
    parser.add_argument("source", type=path, help=SOURCE)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", help="may be repeated (default: the standard input)"
    )
    prompts.add_argument("--prompt-file", type=path, help="one prompt: the whole file")
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, help="for each prompt (default: 128)"
    )
    add_backend_option(parser)
    add_mesh_options(parser)
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument(
        "--do-sample", action="store_true", help="draw tokens (default: the likeliest)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--top-k", type=int, help="draw from this many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest with this probability")
    parser.add_argument("--min-p", type=float, help="least probability, over the largest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn tokens (default: 0)")
    parser.add_argument(
        "--eos-token-id",
        type=int,
        action="append",
        help="a token that ends a text; may be repeated (default: those of the folder's settings)",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="a text that ends one; may be repeated"
    )
    parser.add_argument(
        "--windows",
        action="store_true",
        help="keep only the keys that each head provably needs, so that memory stops growing",
    )
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print what follows each prompt.

    Raises:
        CheckpointError: as for `open_checkpoint`.
        ValueError: no prompt, no tokenizer, a mesh that does not fit, or an option that `generate`
            refuses.
    """
    if options.mesh is None:
        return _run(options, None)
    from alibi_train.processes import processes

    if options.backend == "torch" and options.prompt is None and options.prompt_file is None:
        raise ValueError("the standard input is not that of every process; pass --prompt")
    with processes(options.mesh, options.backend) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: Any) -> int:
    import numpy as np

    from alibi_cli.tokens import tokenizer_of
    from alibi_convert import open_checkpoint
    from alibi_convert.tensors import as_numpy
    from alibi_spec.checks import require_vocabulary
    from alibi_train.processes import is_first

    if options.stream and (options.json or len(options.prompt or ()) > 1):
        raise ValueError("--stream prints one text as it grows; pass one prompt, and no --json")
    checkpoint = open_checkpoint(options.source, **source_options(options))
    require_vocabulary(checkpoint.config.vocab_size)
    tokenizer = tokenizer_of(checkpoint)
    rows = _prompts(options, tokenizer)
    if not all(rows):
        raise ValueError(f"prompt {rows.index([])} has no tokens; expected at least one")
    _check_padding(rows, options.max_new_tokens, checkpoint.config.slope_interpolation)
    width = max(map(len, rows))
    prompts = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    arguments = {
        "attention_mask": mask if len({*map(len, rows)}) > 1 else None,
        "do_sample": options.do_sample,
        **{name: getattr(options, name) for name in _SAMPLING},
        "eos_token_id": options.eos_token_id or _eos(checkpoint),
        "stop_strings": options.stop,
        "tokenizer": tokenizer,
        "seed": options.seed,
        "windows": _windows(checkpoint) if options.windows else None,
    }
    begin = _torch if options.backend == "torch" else _flax
    if options.stream:
        with begin(options, mesh, "stream", prompts, arguments) as steps:
            _print_stream(steps, tokenizer, prints=is_first(mesh))
        return OK
    with begin(options, mesh, "generate", prompts, arguments) as generated:
        new = as_numpy(generated.tokens)[:, width:].tolist()
    if not is_first(mesh):
        return OK
    results = [
        {
            "prompt": tokenizer.decode(row),
            "text": tokenizer.decode(tokens[:length]),
            "tokens": tokens[:length],
            "finish_reason": reason,
        }
        for row, tokens, length, reason in zip(
            rows, new, generated.lengths.tolist(), generated.finish_reasons, strict=True
        )
    ]
    if options.json:
        print_json(results)
    else:
        print("\n\n".join(result["text"] for result in results))
    return OK


def _prompts(options: argparse.Namespace, tokenizer: Bytes | Subwords) -> list[list[int]]:
    if options.prompt is not None:
        return [tokenizer.encode(text) for text in options.prompt]
    if options.prompt_file is not None:
        return [tokenizer.encode_file(options.prompt_file)]
    return [tokenizer.encode(sys.stdin.read())]


def _check_padding(rows: list[list[int]], max_new_tokens: int, limit: int | None) -> None:
    """Raise ValueError if padding changes slopes: it counts where they are interpolated."""
    lengths = sorted(map(len, rows))
    longest = lengths[-1] + max_new_tokens - 1
    if limit is not None and longest > limit and lengths[0] != lengths[-1]:
        raise ValueError(
            f"prompts of {lengths[0]} and {lengths[-1]} tokens change each other's slopes past "
            f"slope_interpolation={limit}; pass one prompt, or fewer --max-new-tokens"
        )


def _eos(checkpoint: Checkpoint) -> int | list[int] | None:
    """That of the folder's settings, or of the family's configuration, now or once."""
    from alibi_convert.files import read_json
    from alibi_convert.writing.provenance import recorded_family

    file = checkpoint.path / _SETTINGS
    settings = read_json(file) if file.is_file() else {}
    family = checkpoint.foreign_config or recorded_family(checkpoint.path).get("source_config", {})
    eos = settings.get("eos_token_id")
    return family.get("eos_token_id") if eos is None else eos


def _windows(checkpoint: Checkpoint) -> np.ndarray:
    """Those of the dtype of the checkpoint, in which its model computes."""
    from alibi_spec.bounds import model_windows

    dtype = str(checkpoint.tensors["token_embedding.weight"].dtype)
    return model_windows(checkpoint.config, checkpoint.tensors, dtype=dtype)


@contextmanager
def _torch(
    options: argparse.Namespace,
    mesh: Any,
    what: str,
    prompts: np.ndarray,
    arguments: dict[str, Any],
) -> Iterator[Any]:
    """What `generate` or `stream` gives, which computes until the block ends."""
    from alibi_convert.machine import require

    require("torch", "torch", "the PyTorch backend")
    import torch

    import alibi_torch

    open_model = alibi_torch.ALiBiLM.from_pretrained
    model = open_model(options.source, mesh=mesh, **source_options(options))
    device = "cpu" if mesh is None else mesh.device_type
    mask = arguments["attention_mask"]
    arguments |= {"attention_mask": None if mask is None else torch.from_numpy(mask).to(device)}
    tokens = torch.from_numpy(prompts).to(device)
    call = getattr(alibi_torch, what)
    with alibi_torch.full_precision():
        yield call(model, tokens, options.max_new_tokens, **arguments)


@contextmanager
def _flax(
    options: argparse.Namespace,
    mesh: Any,
    what: str,
    prompts: np.ndarray,
    arguments: dict[str, Any],
) -> Iterator[Any]:
    from alibi_convert.machine import require

    require("flax", "flax", "the Flax backend")
    import jax

    import alibi_flax

    open_model = alibi_flax.from_pretrained
    model, params = open_model(options.source, sharding=mesh, **source_options(options))
    call = getattr(alibi_flax, what)
    on_the_mesh = nullcontext() if mesh is None else jax.set_mesh(mesh)
    with alibi_flax.full_precision(), on_the_mesh:
        yield call(model, params, prompts, options.max_new_tokens, **arguments)


def _print_stream(
    steps: Iterator[Any], tokenizer: Bytes | Subwords, *, prints: bool = True
) -> None:
    """The text as it grows; a character of several tokens is held back until it is whole.

    Tokens are decoded with those printed last, which spaces may depend on, and no others.

    Args:
        prints: else the tokens are only computed, with the process that prints.
    """
    ids: list[int] = []
    printed = shown = 0  # how many tokens the last text but one, and the last, ended with
    for step in steps:
        if not prints:
            continue
        ids.append(int(step[0]))
        before, text = tokenizer.decode(ids[printed:shown]), tokenizer.decode(ids[printed:])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            print(text[len(before) :], end="", flush=True)
            printed, shown = shown, len(ids)
    if prints:
        print(tokenizer.decode(ids[printed:])[len(tokenizer.decode(ids[printed:shown])) :])
