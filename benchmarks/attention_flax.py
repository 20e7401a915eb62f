"""How fast and how exact attention of alibi_flax is here: `python -m benchmarks.attention_flax`.

The peers are JAX's and Flax's own attention, given the bias as a matrix that is made beforehand.
All are compiled first and run in turns, so that all meet the same machine; figures are medians. A
peer stops where it would hold more than 8 GB or take more than a minute; what a program holds
besides its inputs is the compiler's figure. `--quick` takes a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import alibi_flax
from alibi_spec import slopes as paper_slopes
from alibi_spec.masks import masked_softmax
from alibi_spec.reference import biased_logits
from benchmarks.conversion import machine

RESULTS = Path(__file__).parent / "results" / "attention_flax.json"
HEADS, HEAD_DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
QUICK_LENGTHS = (512, 1024, 2048, 4096)
LARGEST_BYTES = 8e9
OURS, DENSE = "alibi_flax, blockwise", "alibi_flax, dense"
JAX_NN, FLAX_NN = "jax.nn with a bias", "flax.linen with a bias"
PASSES = ("forward", "forward and backward")

Arrays = tuple[Array, ...]  # query, key, value, and the slopes or the bias


def _alibi(implementation: str) -> Callable[..., Array]:
    return partial(alibi_flax.attention, implementation=implementation)


def _jax_nn(query: Array, key: Array, value: Array, bias: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=True)


def _flax_nn(query: Array, key: Array, value: Array, bias: Array) -> Array:
    mask = nn.make_causal_mask(query[:, :, 0, 0], dtype=jnp.bool_)
    return nn.dot_product_attention(query, key, value, bias, mask).astype(query.dtype)


PEERS: dict[str, Callable[..., Array]] = {
    OURS: _alibi("blockwise"),
    DENSE: _alibi("dense"),
    JAX_NN: _jax_nn,
    FLAX_NN: _flax_nn,
}


def draw(seq: int, dtype: str, inputs: str) -> tuple[Array, Array, Array]:
    """query, key, value [1, seq, HEADS, HEAD_DIM]: normal numbers, or more like trained ones.

    Trained keys have a large part in common, on which queries lean, and first tokens that all look
    at: norms are larger than normal numbers give them, logits more spread.
    """
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, seq, HEADS, HEAD_DIM), np.float32)
    if inputs == "trained-like":
        common = rng.standard_normal((1, 1, HEADS, HEAD_DIM), np.float32)
        query, key = 1.2 * query - 0.5 * common, key + common
        key[:, :4] -= 2 * common
    return jnp.asarray(query, dtype), jnp.asarray(key, dtype), jnp.asarray(value, dtype)


def arguments(peer: str, seq: int, dtype: str, inputs: str) -> Arrays:
    """What a peer is called with."""
    slopes = paper_slopes(HEADS)
    if peer in (OURS, DENSE):
        return (*draw(seq, dtype, inputs), jnp.asarray(slopes))
    position = np.arange(seq, dtype=np.float32)
    bias = -slopes[:, None, None] * np.abs(position[:, None] - position)
    return (*draw(seq, dtype, inputs), jnp.asarray(bias[None]))


def compiled(peer: str, arrays: Any, pass_name: str) -> Any:
    """One program for one length; the cotangent of its gradients is ones."""
    attend = PEERS[peer]

    def total(*arrays: Array) -> Array:
        return attend(*arrays).astype(jnp.float32).sum()

    function = attend if pass_name == "forward" else jax.grad(total, argnums=(0, 1, 2))
    return jax.jit(function).lower(*arrays).compile()


def extra_bytes(program: Any) -> int:
    """Memory that a call adds to its inputs, results included."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def timed(program: Any, arrays: Arrays) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - started


def compared(
    peers: list[str],
    lengths: tuple[int, ...],
    dtype: str,
    inputs: str,
    pass_name: str,
    longest: float,
) -> Iterator[dict[str, Any]]:
    """A row per peer and length, shortest first; a row without seconds says why it has none."""
    last: dict[str, float] = {}
    stopped: set[str] = set()
    for seq in lengths:
        row = {"seq": seq, "dtype": dtype, "inputs": inputs, "pass": pass_name}
        ready: dict[str, tuple[Any, Arrays]] = {}
        for peer in peers:
            if peer in stopped:
                continue
            found = _prepared(peer, row, last.get(peer, 0.0), longest)
            if isinstance(found, str):
                yield {"peer": peer} | row | {"stopped": found}
                stopped.add(peer)
            else:
                ready[peer] = found
                last[peer] = timed(*found)  # warms up
        slowest = max((last[peer] for peer in ready), default=0.0)
        rounds = 9 if slowest < 1 else 5 if slowest < 5 else 3
        figures: dict[str, list[float]] = {peer: [] for peer in ready}
        for _ in range(rounds):
            for peer, (program, arrays) in ready.items():
                figures[peer].append(timed(program, arrays))
        for peer, seconds in figures.items():
            last[peer] = statistics.median(seconds)
            extra = {"extra_bytes": extra_bytes(ready[peer][0])}
            yield {"peer": peer} | row | {"seconds": last[peer], "raw": seconds} | extra


