"""How fast and how exact attention is on this CPU: `python -m benchmarks.attention_torch`.

Memory is what a call holds and adds at its peak, in a process of its own. Takes an hour and a half
on two cores; `--quick` three minutes.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alibi_torch
from alibi_spec import slopes as paper_slopes
from alibi_spec.certificate import BLOCK_SIZE
from alibi_torch.dispatch import attention_plan
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.windowed.tiles import strips_of, windows_of
from benchmarks.compare import (
    BOTH,
    FORWARD,
    HEAD_DIM,
    HEADS,
    LARGEST_BYTES,
    SHAPE,
    Case,
    Figures,
    Ready,
    draw,
    goals,
    options_of,
    product_seconds,
    shares,
    table,
    write,
)
from benchmarks.memory import peak_of_process, print_peak
from benchmarks.peers_torch import PEERS, Attend

RESULTS = Path(__file__).parent / "results" / "attention_torch.json"
OURS, PLAIN, DENSE = "alibi_torch, aten_flash", "sdpa, causal, no bias", "alibi_torch, dense"
MATERIALISED = "sdpa with a materialised bias"
_LIBRARIES = ("alibi-duo", "torch", "transformers", "x-transformers")
# The windows depend on the inputs. Other peers take the same time for all inputs.
FOLLOWS_INPUTS = (OURS, "alibi_torch, blockwise", PLAIN)
_MEASURED = "benchmarks.attention_torch"


def arrays_of(seq: int, dtype: str, inputs: str) -> tuple[Tensor, ...]:
    """query, key, value [1, HEADS, seq, head_dim]."""
    query, key, value = torch.from_numpy(draw(seq, inputs)).to(getattr(torch, dtype))[:, None]
    return query, key, value


def prepared(name: str, case: Case) -> Ready | str:
    """A peer with its inputs."""
    peer, needed = PEERS[name], PEERS[name].squares * HEADS * case.seq**2 * 4
    if not peer.is_installed:
        return f"{peer.needs} is not installed"
    if case.pass_name == BOTH and not peer.has_gradients:
        return "no gradients on the CPU"
    if needed > LARGEST_BYTES:
        return f"needs {needed / 1e9:.0f} GB"
    timed = _call(name, case, arrays_of(case.seq, case.dtype, case.inputs))
    return Ready(timed, lambda: peak_of_process(_MEASURED, name, str(case.seq), *case[1:]))


def _call(name: str, case: Case, arrays: tuple[Tensor, ...]) -> Callable[[], float]:
    slopes, dtype = torch.from_numpy(paper_slopes(HEADS)), getattr(torch, case.dtype)
    torch.compiler.reset()  # or the ninth length of a compiled peer would not be compiled
    attend = PEERS[name].make(slopes, case.seq, dtype)
    return lambda: _seconds(attend, arrays, case.pass_name == BOTH)


def _seconds(attend: Attend, arrays: tuple[Tensor, ...], with_gradients: bool) -> float:
    leaves = [array.detach().requires_grad_(with_gradients) for array in arrays]
    cotangent = torch.ones_like(arrays[0])
    gc.collect()
    started = time.perf_counter()
    with torch.set_grad_enabled(with_gradients):
        attended = attend(*leaves)
    if with_gradients:
        attended.backward(cotangent.reshape(attended.shape))
    return time.perf_counter() - started


def _print_peak(name: str, seq: str, dtype: str, inputs: str, pass_name: str) -> None:
    case = Case(int(seq), dtype, inputs, pass_name)
    arrays = arrays_of(case.seq, dtype, inputs)
    PEERS[name].make(torch.from_numpy(paper_slopes(HEADS)), 8, arrays[0].dtype)  # imports
    print_peak(lambda: _call(name, case, arrays))


def errors(seq: int, places: int = 8, rows: int = 64) -> dict[str, float]:
    """Largest error of ours and of dense attention in float32, on rows along a long sequence."""
    query, key, value = arrays_of(seq, "float32", "normal")
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


def computed_products(seq: int) -> int:
    """Pairs of a query and a key that one call of ours computes, in all heads."""
    query, key, _ = arrays_of(seq, "float32", "normal")
    slopes, options = torch.from_numpy(paper_slopes(HEADS)), (True, HEAD_DIM**-0.5, 0, None, None)
    call = Call(query, key, key, slopes, *options, 2**-24, "absolute", None)
    windows = windows_of(call, BLOCK_SIZE)
    width = max(HEAD_DIM, BLOCK_SIZE)
    strips = strips_of(windows, 0, seq, seq, BLOCK_SIZE, group=1, key_elements=width)
    return sum(strip.products for strip in strips)


def multiply(width: int) -> Callable[[], Any]:
    """A product of two square matrices."""
    matrix = torch.ones(width, width)
    return lambda: matrix @ matrix


def versions() -> dict[str, str | None]:
    """Versions of Python and of the compared libraries; None for absent ones."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    """Measure, print and write the results."""
    if sys.argv[1:2] == ["--peak-of"]:
        _print_peak(*sys.argv[2:])
        return 0
    options = options_of(__doc__, RESULTS)
    rows = table(options, PEERS, FOLLOWS_INPUTS, prepared)
    error = {} if options.quick else errors(32_768)
    figures, bare = Figures(rows), product_seconds(computed_products(4096), multiply)

    def speed(peer: str, seq: int, pass_name: str = FORWARD) -> float | None:
        return figures.speed(OURS, peer, seq, pass_name)

    wanted: list[tuple[str, float | None, str, float]] = [
        ("speed, dense, N=4096", speed(DENSE, 4096), ">=", 12),
        ("speed, materialised, N=4096", speed(MATERIALISED, 4096), ">=", 5),
        ("speed, plain causal, N=4096", speed(PLAIN, 4096), ">=", 0.8),
        ("speed, plain causal, N=32768", speed(PLAIN, 32_768), ">=", 3),
        ("training, plain causal, N=4096", speed(PLAIN, 4096, BOTH), ">=", 0.71),
        ("training, plain causal, N=16384", speed(PLAIN, 16_384, BOTH), ">=", 1),
        ("time, 16k -> 64k, forward", figures.growth(OURS, "seconds", FORWARD), "<=", 5),
        ("time, 16k -> 64k, both passes", figures.growth(OURS, "seconds", BOTH), "<=", 5),
        ("memory, 16k -> 64k, forward", figures.growth(OURS, "extra_bytes", FORWARD), "<=", 4.2),
        ("memory, 16k -> 64k, both passes", figures.growth(OURS, "extra_bytes", BOTH), "<=", 4.2),
        ("error, dense, N=32768", error[OURS] / error[DENSE] if error else None, "<=", 2),
    ]
    results = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "shape": SHAPE,
        "longest_seconds": options.longest,
        "notes": {name: peer.note for name, peer in PEERS.items() if peer.note},
        "goals": goals(wanted),
        "bare_products_of_one_forward": {"seq": 4096, "seconds": bare}
        | {"share_of_ours": figures.share(bare, OURS, 4096)},
        "largest_error": error,
        "share_of_blocks": shares(_share),
        "rows": rows,
    }
    write(options.output, results)
    return 0


def _share(seq: int, inputs: str) -> list[float]:
    query, key, _ = arrays_of(seq, "float32", inputs)
    return attention_plan(query, key, torch.from_numpy(paper_slopes(HEADS))).share[0].tolist()


if __name__ == "__main__":
    sys.exit(main())
