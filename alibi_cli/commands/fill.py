"""`alibi fill`: the likeliest tokens for the masks in texts, in either backend."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
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
from alibi_cli.rendering import filled_lines, print_json, print_lines

if TYPE_CHECKING:
    import numpy as np

    from alibi_cli.tokens import Bytes, Subwords

HELP = "find the likeliest tokens for the masks in texts"
BATCH = 32  # texts that are read together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts, and what a mask is."""
    parser.add_argument("source", type=path, help=SOURCE)
    add_text_options(parser)
    parser.add_argument(
        "--mask-token",
        metavar="TEXT",
        help="what stands for a mask in the texts (default: the tokenizer's own, as [MASK])",
    )
    parser.add_argument("--top-k", type=count, default=5, help="tokens for each mask (default: 5)")
    add_backend_option(parser)
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the likeliest tokens for every mask.

    Raises:
        CheckpointError: as for `open_checkpoint`.
        ValueError: no text, one without a mask, no tokenizer, no mask token, or a model that
            `fill_masks` refuses.
    """
    import numpy as np

    from alibi_cli.tokens import mask_token_of, tokenizer_of
    from alibi_convert import open_checkpoint
    from alibi_spec.batching import batches_by_length
    from alibi_spec.checks import require_vocabulary

    texts = given_texts(options)
    checkpoint = open_checkpoint(options.source, **source_options(options))
    require_vocabulary(checkpoint.config.vocab_size)
    tokenizer = tokenizer_of(checkpoint)
    mask = mask_token_of(checkpoint, tokenizer, options.mask_token)
    rows = [tokenizer.encode(text) for _, text in texts]
    for (place, _), row in zip(texts, rows, strict=True):
        if mask.id not in row:
            raise ValueError(
                f"{place} holds no mask; write {mask.text} where a token is to be found"
            )
    filled = (_torch if options.backend == "torch" else _flax)(options, mask.id)
    results: list[dict[str, Any]] = [{"text": text, "masks": []} for _, text in texts]
    for places, tokens, lengths in batches_by_length(
        rows, BATCH, checkpoint.config.slope_interpolation
    ):
        visible = np.arange(tokens.shape[1]) < lengths[:, None]
        for row, found in _masks(filled(tokens, visible), tokenizer):
            results[places[row]]["masks"].append(found)
    if options.json:
        print_json(results)
    else:
        print_lines(filled_lines(results))
    return OK


def _masks(filled: Any, tokenizer: Bytes | Subwords) -> Iterator[tuple[int, dict[str, Any]]]:
    """The row of each mask, in reading order, and what may stand there."""
    found = (each.tolist() for each in (filled.positions, filled.tokens, filled.probabilities))
    for (row, place), tokens, probabilities in zip(*found, strict=True):
        candidates = [
            {"token": token, "text": tokenizer.token_text(token), "probability": probability}
            for token, probability in zip(tokens, probabilities, strict=True)
        ]
        yield row, {"position": place, "candidates": candidates}


def _torch(options: argparse.Namespace, mask_token_id: int) -> Callable[..., Any]:
    from alibi_convert.machine import require

    require("torch", "torch", "the PyTorch backend")
    import torch

    import alibi_torch

    model: Any = alibi_torch.ALiBiLM.from_pretrained(options.source, **source_options(options))

    def filled(tokens: np.ndarray, visible: np.ndarray) -> alibi_torch.Filled:
        given, mask = torch.from_numpy(tokens), torch.from_numpy(visible)
        with alibi_torch.full_precision():
            return alibi_torch.fill_masks(
                model, given, mask_token_id, attention_mask=mask, top_k=options.top_k
            )

    return filled


def _flax(options: argparse.Namespace, mask_token_id: int) -> Callable[..., Any]:
    from alibi_convert.machine import require

    require("flax", "flax", "the Flax backend")
    import alibi_flax

    model, params = alibi_flax.from_pretrained(options.source, **source_options(options))
    call: Any = alibi_flax.fill_masks

    def filled(tokens: np.ndarray, visible: np.ndarray) -> alibi_flax.Filled:
        with alibi_flax.full_precision():
            return call(
                model, params, tokens, mask_token_id, attention_mask=visible, top_k=options.top_k
            )

    return filled
