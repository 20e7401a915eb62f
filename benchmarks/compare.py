"""Shared by the benchmarks of attention on the CPU: inputs, turns, goals, and the file of results.

Peers run in turns, under the same conditions; figures are medians. A peer stops where it would hold
more than 8 GB or exceed the time limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.conversion import machine

HEADS, HEAD_DIM = 8, 64
SHAPE = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
QUICK_LENGTHS = (512, 1024, 2048, 4096)
FORWARD, BOTH = PASSES = ("forward", "forward and backward")
LARGEST_BYTES = 8e9
# Seconds. Of shorter calls the second of two counts: a virtual machine reclaims the gigabytes that
# other peers have freed, and the next call waits for memory.
_SHORT = 2.0
_RATE_WIDTH, _RATE_CALLS = 1024, 21


class Case(NamedTuple):
    """One way to call every peer."""

    seq: int
    dtype: str
    inputs: str  # "normal" or "trained-like"
    pass_name: str


class Ready(NamedTuple):
    """A peer ready for a case: one call, in seconds; the bytes it holds and adds at its peak."""

    timed: Callable[[], float]
    extra_bytes: Callable[[], int]


Prepare = Callable[[str, Case], Ready | str]  # or why the peer cannot be called


def draw(seq: int, inputs: str) -> np.ndarray:
    """query, key, value [3, HEADS, seq, HEAD_DIM]: normal numbers, or more like trained ones.

    Trained keys have a large part in common, on which queries lean, and first tokens that all look
    at: norms are larger than normal numbers give them, logits more spread.
    """
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((3, HEADS, seq, HEAD_DIM), np.float32)
    if inputs == "trained-like":
        common = rng.standard_normal((HEADS, 1, HEAD_DIM), np.float32)
        arrays[0] = 1.2 * arrays[0] - 0.5 * common
        arrays[1] += common
        arrays[1, :, :4] -= 2 * common
    return arrays


def options_of(description: str | None, results: Path) -> argparse.Namespace:
    """The command line of these benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="only float32, up to 4,096")
    parser.add_argument("--only", default="", help="peers whose name contains this")
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds that a call may take (default: 60)"
    )
    parser.add_argument("--output", type=Path, default=results)
    return parser.parse_args()


def table(
    options: argparse.Namespace,
    peers: Iterable[str],
    following: Iterable[str],
    prepare: Prepare,
) -> list[dict[str, Any]]:
    """Rows of all peers for normal numbers, in float32 and bfloat16; for trained-like ones, only
    those of peers whose cost depends on the inputs, and of what these are compared with.
    """
    chosen = [peer for peer in peers if options.only in peer]
    parts = [(chosen, "float32", "normal")]
    if not options.quick:
        some = [peer for peer in chosen if peer in following]
        parts += [(chosen, "bfloat16", "normal"), (some, "float32", "trained-like")]
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    rows = []
    for which, dtype, inputs in parts:
        for pass_name in PASSES:
            cases = [Case(seq, dtype, inputs, pass_name) for seq in lengths]
            with_memory = not options.quick and (dtype, inputs) == ("float32", "normal")
            for row in _compared(which, cases, prepare, options.longest, with_memory):
                rows.append(row)
                found = f"{row['seconds'] * 1e3:9.1f} ms" if "seconds" in row else row["stopped"]
                labels = f"{row['peer']:30} {row['seq']:6} {dtype:8} {inputs:12} {pass_name:20}"
                print(labels, found, flush=True)
    return rows


