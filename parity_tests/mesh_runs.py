"""A small run of `alibi train`, for what devices and processes make of it."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.numpy import load_file

from alibi_spec.budgets import AGREEMENTS
from parity_tests.compare import assert_within

SETTINGS = """
[model]
num_layers = 2
d_model = 32
num_heads = 4
dropout = 0.0
attention_bias = false
[data]
train = ["a.txt"]
validation = ["a.txt"]
length = 16
[training]
steps = 12
batch_size = 8
learning_rate = 3e-3
warmup_steps = 2
epsilon = 1e-3
[run]
save_every = 4
keep_last = 9
evaluate_every = 6
evaluation_batches = 2
log_every = 1
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


def command(folder: Path, name: str, *more: str) -> list[str]:
    (folder / "run.toml").write_text(SETTINGS, encoding="utf-8")
    (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 40, "utf-8")
    given = [str(folder / "run.toml"), "--output", str(folder / name)]
    return ["train", *given, "--no-plot", "--json", *more]


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        actual, exact = (load_file(each / "step-00000012" / name) for each in (folder, expected))
        assert actual.keys() == exact.keys()
        for key, array in exact.items():
            assert_within(actual[key], array, AGREEMENTS["float32 training"].relative, key)
