"""How fast and how exact attention is on this CPU: `python -m benchmarks.attention_torch`.

Every peer runs in turns with the others, so that all meet the same machine; figures are medians. A
peer stops where it would hold more than 8 GB or take more than a minute. Takes about an hour on two
cores; `--quick` takes three minutes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alibi_torch
from alibi_spec import slopes as paper_slopes
from alibi_torch.attention import attention_plan
from benchmarks.conversion import machine
from benchmarks.peers_torch import PEERS, Attend, Peer
from benchmarks.seed_torch import profile, training_step

RESULTS = Path(__file__).parent / "results" / "attention_torch.json"
HEADS, HEAD_DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
QUICK_LENGTHS = (512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST_BYTES = 8e9
OURS, PLAIN, DENSE = "alibi_torch, aten_flash", "sdpa, causal, no bias", "alibi_torch, dense"
MATERIALISED = "sdpa with a materialised bias"
BOTH = "forward and backward"
_LIBRARIES = ("alibi-duo", "torch", "transformers", "x-transformers")
# The windows follow the inputs. Other peers take the same time for all.
FOLLOWS_INPUTS = (OURS, "alibi_torch, blockwise", PLAIN)


def draw(seq: int, dtype: torch.dtype, inputs: str) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [1, HEADS, seq, HEAD_DIM]: normal numbers, or more like trained ones.

    Trained keys have a large part in common, on which queries lean, and first tokens that all look
    at: norms are larger than normal numbers give them, logits more spread.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, HEADS, seq, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator)
    if inputs == "trained-like":
        common = torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator)
        query, key = 1.2 * query - 0.5 * common, key + common
        key[:, :, :4] -= 2 * common
    return query.to(dtype), key.to(dtype), value.to(dtype)


def timed(attend: Attend, arrays: tuple[Tensor, ...], with_gradients: bool) -> float:
    """Seconds of one call."""
    leaves = [array.detach().requires_grad_(with_gradients) for array in arrays]
    cotangent = torch.ones_like(arrays[0])
    gc.collect()
    started = time.perf_counter()
    with torch.set_grad_enabled(with_gradients):
        attended = attend(*leaves)
    if with_gradients:
        attended.backward(cotangent.reshape(attended.shape))
    return time.perf_counter() - started


def compared(
    peers: dict[str, Peer],
    lengths: tuple[int, ...],
    dtype: str,
    inputs: str,
    with_gradients: bool,
    longest: float,
) -> Iterator[dict[str, Any]]:
    """A row per peer and length, shortest first; a row without seconds says why it has none."""
    pass_name = BOTH if with_gradients else "forward"
    last: dict[str, float] = {}
    stopped: set[str] = set()
    for seq in lengths:
        arrays, ready = draw(seq, DTYPES[dtype], inputs), {}
        for name, peer in peers.items():
            row = {"peer": name, "seq": seq, "dtype": dtype, "inputs": inputs, "pass": pass_name}
            reason = _unable(peer, seq, with_gradients, last.get(name, 0.0), longest)
            if reason is not None:
                if name not in stopped:
                    yield row | {"stopped": reason}
                stopped.add(name)
                continue
            ready[name] = peer.make(torch.from_numpy(paper_slopes(HEADS)), seq, DTYPES[dtype])
            first = timed(ready[name], arrays, with_gradients)  # compiles, fills caches
            last[name] = first
        slowest = max((last[name] for name in ready), default=0.0)
        rounds = 9 if slowest < 1 else 5 if slowest < 5 else 3
        figures: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, attend in ready.items():
                figures[name].append(timed(attend, arrays, with_gradients))
        for name, seconds in figures.items():
            last[name] = statistics.median(seconds)
            row = {"peer": name, "seq": seq, "dtype": dtype, "inputs": inputs, "pass": pass_name}
            yield row | {"seconds": last[name], "raw": seconds}


def _unable(peer: Peer, seq: int, with_gradients: bool, last: float, longest: float) -> str | None:
    if not peer.is_installed:
        return f"{peer.needs} is not installed"
    if with_gradients and not peer.has_gradients:
        return "no gradients on the CPU"
    if peer.squares * HEADS * seq**2 * 4 > LARGEST_BYTES:
        return f"needs {peer.squares * HEADS * seq**2 * 4 / 1e9:.0f} GB"
    if 4 * last > longest:
        return f"would take {4 * last:.0f} s"
    return None


def errors(seq: int, places: int = 8, rows: int = 64) -> dict[str, float]:
    """Largest error of ours and of dense attention in float32, on rows along a long sequence."""
    query, key, value = draw(seq, torch.float32, "normal")
    slopes = torch.from_numpy(paper_slopes(HEADS))
    attended = alibi_torch.attention(query, key, value, slopes, implementation="aten_flash")
    largest = {OURS: 0.0, DENSE: 0.0}
    for end in torch.linspace(rows, seq, places).long().tolist():
        q, k, v = query[:, :, end - rows : end], key[:, :, :end], value[:, :, :end]
        dense = alibi_torch.attention(q, k, v, slopes, implementation="dense")
        q, k, v = q.double(), k.double(), v.double()
        exact = alibi_torch.attention(q, k, v, slopes, implementation="dense")
        for name, found in ((OURS, attended[:, :, end - rows : end]), (DENSE, dense)):
            largest[name] = max(largest[name], float((found - exact).abs().max()))
    return largest


def peak_extra_bytes(*what: str) -> int:
    """Memory that a call of ours, or a training step, adds at its peak, in a process of its own.

    `what` is "forward" or "forward and backward" and a length, or "step" and whose attention.
    """
    command = [sys.executable, "-m", "benchmarks.attention_torch", "--peak-of", *what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak(what: str, which: str) -> None:
    # What is loaded and begun once is no part of a peak.
    if what == "step":
        training_step(which, seq=512)()
        run = training_step(which)
    else:
        attend = PEERS[OURS].make(torch.from_numpy(paper_slopes(HEADS)), 512, torch.float32)
        timed(attend, draw(512, torch.float32, "normal"), with_gradients=True)
        arrays = draw(int(which), torch.float32, "normal")
        run = partial(timed, attend, arrays, with_gradients=what == BOTH)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status_bytes("VmRSS")
    run()
    print(_status_bytes("VmHWM") - before)


def seed_steps(rounds: int = 5) -> dict[str, Any]:
    """A training step of jaketae/alibi's default model with its attention and with ours."""
    steps = {name: training_step(name) for name in ("seed", "ours")}
    raw: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            raw[name].append(step())
    return {
        name: {
            "seconds": statistics.median(raw[name][1:]),
            "raw": raw[name][1:],
            "peak_extra_bytes": peak_extra_bytes("step", name),
            "milliseconds_by_operator": profile(step),
        }
        for name, step in steps.items()
    }


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def goals(
    rows: list[dict[str, Any]],
    peaks: dict[str, int],
    error: dict[str, float],
    steps: dict[str, Any],
) -> Any:
    """What was asked of the kernel beside what was found; None where a part was not measured."""

    def seconds(peer: str, seq: int, pass_name: str) -> float:
        for row in rows:
            key = (row["peer"], row["seq"], row["pass"], row["dtype"], row["inputs"])
            if key == (peer, seq, pass_name, "float32", "normal") and "seconds" in row:
                return row["seconds"]
        return float("nan")

    def speed(peer: str, seq: int, pass_name: str = "forward") -> float:
        return seconds(peer, seq, pass_name) / seconds(OURS, seq, pass_name)

    def saving(of: str) -> float:
        return steps["seed"][of] / steps["ours"][of]

    long = 65_536
    growth = seconds(OURS, long, "forward") / seconds(OURS, 16_384, "forward")
    table: list[tuple[str, float, Callable[[float], bool], str]] = [
        ("speed, dense, N=4096", speed(DENSE, 4096), lambda x: x >= 12, ">= 12"),
        ("speed, materialised, N=4096", speed(MATERIALISED, 4096), lambda x: x >= 5, ">= 5"),
        ("speed, plain causal, N=4096", speed(PLAIN, 4096), lambda x: x >= 1 / 1.25, ">= 0.8"),
        ("speed, plain causal, N=32768", speed(PLAIN, 32_768), lambda x: x >= 3, ">= 3"),
        ("training, plain, N=4096", speed(PLAIN, 4096, BOTH), lambda x: x >= 1 / 1.4, ">= 0.71"),
        ("training, plain, N=16384", speed(PLAIN, 16_384, BOTH), lambda x: x > 1, "> 1"),
        ("time, 16k -> 64k", growth, lambda x: x <= 5, "<= 5"),
        ("seed's step, speed, N=2048", saving("seconds"), lambda x: x >= 5, ">= 5"),
        ("seed's step, memory, N=2048", saving("peak_extra_bytes"), lambda x: x >= 5, ">= 5"),
    ]
    if peaks:
        ratio = peaks[f"forward {long}"] / peaks["forward 16384"]
        table.append(("memory, 16k -> 64k", ratio, lambda x: x <= 4.2, "<= 4.2"))
    if error:
        ratio = error[OURS] / error[DENSE]
        table.append(("error, dense, N=32768", ratio, lambda x: x <= 2, "<= 2"))
    return [
        {"goal": name, "wanted": wanted, "found": found, "met": is_met(found)}
        for name, found, is_met, wanted in table
        if found == found
    ]