def _compared(
    peers: list[str], cases: list[Case], prepare: Prepare, longest: float, with_memory: bool
) -> Iterator[dict[str, Any]]:
    """A row per peer and case, shortest first; a row without seconds says why it has none."""
    last: dict[str, float] = {}
    stopped: set[str] = set()
    for case in cases:
        ready: dict[str, Ready] = {}
        for peer in peers:
            if peer in stopped:
                continue
            needed = 4 * last.get(peer, 0.0)
            found = prepare(peer, case) if needed <= longest else f"would take {needed:.0f} s"
            if isinstance(found, str):
                yield _row(peer, case) | {"stopped": found}
                stopped.add(peer)
            else:
                found.timed()  # compiles and loads
                ready[peer], last[peer] = found, found.timed()
        slowest = max((last[peer] for peer in ready), default=0.0)
        raw: dict[str, list[float]] = {peer: [] for peer in ready}
        for _ in range(9 if slowest < 1 else 5 if slowest < 5 else 3):
            for peer, each in ready.items():
                if last[peer] < _SHORT:
                    each.timed()
                raw[peer].append(each.timed())
        for peer, seconds in raw.items():
            last[peer] = statistics.median(seconds)
            row = _row(peer, case) | {"seconds": last[peer], "raw": seconds}
            yield row | ({"extra_bytes": ready[peer].extra_bytes()} if with_memory else {})


def _row(peer: str, case: Case) -> dict[str, Any]:
    seq, dtype, inputs, pass_name = case
    return {"peer": peer, "seq": seq, "dtype": dtype, "inputs": inputs, "pass": pass_name}


class Figures:
    """The figures of float32 with normal numbers, by peer, length and pass."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = {
            (row["peer"], row["seq"], row["pass"]): row
            for row in rows
            if "seconds" in row and (row["dtype"], row["inputs"]) == ("float32", "normal")
        }

    def speed(self, ours: str, peer: str, seq: int, pass_name: str) -> float | None:
        """How many times faster ours is; None where one was not measured."""
        return self._ratio("seconds", (peer, seq, pass_name), (ours, seq, pass_name))

    def growth(self, ours: str, what: str, pass_name: str) -> float | None:
        """How "seconds" or "extra_bytes" grow over four times the length."""
        return self._ratio(what, (ours, 65_536, pass_name), (ours, 16_384, pass_name))

    def share(self, seconds: float, ours: str, seq: int) -> float | None:
        """`seconds` as a share of one forward call of ours."""
        row = self._rows.get((ours, seq, FORWARD))
        return None if row is None else seconds / row["seconds"]

    def _ratio(
        self, what: str, above: tuple[str, int, str], below: tuple[str, int, str]
    ) -> float | None:
        large, small = (self._rows.get(key, {}).get(what) for key in (above, below))
        return None if large is None or small is None else large / small


def goals(wanted: list[tuple[str, float | None, str, float]]) -> list[dict[str, Any]]:
    """Print goals and figures; rows are (name, found, ">=" or "<=", limit)."""
    rows = []
    for name, found, sign, limit in wanted:
        row: dict[str, Any] = {"goal": name, "wanted": f"{sign} {limit}", "found": found}
        verdict, figure = "not measured", ""
        if found is not None:
            row["met"] = found >= limit if sign == ">=" else found <= limit
            verdict, figure = "met" if row["met"] else "MISSED", f"{found:.2f}"
        rows.append(row)
        print(f"{name:50} {figure:>6}  wanted {row['wanted']:8} {verdict}")
    return rows


def product_seconds(products: float, multiply: Callable[[int], Callable[[], Any]]) -> float:
    """The time of the products of one forward call at this machine's speed of large matrices.

    Each pair of a query and a key costs head_dim multiplications for its logit, and as many for its
    value. `multiply` makes a call that multiplies two square matrices and waits for the result.
    """
    call = multiply(_RATE_WIDTH)
    seconds = []
    for _ in range(_RATE_CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * products * 2 * HEAD_DIM / _RATE_WIDTH**3


def shares(share: Callable[[int, str], list[float]]) -> dict[str, dict[int, list[float]]]:
    """The share of the causal blocks that each head computes, by inputs and length."""
    return {
        inputs: {seq: share(seq, inputs) for seq in LENGTHS}
        for inputs in ("normal", "trained-like")
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Results with the date and the machine before them."""
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | results, indent=2) + "\n", encoding="utf-8")
