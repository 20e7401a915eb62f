"""How fast attention of alibi_flax is on a GPU: `python -m benchmarks.attention_gpu_flax`.

Our kernels and JAX's own attention: cuDNN's, with the bias as an array and without any, and XLA's.
Medians, in turns. Without a GPU it says so and ends; `--device cpu` tests everything except the
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

import jax
import jax.numpy as jnp
from jax import Array

import alibi_flax
from alibi_spec import slopes as paper_slopes
from benchmarks.compare import FORWARD
from benchmarks.compare_gpu import HEADS, Case, driver, options_of, table, write

RESULTS = Path(__file__).parent / "results" / "attention_gpu_flax.json"

Attend = Callable[[Array, Array, Array, Array], Array]  # of query, key, value, slopes or bias


def _ours(query: Array, key: Array, value: Array, slopes: Array, implementation: str) -> Array:
    return alibi_flax.attention(query, key, value, slopes, implementation=implementation)


def _with_bias(query: Array, key: Array, value: Array, bias: Array, implementation: str) -> Array:
    options: Any = {"implementation": implementation}
    return jax.nn.dot_product_attention(query, key, value, bias, is_causal=True, **options)


def _without_bias(query: Array, key: Array, value: Array, _: Array, implementation: str) -> Array:
    options: Any = {"implementation": implementation}
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, **options)


PEERS: dict[str, Attend] = {
    "alibi_flax, pallas_gpu": partial(_ours, implementation="pallas_gpu"),
    "alibi_flax, blockwise": partial(_ours, implementation="blockwise"),
    "jax.nn, bias, cuDNN": partial(_with_bias, implementation="cudnn"),
    "jax.nn, bias, XLA": partial(_with_bias, implementation="xla"),
    "jax.nn, causal, no bias, cuDNN": partial(_without_bias, implementation="cudnn"),
}


def prepared(name: str, case: Case) -> Callable[[], float] | str:
    """A peer, compiled and called once."""
    attend, shape = PEERS[name], (1, case.seq, HEADS, case.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)

    def total(*arrays: Array) -> Array:
        return attend(*arrays).astype(jnp.float32).sum()

    function = attend if case.pass_name == FORWARD else jax.grad(total, argnums=(0, 1, 2))
    try:
        arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        slopes = jnp.asarray(paper_slopes(HEADS))
        last = _bias(case.seq) if "jax.nn, bias" in name else slopes
        timed = partial(_milliseconds, jax.jit(function), (*arrays, last))
        timed()  # compiles
    except (RuntimeError, ValueError, NotImplementedError) as error:  # no room, no kernel, refused
        return str(error).splitlines()[0]
    return timed


@lru_cache(maxsize=1)  # one for all that need it: two can be too large
def _bias(seq: int) -> Array:
    @jax.jit
    def bias(slopes: Array) -> Array:
        position = jnp.arange(seq)
        distance = jnp.abs(position[:, None] - position).astype(jnp.float32)
        return (-slopes[None, :, None, None] * distance).astype(jnp.bfloat16)

    return bias(jnp.asarray(paper_slopes(HEADS)))


def _milliseconds(program: Any, arrays: tuple[Array, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return 1e3 * (time.perf_counter() - started)


def machine(is_real: bool) -> dict[str, Any]:
    """The device, its driver, and the libraries."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "alibi-duo")}
    device = jax.devices()[0].device_kind
    found = versions | {"device": device}
    return found | {"driver and power limit": driver()} if is_real else found


def main() -> int:
    """Measure, print and write the results."""
    options = options_of(__doc__, RESULTS)
    is_real = options.device == "gpu"
    if is_real and jax.default_backend() != "gpu":
        print("JAX sees no GPU: nothing was measured")
        return 0
    found = machine(is_real)
    write(options.output, found, table(PEERS, prepared, is_real))
    return 0


if __name__ == "__main__":
    sys.exit(main())