def _prepared(
    peer: str, row: dict[str, Any], last: float, longest: float
) -> tuple[Any, Arrays] | str:
    """A program and its arguments, or why there is none; `last` is the time at half the length."""
    if 4 * last > longest:
        return f"would take {4 * last:.0f} s"
    bias_bytes = 0 if peer == OURS else 4 * HEADS * row["seq"] ** 2  # or the logits of dense
    if bias_bytes > LARGEST_BYTES:
        return f"needs {bias_bytes / 1e9:.0f} GB"
    arrays = arguments(peer, row["seq"], row["dtype"], row["inputs"])
    program = compiled(peer, arrays, row["pass"])
    needed = extra_bytes(program) + (0 if peer in (OURS, DENSE) else bias_bytes)
    return (program, arrays) if needed <= LARGEST_BYTES else f"needs {needed / 1e9:.0f} GB"


def errors(seq: int, places: int = 8, rows: int = 64) -> dict[str, float]:
    """Largest error of ours and of dense attention in float32, on rows along a long sequence."""
    query, key, value, slopes = arguments(OURS, seq, "float32", "normal")
    attended = alibi_flax.attention(query, key, value, slopes, implementation="blockwise")
    largest = {OURS: 0.0, DENSE: 0.0}
    for end in np.linspace(rows, seq, places).astype(int).tolist():
        q, k, v = query[:, end - rows : end], key[:, :end], value[:, :end]
        dense = alibi_flax.attention(q, k, v, slopes, implementation="dense")
        q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
        exact = masked_softmax(biased_logits(q, k, np.asarray(slopes))) @ v
        for name, found in ((OURS, attended[:, end - rows : end]), (DENSE, dense)):
            error = np.abs(np.asarray(found, np.float64).swapaxes(1, 2) - exact).max()
            largest[name] = max(largest[name], float(error))
    return largest


def goals(rows: list[dict[str, Any]], peaks: dict[str, int], error: dict[str, float]) -> Any:
    """What was asked of the kernel beside what was found; what was not measured is left out."""
    seconds = {
        (row["peer"], row["seq"], row["pass"]): row["seconds"]
        for row in rows
        if "seconds" in row and (row["dtype"], row["inputs"]) == ("float32", "normal")
    }

    def ratio(left: tuple[str, int, str], right: tuple[str, int, str]) -> float | None:
        return seconds[left] / seconds[right] if left in seconds and right in seconds else None

    table: list[tuple[str, float | None, str, float]] = []
    for pass_name, wanted in zip(PASSES, (8, 6), strict=True):
        speed = ratio((JAX_NN, 4096, pass_name), (OURS, 4096, pass_name))
        growth = ratio((OURS, 65_536, pass_name), (OURS, 16_384, pass_name))
        table += [
            (f"speed, {JAX_NN}, {pass_name}, N=4096", speed, ">=", wanted),
            (f"time, 16k -> 64k, {pass_name}", growth, "<=", 5),
        ]
        larger, smaller = (peaks.get(f"{seq} {pass_name}") for seq in (65_536, 16_384))
        if larger and smaller:
            table.append((f"memory, 16k -> 64k, {pass_name}", larger / smaller, "<=", 4.2))
    if error:
        table.append(("error, dense, N=32768", error[OURS] / error[DENSE], "<=", 2))
    return [
        {
            "goal": name,
            "wanted": f"{sign} {limit}",
            "found": found,
            "met": found >= limit if sign == ">=" else found <= limit,
        }
        for name, found, sign, limit in table
        if found is not None
    ]


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float32 up to 4,096 alone")
    parser.add_argument("--only", default="", help="peers whose name contains this")
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds that a call may take (default: 60)"
    )
    parser.add_argument("--float32", action="store_true", help="float32 and normal inputs alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    peers = [peer for peer in PEERS if options.only in peer]
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    plans = [(peers, "float32", "normal")]
    if not (options.quick or options.float32):
        # The windows follow the inputs. Other peers take the same time for all.
        ours = [peer for peer in peers if peer == OURS]
        plans += [(peers, "bfloat16", "normal"), (ours, "float32", "trained-like")]
    rows: list[dict[str, Any]] = []
    for which, dtype, inputs in plans:
        for pass_name in PASSES:
            for row in compared(which, lengths, dtype, inputs, pass_name, options.longest):
                rows.append(row)
                found = f"{row['seconds'] * 1e3:9.1f} ms" if "seconds" in row else row["stopped"]
                labels = f"{row['peer']:24} {row['seq']:6} {dtype:8} {inputs:12} {pass_name:20}"
                print(labels, found, flush=True)
    peaks = {
        f"{row['seq']} {row['pass']}": row["extra_bytes"]
        for row in rows
        if (row["peer"], row["dtype"], row["inputs"]) == (OURS, "float32", "normal")
        and "extra_bytes" in row
    }
    error = {} if options.quick else errors(32_768)
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("alibi-duo", "jax", "flax")},
        "longest_seconds": options.longest,
        "shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM},
        "notes": {JAX_NN: "the bias is made beforehand", FLAX_NN: "the bias is made beforehand"},
        "goals": goals(rows, peaks, error),
        "peak_extra_bytes": peaks,
        "largest_error": error,
        "share_of_blocks": _shares(lengths),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for goal in results["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['goal']:50} {goal['found']:6.2f}  wanted {goal['wanted']:8} {verdict}")
    return 0


def _shares(lengths: tuple[int, ...]) -> dict[str, dict[int, list[float]]]:
    """Of the causal blocks, what each head computes."""
    slopes = jnp.asarray(paper_slopes(HEADS))
    return {
        inputs: {
            seq: alibi_flax.attention_plan(*draw(seq, "float32", inputs)[:2], slopes)
            .share[0]
            .tolist()
            for seq in lengths
        }
        for inputs in ("normal", "trained-like")
    }


if __name__ == "__main__":
    sys.exit(main())
