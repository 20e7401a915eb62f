"""How fast attention is on a CUDA device: `python -m benchmarks.attention_gpu`.

FlexAttention over our certified windows (their planning is timed too) beside torch's own kernels:
with the bias as an array, and without any bias. bfloat16, medians of CUDA events, in turns. Where
there is no such device it says so and ends; `--device cpu` tries all but the device on tiny arrays.
"""

from __future__ import annotations

import argparse
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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import alibi_torch
from alibi_spec import slopes as paper_slopes

RESULTS = Path(__file__).parent / "results" / "attention_gpu.json"
HEADS, HEAD_DIMS = 16, (64, 128)
LENGTHS = tuple(2**power for power in range(11, 18))  # 2,048 … 131,072
TINY_LENGTHS = (64, 384)
ROUNDS = 11

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(slopes: Tensor, _seq: int, implementation: str) -> Attend:
    return partial(alibi_torch.attention, slopes=slopes, implementation=implementation)


def _with_bias(slopes: Tensor, seq: int) -> Attend:
    position = torch.arange(seq, device=slopes.device)
    distance = position[:, None] - position
    bias = torch.empty(1, HEADS, seq, seq, dtype=torch.bfloat16, device=slopes.device)
    for head, slope in enumerate(slopes):  # one at a time: in float32 all would not fit
        bias[0, head] = (-slope * distance).masked_fill_(distance < 0, -torch.inf)
    return partial(F.scaled_dot_product_attention, attn_mask=bias)


def _without_bias(_slopes: Tensor, _seq: int, backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


PEERS: dict[str, Callable[[Tensor, int], Attend]] = {
    "alibi_torch, flex": partial(_ours, implementation="flex"),
    "alibi_torch, flash_attn": partial(_ours, implementation="flash_attn"),
    "alibi_torch, blockwise": partial(_ours, implementation="blockwise"),
    "sdpa with a materialised bias": _with_bias,
    "sdpa, causal, no bias, flash": partial(_without_bias, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa, causal, no bias, cuDNN": partial(_without_bias, backend=SDPBackend.CUDNN_ATTENTION),
}


def milliseconds(attend: Attend, arrays: tuple[Tensor, ...], with_gradients: bool) -> float:
    """Of one call, on the clock of its device."""
    leaves = [array.detach().requires_grad_(with_gradients) for array in arrays]
    cotangent = torch.ones_like(arrays[0])

    def call() -> None:
        with torch.set_grad_enabled(with_gradients):
            attended = attend(*leaves)
        if with_gradients:
            attended.backward(cotangent)

    if arrays[0].device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def compared(
    device: str, seq: int, head_dim: int, with_gradients: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row per peer; a row without milliseconds says why it has none."""
    torch.compiler.reset()  # so that every length is compiled for itself
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, HEADS, seq, head_dim)
    arrays = torch.randn(shape, generator=generator, device=device).bfloat16().unbind()
    slopes = torch.from_numpy(paper_slopes(HEADS)).to(device)
    share = alibi_torch.attention_plan(*arrays[:2], slopes).share[0].tolist()
    row = {"seq": seq, "head_dim": head_dim, "gradients": with_gradients, "share_of_blocks": share}
    ready: dict[str, Attend] = {}
    for name, make in PEERS.items():
        try:
            attend = make(slopes, seq)
            milliseconds(attend, arrays, with_gradients)  # compiles
        except (RuntimeError, ValueError) as error:  # no room, no kernel, or refused
            yield row | {"peer": name, "stopped": str(error).splitlines()[0]}
        else:
            ready[name] = attend
    figures: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, attend in ready.items():
            figures[name].append(milliseconds(attend, arrays, with_gradients))
    for name, raw in figures.items():
        yield row | {"peer": name, "milliseconds": statistics.median(raw), "raw": raw}


def machine(device: str) -> dict[str, Any]:
    """The device, its driver, and the libraries."""
    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "alibi-duo": importlib.metadata.version("alibi-duo"),
    }
    if device != "cuda":
        return found | {"device": device}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return found | {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver and power limit": done.stdout.strip(),
    }


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    is_real = options.device == "cuda"
    if is_real and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured")
        return 0
    rows: list[dict[str, Any]] = []
    for head_dim in HEAD_DIMS:
        for seq in LENGTHS if is_real else TINY_LENGTHS:
            for with_gradients in (False, True):
                rounds = ROUNDS if is_real else 2
                for row in compared(options.device, seq, head_dim, with_gradients, rounds):
                    rows.append(row)
                    found = f"{row['milliseconds']:9.3f} ms" if "raw" in row else row["stopped"]
                    passes = "both passes" if with_gradients else "forward"
                    print(f"{row['peer']:30} {seq:6} {head_dim:4} {passes:12} {found}", flush=True)
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(options.device),
        "shape": {"batch": 1, "heads": HEADS, "dtype": "bfloat16", "inputs": "normal numbers"},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
