"""How long a step of training compiles for models of more layers, scanned and not, on the CPU.

`python -m benchmarks.compile_time`: each program in a process of its own, whose cache is empty.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import alibi_flax
from alibi_flax.training import compiled_step
from benchmarks.compare import write

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
LAYERS = (24, 48, 70)
BATCH, SEQ = 2, 1024  # long enough for the kernel over windows


def seconds(layers: int, scan_layers: bool) -> dict[str, Any]:
    """Of tracing and of compiling one step."""
    config = alibi_flax.ALiBiConfig(
        num_layers=layers, d_model=256, num_heads=4, vocab_size=512, dropout=0.0
    )
    model = alibi_flax.ALiBiLM(config, scan_layers=scan_layers, recompute=True)
    recipe = alibi_flax.Recipe(steps=10, batch_size=BATCH)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), int)))
    params, optimizer = made["params"], alibi_flax.adamw(config, recipe)
    state = jax.eval_shape(optimizer.init, params)
    batch = {name: jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32) for name in ("tokens", "targets")}
    step = compiled_step(*jax.tree.map(lambda _: None, (params, state)))
    started = time.perf_counter()
    lowered = step.lower(model, optimizer, recipe, params, state, batch)
    traced = time.perf_counter()
    lowered.compile()
    return {
        "layers": layers,
        "scanned": scan_layers,
        "tracing": traced - started,
        "compiling": time.perf_counter() - traced,
    }


def main() -> None:
    """Measure each case in turn and write the results, or one and print it."""
    if len(sys.argv) > 1:
        layers, scan_layers = map(int, sys.argv[1:])
        print(json.dumps(seconds(layers, bool(scan_layers))))
        return
    rows = []
    for layers in LAYERS:
        for scan_layers in (0, 1):
            command = [sys.executable, "-m", "benchmarks.compile_time", f"{layers}"]
            done = subprocess.run(
                [*command, f"{scan_layers}"], check=True, stdout=subprocess.PIPE, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    write(RESULTS, {"versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
