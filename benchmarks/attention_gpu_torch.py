"""How fast attention of alibi_torch is on a GPU: `python -m benchmarks.attention_gpu_torch`.

FlexAttention over our certified windows (their planning is timed, too), FlexAttention with only the
bias, and torch's own kernels: with the bias as an array, and without any. Medians of CUDA events,
in turns. Without a CUDA device it says so and ends; `--device cpu` tests everything except the
device, on tiny arrays.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import alibi_torch
from alibi_spec import slopes as paper_slopes
from benchmarks.compare import BOTH
from benchmarks.compare_gpu import HEADS, Case, driver, options_of, table, write
from benchmarks.peers_torch import Attend, compiled_flex

RESULTS = Path(__file__).parent / "results" / "attention_gpu_torch.json"


def _ours(slopes: Tensor, _seq: int, implementation: str) -> Attend:
    return partial(alibi_torch.attention, slopes=slopes, implementation=implementation)


@lru_cache(maxsize=1)  # one for all that need it: two can be too large
def _bias(seq: int, device: torch.device) -> Tensor:
    slopes = torch.from_numpy(paper_slopes(HEADS)).to(device)
    position = torch.arange(seq, device=device)
    distance = position[:, None] - position
    bias = torch.empty(1, HEADS, seq, seq, dtype=torch.bfloat16, device=device)
    for head, slope in enumerate(slopes):  # one at a time: in float32 all would not fit
        bias[0, head] = (-slope * distance).masked_fill_(distance < 0, -torch.inf)
    return bias


def _with_bias(slopes: Tensor, seq: int, backend: SDPBackend) -> Attend:
    return _by(backend, attn_mask=_bias(seq, slopes.device))


def _without_bias(_slopes: Tensor, _seq: int, backend: SDPBackend) -> Attend:
    return _by(backend, is_causal=True)


def _by(backend: SDPBackend, **options: Any) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, **options)

    return attend


PEERS: dict[str, Callable[[Tensor, int], Attend]] = {
    "alibi_torch, flex": partial(_ours, implementation="flex"),
    "alibi_torch, flash_attn": partial(_ours, implementation="flash_attn"),
    "alibi_torch, blockwise": partial(_ours, implementation="blockwise"),
    "FlexAttention": compiled_flex,
    "sdpa, bias, efficient": partial(_with_bias, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa, bias, cuDNN": partial(_with_bias, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa, causal, no bias, flash": partial(_without_bias, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa, causal, no bias, cuDNN": partial(_without_bias, backend=SDPBackend.CUDNN_ATTENTION),
}


def prepared(name: str, case: Case, device: str) -> Callable[[], float] | str:
    """A peer, called once."""
    if name == next(iter(PEERS)):
        torch.compiler.reset()  # so that every case is compiled for itself
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, HEADS, case.seq, case.head_dim)
    arrays = torch.randn(shape, generator=generator, device=device).bfloat16().unbind()
    slopes = torch.from_numpy(paper_slopes(HEADS)).to(device)
    try:
        timed = partial(
            _milliseconds, PEERS[name](slopes, case.seq), arrays, case.pass_name == BOTH
        )
        timed()  # compiles
    except (RuntimeError, ValueError) as error:  # no room, no kernel, or refused
        return str(error).splitlines()[0]
    return timed


def _milliseconds(attend: Attend, arrays: tuple[Tensor, ...], with_gradients: bool) -> float:
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


def machine(is_real: bool) -> dict[str, Any]:
    """The device, its driver, and the libraries."""
    found = {"torch": torch.__version__, "alibi-duo": importlib.metadata.version("alibi-duo")}
    if not is_real:
        return found | {"device": "cpu"}
    return found | {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver and power limit": driver(),
    }


def main() -> int:
    """Measure, print and write the results."""
    options = options_of(__doc__, RESULTS)
    is_real = options.device == "gpu"
    if is_real and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured")
        return 0
    device = "cuda" if is_real else "cpu"
    found = machine(is_real)
    write(options.output, found, table(PEERS, partial(prepared, device=device), is_real))
    return 0


if __name__ == "__main__":
    sys.exit(main())
