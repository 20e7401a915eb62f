"""Training steps of our default model in Flax, with and without dropout on probabilities.

`python -m benchmarks.training_flax` says how fast they are and what memory they need (two minutes).
Memory is the compiler's figure for a step, without the model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import optax

from alibi_flax import ALiBiTransformer
from alibi_spec import ALiBiConfig
from benchmarks.compare import goals, write

RESULTS = Path(__file__).parent / "results" / "training_flax.json"
SEQ, LONGEST = 4096, 16_384
ROUNDS = 7
DROPPED, WHOLE = "dropout on probabilities", "no dropout on probabilities"
CONFIGS = {WHOLE: ALiBiConfig(attention_dropout=0.0), DROPPED: ALiBiConfig()}


class TrainingStep:
    """A compiled step of one of `CONFIGS`: forward, backward, and Adam's update."""

    def __init__(self, name: str, seq: int) -> None:
        config = CONFIGS[name]
        model, optimizer = ALiBiTransformer(config), optax.adam(1e-3)
        keys = jax.random.split(jax.random.key(0), 3)
        x, target = (jax.random.normal(key, (1, seq, config.d_model)) for key in keys[:2])

        def step(params: Any, state: Any, rng: jax.Array) -> tuple[Any, Any]:
            def loss(params: Any) -> jax.Array:
                options: Any = {"deterministic": False, "rngs": {"dropout": rng}}
                return ((model.apply({"params": params}, x, **options) - target) ** 2).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params = model.init(keys[2], x[:, :1])["params"]
        self._state = (params, optimizer.init(params))
        self._program = jax.jit(step).lower(*self._state, keys[0]).compile()
        self._steps = 0

    def timed(self) -> float:
        """Take a step; its seconds."""
        self._steps += 1
        rng = jax.random.key(self._steps)
        started = time.perf_counter()
        self._state = jax.block_until_ready(self._program(*self._state, rng))
        return time.perf_counter() - started

    def extra_bytes(self) -> int:
        """The memory of a step, without the model."""
        return self._program.memory_analysis().temp_size_in_bytes


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    steps = {name: TrainingStep(name, SEQ) for name in CONFIGS}
    raw: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            seconds = step.timed()
            if number > 0:  # the first round loads and fills
                raw[name].append(seconds)
    found = {
        name: {
            "seq": SEQ,
            "seconds": statistics.median(raw[name]),
            "raw": raw[name],
            "extra_bytes": step.extra_bytes(),
        }
        for name, step in steps.items()
    }
    longest = TrainingStep(DROPPED, LONGEST).extra_bytes()
    found[DROPPED]["extra_bytes_longest"] = longest
    ratio = found[DROPPED]["seconds"] / found[WHOLE]["seconds"]
    growth = longest / found[DROPPED]["extra_bytes"]
    wanted: list[tuple[str, float | None, str, float]] = [
        ("dropout on probabilities, time, N=4096", ratio, "<=", 1.6),
        ("dropout on probabilities, memory, 4k -> 16k", growth, "<=", 4.2),
    ]
    versions = {name: importlib.metadata.version(name) for name in ("alibi-duo", "jax", "flax")}
    results = {
        "versions": {"python": platform.python_version()} | versions,
        "models": {name: config.to_dict() for name, config in CONFIGS.items()},
        "goals": goals(wanted),
        "training_step": found,
    }
    write(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