def versions() -> dict[str, str | None]:
    """Of Python and of the libraries that are compared; None for those that are absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


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
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of is not None:
        _print_peak(*options.peak_of)
        return 0
    peers = {name: peer for name, peer in PEERS.items() if options.only in name}
    ours = {name: peer for name, peer in peers.items() if name in FOLLOWS_INPUTS}
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    plans = [(peers, "float32", "normal")]
    if not (options.quick or options.float32):
        plans += [(peers, "bfloat16", "normal"), (ours, "float32", "trained-like")]
    rows: list[dict[str, Any]] = []
    for which, dtype, inputs in plans:
        for with_gradients in (False, True):
            for row in compared(which, lengths, dtype, inputs, with_gradients, options.longest):
                rows.append(row)
                found = f"{row['seconds'] * 1e3:9.1f} ms" if "seconds" in row else row["stopped"]
                labels = f"{row['peer']:30} {row['seq']:6} {dtype:8} {inputs:12} {row['pass']:20}"
                print(labels, found, flush=True)
    peaks: dict[str, int] = {}
    if not options.quick:
        for which in ("16384", "65536"):
            for what in ("forward", BOTH):
                peaks[f"{what} {which}"] = peak_extra_bytes(what, which)
    error = {} if options.quick else errors(32_768)
    steps = seed_steps(rounds=3 if options.quick else 5)
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"system": platform.platform(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "longest_seconds": options.longest,
        "shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM},
        "notes": {name: peer.note for name, peer in peers.items() if peer.note},
        "goals": goals(rows, peaks, error, steps),
        "training_step_of_jaketae_alibi": steps,
        "peak_extra_bytes": peaks,
        "largest_error": error,
        "share_of_blocks": _shares(lengths),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for goal in results["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['goal']:34} {goal['found']:6.2f}  wanted {goal['wanted']:8} {verdict}")
    return 0


def _shares(lengths: tuple[int, ...]) -> dict[str, dict[int, list[float]]]:
    """Of the causal blocks, what each head computes."""
    slopes = torch.from_numpy(paper_slopes(HEADS))
    return {
        inputs: {
            seq: attention_plan(*draw(seq, torch.float32, inputs)[:2], slopes).share[0].tolist()
            for seq in lengths
        }
        for inputs in ("normal", "trained-like")
    }


if __name__ == "__main__":
    sys.exit(main())
