"""`alibi score`: how well a model predicts a text, by either of the paper's two evaluations."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_cli.arguments import (
    SOURCE,
    add_backend_option,
    add_source_options,
    count,
    path,
    source_options,
)
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json

if TYPE_CHECKING:
    import numpy as np

    from alibi_convert.checkpoint import Checkpoint
    from alibi_spec.scoring import Window

HELP = "measure how well a model predicts a text: perplexity, bits per byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text, and how it is cut."""
    parser.add_argument("source", type=path, help=SOURCE)
    parser.add_argument("text", type=path, help="a file")
    parser.add_argument(
        "--length", type=count, help="tokens that are read at once (default: max_len of the model)"
    )
    parser.add_argument(
        "--stride",
        type=count,
        help="tokens from one window to the next; less than --length is a sliding window "
        "(default: --length)",
    )
    parser.add_argument(
        "--batch-size", type=count, default=8, help="windows read together (default: 8)"
    )
    add_backend_option(parser)
    parser.add_argument(
        "--resume", type=path, metavar="FILE", help="keep progress there, and go on from there"
    )
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Score the text window by window, and print what the model makes of it.

    Raises:
        CheckpointError: as for `open_checkpoint`.
        ValueError: the text is too short or has no tokenizer, or the file of an earlier run belongs
            to another one.
    """
    import numpy as np

    from alibi_cli.tokens import tokenizer_of
    from alibi_convert import open_checkpoint
    from alibi_spec.checks import require_vocabulary
    from alibi_spec.scoring import Score, score_windows

    checkpoint = open_checkpoint(options.source, **source_options(options))
    require_vocabulary(checkpoint.config.vocab_size)
    tokens = np.array(tokenizer_of(checkpoint).encode_file(options.text), np.int64)
    length = options.length or checkpoint.config.max_len
    stride = options.stride or length
    windows = list(score_windows(len(tokens), length, stride))
    progress = _Progress(options.resume, _identity(options, checkpoint, tokens, length, stride))
    scored = _torch(options) if options.backend == "torch" else _flax(options)
    for batch in _progress_bar(_batches(windows[progress.windows :], options.batch_size), options):
        rows = np.stack([tokens[window.start : window.end + 1] for window in batch])
        found = scored(rows).astype(np.float64)
        counted = [row[w.first - w.start - 1 :].sum() for row, w in zip(found, batch, strict=True)]
        progress.add(len(batch), -float(np.sum(counted)))
    score = Score(len(tokens) - 1, options.text.stat().st_size, progress.negative_log_likelihood)
    progress.finish()
    if options.json:
        print_json(score.to_dict() | {"length": length, "stride": stride})
        return OK
    print(f"{score.tokens:,} tokens in windows of {length:,}, {stride:,} apart")
    print(f"negative log-likelihood: {score.negative_log_likelihood:,.4f} nats")
    print(f"perplexity: {score.perplexity:.4f}")
    print(f"bits per byte: {score.bits_per_byte:.4f}")
    return OK


class _Progress:
    """What has been scored, kept in a file so that a run that was stopped can go on."""

    def __init__(self, file: Path | None, identity: str) -> None:
        self._file, self._identity = file, identity
        self.windows, self.negative_log_likelihood = 0, 0.0
        if file is None or not file.exists():
            return
        from alibi_convert.files import read_json

        kept = read_json(file)
        if kept.get("identity") != identity:
            raise ValueError(
                f"{file} is of another model, text or options; pass another --resume, or remove it"
            )
        self.windows = int(kept["windows"])
        self.negative_log_likelihood = float(kept["negative_log_likelihood"])

    def add(self, windows: int, negative_log_likelihood: float) -> None:
        from alibi_convert.writing.atomic import replacing

        self.windows += windows
        self.negative_log_likelihood += negative_log_likelihood
        if self._file is not None:
            kept = {
                "identity": self._identity,
                "windows": self.windows,
                "negative_log_likelihood": self.negative_log_likelihood,
            }
            with replacing(self._file, overwrite=True) as new:
                new.write_text(json.dumps(kept) + "\n", encoding="utf-8")

    def finish(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _identity(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    length: int,
    stride: int,
) -> str:
    """A hash of all that the score depends on: the model's files, the text, the options."""
    found = {name: file.stat() for name, file in checkpoint.files.items()}
    facts = {
        "files": {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()},
        "config": checkpoint.config.to_dict(),
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "options": [options.backend, length, stride],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _batches(windows: list[Window], size: int) -> list[list[Window]]:
    """Windows of one length, next to one another, a few at a time."""
    batches = []
    for _, equal in groupby(windows, key=lambda window: window.end - window.start):
        several = list(equal)
        batches += [several[start : start + size] for start in range(0, len(several), size)]
    return batches


def _progress_bar(
    batches: list[list[Window]], options: argparse.Namespace
) -> Iterator[list[Window]]:
    from tqdm import tqdm

    hidden = options.json or not sys.stderr.isatty()
    return iter(tqdm(batches, unit="batch", disable=hidden, leave=False))


def _torch(options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
    from alibi_convert.machine import require

    require("torch", "torch", "the PyTorch backend")
    import torch

    import alibi_torch
    from alibi_convert.tensors import as_numpy

    model = alibi_torch.ALiBiLM.from_pretrained(options.source, **source_options(options))

    def scored(rows: np.ndarray) -> np.ndarray:
        with alibi_torch.full_precision():
            return as_numpy(alibi_torch.token_log_probabilities(model, torch.from_numpy(rows)))

    return scored


def _flax(options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
    from alibi_convert.machine import require

    require("flax", "flax", "the Flax backend")
    import numpy as np

    import alibi_flax

    model, params = alibi_flax.from_pretrained(options.source, **source_options(options))
    call: Any = alibi_flax.token_log_probabilities

    def scored(rows: np.ndarray) -> np.ndarray:
        with alibi_flax.full_precision():
            return np.asarray(call(model, params, rows))

    return scored
