"""How fast and how exact attention of alibi_flax is here: `python -m benchmarks.attention_flax`.

The peers are JAX's and Flax's own attention, given the bias as a matrix that is made beforehand.
All are compiled first. Memory is the compiler's figure for a call, with the bias that it is given.
Takes half an hour on two cores; `--quick` three minutes.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import alibi_flax
from alibi_flax.kernels.windowed import xla_loops
from alibi_spec import slopes as paper_slopes
from alibi_spec.masks import masked_softmax
from alibi_spec.reference import biased_logits
from benchmarks.compare import (
    BOTH,
    FORWARD,
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

RESULTS = Path(__file__).parent / "results" / "attention_flax.json"
OURS, DENSE = "alibi_flax, blockwise", "alibi_flax, dense"
JAX_NN, FLAX_NN = "jax.nn with a bias", "flax.linen with a bias"
# Seconds. The runtime frees a call's memory only after its result is there. The next call would
# wait for that, and the peers with a bias free gigabytes.
_PAUSE = 0.2


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


def arrays_of(seq: int, dtype: str, inputs: str) -> tuple[Array, ...]:
    """query, key, value [1, seq, HEADS, head_dim]."""
    return tuple(jnp.asarray(x.swapaxes(0, 1)[None], dtype) for x in draw(seq, inputs))


def prepared(peer: str, case: Case) -> Ready | str:
    """One program for one length; the cotangent of its gradients is ones."""
    is_ours, attend = peer in (OURS, DENSE), PEERS[peer]
    bias_bytes = 0 if peer == OURS else 4 * HEADS * case.seq**2  # or the logits of dense
    if bias_bytes > LARGEST_BYTES:
        return f"needs {bias_bytes / 1e9:.0f} GB"
    last = jnp.asarray(paper_slopes(HEADS)) if is_ours else _bias(case.seq)
    arrays = (*arrays_of(case.seq, case.dtype, case.inputs), last)

    def total(*arrays: Array) -> Array:
        return attend(*arrays).astype(jnp.float32).sum()

    function = attend if case.pass_name == FORWARD else jax.grad(total, argnums=(0, 1, 2))
    program = jax.jit(function).lower(*arrays).compile()
    memory = program.memory_analysis()
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes
    needed = extra + (0 if is_ours else bias_bytes)
    if needed > LARGEST_BYTES:
        return f"needs {needed / 1e9:.0f} GB"

    def timed() -> float:
        time.sleep(_PAUSE)
        started = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        return time.perf_counter() - started

    return Ready(timed, lambda: needed)


def _bias(seq: int) -> Array:
    position = np.arange(seq, dtype=np.float32)
    distance = np.abs(position[:, None] - position)
    return jnp.asarray(-paper_slopes(HEADS)[None, :, None, None] * distance)


def errors(seq: int, places: int = 8, rows: int = 64) -> dict[str, float]:
    """Largest error of ours and of dense attention in float32, on rows along a long sequence."""
    query, key, value = arrays_of(seq, "float32", "normal")
    slopes = jnp.asarray(paper_slopes(HEADS))
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


def computed_products(seq: int) -> int:
    """Pairs of a query and a key that one call of ours computes, in all heads."""
    size, slopes = xla_loops.BLOCK_SIZE, jnp.asarray(paper_slopes(HEADS))
    query, key, _ = arrays_of(seq, "float32", "normal")
    plan = alibi_flax.attention_plan(query, key, slopes, block_size=size)
    return int((plan.last - plan.first).sum()) * size**2


def multiply(width: int) -> Callable[[], Any]:
    """A product of two square matrices, which waits for the result."""
    matrix = jnp.ones((width, width))
    product = jax.jit(partial(jnp.matmul, precision="highest"))
    return lambda: jax.block_until_ready(product(matrix, matrix))


def main() -> int:
    """Measure, print and write the results."""
    options = options_of(__doc__, RESULTS)
    rows = table(options, PEERS, (OURS,), prepared)
    error = {} if options.quick else errors(32_768)
    figures, bare = Figures(rows), product_seconds(computed_products(4096), multiply)
    wanted: list[tuple[str, float | None, str, float]] = [
        ("speed, jax.nn, forward, N=4096", figures.speed(OURS, JAX_NN, 4096, FORWARD), ">=", 8),
        ("speed, jax.nn, both passes, N=4096", figures.speed(OURS, JAX_NN, 4096, BOTH), ">=", 6),
        ("time, 16k -> 64k, forward", figures.growth(OURS, "seconds", FORWARD), "<=", 5),
        ("time, 16k -> 64k, both passes", figures.growth(OURS, "seconds", BOTH), "<=", 5),
        ("memory, 16k -> 64k, forward", figures.growth(OURS, "extra_bytes", FORWARD), "<=", 4.2),
        ("memory, 16k -> 64k, both passes", figures.growth(OURS, "extra_bytes", BOTH), "<=", 4.2),
        ("error, dense, N=32768", error[OURS] / error[DENSE] if error else None, "<=", 2),
    ]
    results = {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("alibi-duo", "jax", "flax")},
        "shape": SHAPE,
        "longest_seconds": options.longest,
        "notes": {JAX_NN: "the bias is made beforehand", FLAX_NN: "the bias is made beforehand"},
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
    plan = alibi_flax.attention_plan(query, key, jnp.asarray(paper_slopes(HEADS)))
    return plan.share[0].tolist()


if __name__ == "__main__":
    sys.exit(main())
