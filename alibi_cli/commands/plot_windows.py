"""`alibi plot-windows`: what share of its attention a model has to compute, head by head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from alibi_cli.arguments import SOURCE, add_source_options, count, path, source_options, tolerance
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json

if TYPE_CHECKING:
    import numpy as np

    from alibi_convert.checkpoint import Checkpoint

HELP = "draw what share of its attention a model has to compute"
_COLOURS = "viridis"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what it reads, and what is drawn."""
    from alibi_spec.certificate import BLOCK_SIZE

    parser.add_argument("source", type=path, help=SOURCE)
    parser.add_argument(
        "--text", type=path, help="what the model reads (default: random tokens of its vocabulary)"
    )
    parser.add_argument("--length", type=count, default=2048, help="in tokens (default: 2048)")
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default="dtype",
        help="share of attention mass that may be skipped (default: dtype, half an ulp)",
    )
    parser.add_argument(
        "--block-size", type=count, default=BLOCK_SIZE, help=f"(default: {BLOCK_SIZE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random tokens (default: 0)")
    parser.add_argument(
        "--output", type=path, default=Path("windows.png"), help="picture (default: windows.png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier picture")
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Plan every layer, print the shares and draw them.

    Raises:
        CheckpointError: as for `open_checkpoint`.
        ValueError: the text is too short, has no tokenizer, or the picture exists.
    """
    from alibi_convert.machine import require

    require("torch", "torch", "planning attention")
    require("matplotlib", "demo", "drawing")
    import numpy as np
    import torch

    import alibi_torch
    from alibi_convert import open_checkpoint

    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output} exists; pass --overwrite or another --output")
    reading = source_options(options)
    checkpoint = open_checkpoint(options.source, **reading)
    has_vocabulary = checkpoint.config.vocab_size is not None
    kind = alibi_torch.ALiBiLM if has_vocabulary else alibi_torch.ALiBiTransformer
    model = kind.from_pretrained(options.source, **reading).eval()
    inputs, description = _inputs(checkpoint, options)
    plans = alibi_torch.model_plans(
        model, torch.from_numpy(inputs), tolerance=options.tolerance, block_size=options.block_size
    )
    shares = np.stack([plan.share[0].numpy() for plan in plans])
    if options.json:
        print_json({"inputs": description, "share": shares.tolist()})
    else:
        _print_shares(shares, description)
    first = np.stack([plan.first[0].numpy() for plan in plans])
    _draw(shares, first, options, description)
    if not options.json:
        print(f"drawn in {options.output}")
    return OK


def _inputs(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The inputs of the model, [1, length] or [1, length, d_model], and their description."""
    import numpy as np

    from alibi_cli.tokens import tokenizer_of

    config, rng = checkpoint.config, np.random.default_rng(options.seed)
    if config.vocab_size is None:
        if options.text is not None:
            raise ValueError("this model has no vocabulary; omit --text")
        shape = (1, options.length, config.d_model)
        return rng.standard_normal(shape, np.float32), "random embeddings"
    if options.text is None:
        return rng.integers(0, config.vocab_size, (1, options.length)), "random tokens"
    tokens = np.array(tokenizer_of(checkpoint).encode_file(options.text))
    if len(tokens) < options.length:
        raise ValueError(
            f"{options.text} has {len(tokens):,} tokens; choose a longer text or a --length of at "
            "most that"
        )
    return tokens[None, : options.length], options.text.name


def _print_shares(shares: np.ndarray, description: str) -> None:
    print(f"share of the blocks that will be computed, for {description}")
    heads = shares.shape[1]
    print("  layer " + "".join(f"  head {head:<3}" for head in range(heads)) + "  all")
    for layer, row in enumerate(shares):
        cells = "".join(f"{share:>9.1%} " for share in row)
        print(f"  {layer:>5} {cells}{row.mean():>6.1%}")
    print(f"  all layers and heads: {shares.mean():.1%}")


def _draw(
    shares: np.ndarray, first: np.ndarray, options: argparse.Namespace, description: str
) -> None:
    """Shares of all heads; and for the layer with the largest, how far back each head looks."""
    import matplotlib
    import numpy as np

    from alibi_convert.writing.atomic import replacing

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers, heads, blocks = first.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    image = left.imshow(shares, vmin=0, vmax=1, cmap=_COLOURS, aspect="auto")
    left.set(xlabel="head", ylabel="layer", title="share of blocks that are computed")
    left.set_xticks(range(heads))
    left.set_yticks(range(layers))
    figure.colorbar(image, ax=left)

    busiest = int(shares.mean(axis=1).argmax())
    position = np.arange(blocks) * options.block_size
    colours = plt.get_cmap(_COLOURS)(np.linspace(0, 0.9, heads))
    for head, colour in enumerate(colours):
        reach = position + options.block_size - first[busiest, head] * options.block_size
        right.step(position, reach, where="post", color=colour, label=f"head {head}")
    right.plot(position, position + options.block_size, color="grey", linestyle=":", label="all")
    right.set(xlabel="position of the query", ylabel="keys that it can need, back to")
    right.set_title(f"layer {busiest}")
    right.legend(frameon=False, fontsize="small", ncols=2)
    right.spines[["top", "right"]].set_visible(False)
    title = f"{options.source.name}, {options.length:,} × {description}"
    figure.suptitle(f"{title}, tolerance={options.tolerance}")
    with replacing(options.output, overwrite=True) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)
