"""`alibi windows`: how far each head can look, proved from the weights, and what a cache holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from alibi_cli.arguments import SOURCE, add_source_options, path, source_options, tolerance
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json

if TYPE_CHECKING:
    import numpy as np

    from alibi_spec import ALiBiConfig

HELP = "show how far each head can look, proved from the weights"
LENGTHS = (4_096, 32_768, 131_072)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the tolerance."""
    parser.add_argument("source", type=path, help=SOURCE)
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default="dtype",
        help="share of attention mass that may be skipped (default: half an ulp of float32)",
    )
    add_source_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the windows, their share of all keys, and what a cache holds, at several lengths.

    Raises:
        CheckpointError: as for `open_checkpoint`.
    """
    from alibi_convert import open_checkpoint
    from alibi_spec.bounds import model_windows

    checkpoint = open_checkpoint(options.source, **source_options(options))
    tensors = checkpoint.tensors  # read one by one
    windows = model_windows(checkpoint.config, tensors, tolerance=options.tolerance)
    shares = {length: _share(windows, length) for length in LENGTHS}
    bounded = bool((windows >= 0).all())
    caches = {length: cache_bytes(checkpoint.config, windows, length) for length in LENGTHS}
    without_end = cache_bytes(checkpoint.config, windows, None) if bounded else None
    if options.json:
        keys = int(windows.sum()) if bounded else None
        found = {"windows": windows.tolist(), "share": shares, "keys_at_any_length": keys}
        print_json(found | {"cache_bytes": caches, "cache_bytes_at_any_length": without_end})
        return OK
    print("keys that a head can need, including its own position (-: not bounded)")
    print("  layer " + "".join(f"{f'head {head}':>10}" for head in range(windows.shape[1])))
    for layer, row in enumerate(windows):
        print(f"  {layer:>5} " + "".join(f"{'-' if w < 0 else f'{w:,}':>10}" for w in row))
    for length, share in shares.items():
        print(f"  of all keys at {length:,} positions: {share:.1%}")
    print(
        f"  at any length: at most {int(windows.sum()):,} keys of a head"
        if bounded
        else "  some head can need every key"
    )
    print("a cache of one sequence, float32, in MB (and if it keeps every key)")
    for length, held in caches.items():
        whole = cache_bytes(checkpoint.config, None, length)
        print(f"  {length:>9,} positions: {held / 1e6:,.1f} ({whole / 1e6:,.1f})")
    if without_end is not None:
        print(f"  any number of positions: {without_end / 1e6:,.1f}")
    return OK


def _share(windows: np.ndarray, length: int) -> float:
    """The keys inside the windows, over all keys, of a sequence of this length."""
    import numpy as np

    kept = np.where(windows < 0, length, np.minimum(windows, length))
    return float(kept.sum() / (windows.size * length))


def cache_bytes(config: ALiBiConfig, windows: np.ndarray | None, capacity: int | None) -> int:
    """The bytes of keys and values of one sequence."""
    from alibi_spec.cache import rings

    every = (ring for of_layer in rings(config, windows, capacity) for ring in of_layer)
    positions = sum(len(ring.heads) * ring.size for ring in every)
    return 2 * 4 * config.head_dim * positions
