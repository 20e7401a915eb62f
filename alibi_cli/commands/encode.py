"""`alibi encode`: one vector for each text, by the model of a checkpoint, in either backend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_cli.arguments import (
    SOURCE,
    add_backend_option,
    add_source_options,
    add_text_options,
    count,
    given_texts,
    path,
    source_options,
)
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_lines, vector_lines

if TYPE_CHECKING:
    import numpy as np

HELP = "turn texts into vectors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts, how they are pooled, and where the vectors go."""
    from alibi_spec.pooling import POOLINGS

    parser.add_argument("source", type=path, help=SOURCE)
    add_text_options(parser)
    add_backend_option(parser)
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="of all positions, the first, or the last (default: mean)",
    )
    parser.add_argument(
        "--no-normalize", action="store_true", help="leave vectors as long as they are"
    )
    parser.add_argument(
        "--batch-size", type=count, default=32, help="texts read together (default: 32)"
    )
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="write the vectors there, a NumPy file (.npy)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Encode the texts; write the vectors, print them as JSON, or compare them.

    Raises:
        CheckpointError: as for `open_checkpoint`; or the output exists, or cannot be written.
        ValueError: no text, an empty one, no tokenizer, or both --output and --json.
    """
    from alibi_cli.tokens import tokenizer_of
    from alibi_convert import open_checkpoint
    from alibi_spec.checks import require_vocabulary

    _check_output(options)
    texts = given_texts(options)
    checkpoint = open_checkpoint(options.source, **source_options(options))
    require_vocabulary(checkpoint.config.vocab_size)
    tokenizer = tokenizer_of(checkpoint)
    sequences = [tokenizer.encode(text) for _, text in texts]
    if [] in sequences:
        raise ValueError(f"{texts[sequences.index([])].place} has no tokens; expected at least one")
    vectors = (_torch if options.backend == "torch" else _flax)(options, sequences)
    if options.json:
        for (_, text), vector in zip(texts, vectors, strict=True):
            print(json.dumps({"text": text, "vector": vector.tolist()}))
        return OK
    if options.output is not None:
        _write(options.output, vectors, options.overwrite)
    print_lines(vector_lines(vectors, options.output))
    return OK


def _check_output(options: argparse.Namespace) -> None:
    """Before any work: whether the file may be written."""
    from alibi_convert.writing.atomic import check_destination

    if options.output is None:
        return
    if options.json:
        raise ValueError("--output writes the vectors and --json prints them; pass one of the two")
    if options.output.is_dir():
        raise ValueError(f"{options.output} is a folder; name a file in it")
    check_destination(options.output, options.overwrite)


def _write(file: Path, vectors: np.ndarray, overwrite: bool) -> None:
    import numpy as np

    from alibi_convert.writing.atomic import replacing

    with replacing(file, overwrite, vectors.nbytes) as new, new.open("wb") as opened:
        np.save(opened, vectors)  # given a name, it would add .npy


def _torch(options: argparse.Namespace, sequences: list[list[int]]) -> np.ndarray:
    from alibi_convert.machine import require

    require("torch", "torch", "the PyTorch backend")
    import alibi_torch
    from alibi_convert.tensors import as_numpy

    model: Any = alibi_torch.ALiBiLM.from_pretrained(options.source, **source_options(options))
    with alibi_torch.full_precision():
        return as_numpy(alibi_torch.encode(model, sequences, **_arguments(options)))


def _flax(options: argparse.Namespace, sequences: list[list[int]]) -> np.ndarray:
    from alibi_convert.machine import require

    require("flax", "flax", "the Flax backend")
    import numpy as np

    import alibi_flax

    model, params = alibi_flax.from_pretrained(options.source, **source_options(options))
    call: Any = alibi_flax.encode
    with alibi_flax.full_precision():
        return np.asarray(call(model, params, sequences, **_arguments(options)))


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "pooling": options.pooling,
        "normalize": not options.no_normalize,
        "batch_size": options.batch_size,
    }
