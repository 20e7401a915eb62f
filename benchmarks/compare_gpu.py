"""Shared by the benchmarks of attention on a GPU: their cases, turns, and the file of results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare import PASSES

HEADS, HEAD_DIMS = 16, (64, 128)
LENGTHS = tuple(2**power for power in range(11, 18))  # 2,048 … 131,072
TINY_LENGTHS = (64, 384)
ROUNDS, TINY_ROUNDS = 11, 2
LONGEST = 2000.0  # milliseconds that a call may take


class Case(NamedTuple):
    """One way to call every peer: bfloat16, normal numbers, one sequence."""

    seq: int
    head_dim: int
    pass_name: str


# A call, in milliseconds, or why there is none.
Prepare = Callable[[str, Case], Callable[[], float] | str]


def options_of(description: str | None, results: Path) -> argparse.Namespace:
    """The command line of these benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--output", type=Path, default=results)
    return parser.parse_args()


def table(peers: Iterable[str], prepare: Prepare, is_real: bool) -> list[dict[str, Any]]:
    """A row per peer and case; a row without milliseconds says why it has none."""
    rows: list[dict[str, Any]] = []
    last: dict[tuple[str, int, str], float] = {}
    for head_dim in HEAD_DIMS:
        for seq in LENGTHS if is_real else TINY_LENGTHS:
            for pass_name in PASSES:
                case = Case(seq, head_dim, pass_name)
                slow = {
                    peer: f"would take {4 * last[peer, head_dim, pass_name]:.0f} ms"
                    for peer in peers
                    if 4 * last.get((peer, head_dim, pass_name), 0.0) > LONGEST
                }
                rounds = ROUNDS if is_real else TINY_ROUNDS
                for row in _compared(peers, case, slow, prepare, rounds):
                    rows.append(row)
                    if "raw" in row:
                        last[row["peer"], head_dim, pass_name] = row["milliseconds"]
                    found = f"{row['milliseconds']:9.3f} ms" if "raw" in row else row["stopped"]
                    print(
                        f"{row['peer']:32} {seq:6} {head_dim:4} {pass_name:20} {found}", flush=True
                    )
    return rows


def _compared(
    peers: Iterable[str], case: Case, slow: dict[str, str], prepare: Prepare, rounds: int
) -> Iterable[dict[str, Any]]:
    ready: dict[str, Callable[[], float]] = {}
    for peer in peers:
        found = slow.get(peer) or prepare(peer, case)
        if isinstance(found, str):
            yield {"peer": peer} | case._asdict() | {"stopped": found}
        else:
            ready[peer] = found
    raw: dict[str, list[float]] = {peer: [] for peer in ready}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for peer, timed in ready.items():
            if peer not in failed:
                try:
                    raw[peer].append(timed())
                except RuntimeError as error:  # no memory left
                    failed[peer] = str(error).splitlines()[0]
    for peer, figures in raw.items():
        row = {"peer": peer} | case._asdict()
        if peer in failed:
            yield row | {"stopped": failed[peer]}
            continue
        yield row | {"milliseconds": statistics.median(figures), "raw": figures}


def driver() -> str:
    """The driver of an NVIDIA device, and its power limit."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Results with the date and the machine before them."""
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "python": platform.python_version()} | machine,
        "shape": {"batch": 1, "heads": HEADS, "dtype": "bfloat16", "inputs": "normal numbers"},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
