"""`alibi parity`: every implementation against the float64 reference, and why one differs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from alibi_cli.arguments import SOURCE, add_source_options, count, path, source_options
from alibi_cli.exit_codes import MISMATCH, OK
from alibi_cli.rendering import (
    checkpoint_difference_lines,
    parity_summary_lines,
    print_json,
    print_lines,
    run_lines,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from alibi_convert.checkpoint import Checkpoint
    from alibi_verify import Run

HELP = "compare every implementation with the float64 reference, layer by layer, and explain"
_LOWEST, _HIGHEST = 1e-18, 10.0  # errors that are drawn: of nothing, and infinite ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One checkpoint or two, what they read, and what is compared."""
    from alibi_convert.tensors import DTYPES

    parser.add_argument("source", type=path, help=f"A: {SOURCE}; its reference is the truth")
    parser.add_argument("other", type=path, nargs="?", help="B: what is run (default: A)")
    parser.add_argument(
        "--text",
        type=path,
        help="what the model reads (default: random tokens, some of them padding)",
    )
    parser.add_argument("--batch", type=count, default=3, help="sequences (default: 3)")
    parser.add_argument("--length", type=count, default=48, help="of each, in tokens (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        nargs="+",
        default=["float32"],
        help="of parameters and computation (default: float32)",
    )
    parser.add_argument(
        "--implementation",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one, as torch-cpu or 'torch-cpu dense'; may be repeated (default: all)",
    )
    parser.add_argument(
        "--gradients", action="store_true", help="compare the gradients of all parameters, too"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the error of each layer")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier picture")
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print what each implementation computes, as soon as it is known.

    Raises:
        CheckpointError: as for `open_checkpoint`.
        ValueError: checkpoints of different architectures, a text that the model cannot read, no
            such implementation, or a picture that exists.
    """
    from alibi_convert.machine import require
    from alibi_verify import Parity, Run

    if options.plot is not None:
        require("matplotlib", "demo", "drawing")
        if options.plot.exists() and not options.overwrite:
            raise ValueError(f"{options.plot} exists; pass --overwrite or another --plot")
    parity = Parity(options.source, options.other, **source_options(options))
    inputs, attention_mask, description = _inputs(parity.ours, options)
    if not options.json:
        print(f"{parity.theirs.path} reads {description}")
        print_lines(checkpoint_difference_lines(parity))
    runs, skipped = [], []
    for each in parity.runs(
        inputs,
        attention_mask,
        dtypes=list(dict.fromkeys(options.dtype)),
        implementations=options.implementation,
        gradients=options.gradients,
        seed=options.seed,
    ):
        (runs if isinstance(each, Run) else skipped).append(each)
        if isinstance(each, Run) and not options.json:
            print_lines(run_lines(each))
    if not runs:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in skipped)
        raise ValueError(f"nothing could be run: {reasons}")
    if options.plot is not None:
        _draw(runs, options.plot, f"{parity.theirs.path.name}, {description}")
    passed = all(each.passed for each in runs)
    if options.json:
        print_json({"passed": passed, "inputs": description, **parity.to_dict(runs, skipped)})
    else:
        print_lines(parity_summary_lines(runs, skipped))
    return OK if passed else MISMATCH


def _inputs(
    checkpoint: Checkpoint, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, str]:
    """What the model reads, which of it is no padding, and what it is in words."""
    import numpy as np

    from alibi_verify.inputs import padding_of, random_inputs

    if options.text is not None:
        return _text(checkpoint, options)
    rng, shape = np.random.default_rng(options.seed), (options.batch, options.length)
    kind = "embeddings" if checkpoint.config.vocab_size is None else "tokens"
    description = f"{options.batch} × {options.length} random {kind} (seed {options.seed})"
    return random_inputs(checkpoint.config, *shape, rng), padding_of(*shape), description


def _text(
    checkpoint: Checkpoint, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, str]:
    """The beginning of a text, in rows; the last is padded."""
    import numpy as np

    from alibi_cli.tokens import tokenizer_of

    vocab_size = checkpoint.config.vocab_size
    if vocab_size is None:
        raise ValueError("this model has no vocabulary; omit --text")
    tokens = np.array(tokenizer_of(checkpoint).encode_file(options.text), np.int64)
    if not tokens.size:
        raise ValueError(f"{options.text} holds no tokens; expected a text")
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"{options.text} has token {tokens.max()}, beyond the vocabulary of {vocab_size}; the "
            "tokenizer beside this model is another model's: replace it, or omit --text"
        )
    length = min(options.length, tokens.size)
    tokens = tokens[: options.batch * length]
    shape = (-(-tokens.size // length), length)
    visible = np.arange(shape[0] * length) < tokens.size
    padded = np.zeros(visible.size, np.int64)
    padded[visible] = tokens
    description = f"{tokens.size:,} tokens of {options.text.name}, {shape[0]} × {length}"
    return padded.reshape(shape), visible.reshape(shape).astype(np.int64), description


def _draw(runs: list[Run], output: Path, title: str) -> None:
    """The worst error of each layer, a line for each run; those that failed are dashed."""
    import matplotlib
    import numpy as np

    from alibi_convert.writing.atomic import replacing

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    names = list(dict.fromkeys(each.name for each in runs))
    dtypes = list(dict.fromkeys(each.dtype for each in runs))
    stages = list(max((each.by_stage for each in runs), key=len))
    for each in runs:
        places = [stages.index(stage) for stage in each.by_stage]
        errors = np.clip(list(each.by_stage.values()), _LOWEST, _HIGHEST)
        axes.plot(
            places,
            errors,
            color=f"C{names.index(each.name) % 10}",
            marker="osD^"[dtypes.index(each.dtype)],
            linestyle="-" if each.passed else "--",
            label=f"{each.name}, {each.dtype}",
        )
    for budget in sorted({each.budget for each in runs}):
        axes.axhline(budget, color="grey", linestyle=":")
    axes.set_xticks(range(len(stages)), stages, rotation=90 if len(stages) > 16 else 0)
    axes.set(yscale="log", xlabel="layer", ylabel="largest relative error", title=title)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(output, overwrite=True) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)
