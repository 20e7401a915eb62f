"""Steps of training beside peers on the CPU: `python -m benchmarks.training`.

The default model of jaketae/alibi with our attention and with its own (`benchmarks.training_torch`
holds that), and a language model beside transformers' BLOOM of the same size. Every peer has a
process of its own; they take steps in turns, and figures are medians.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import goals, write
from benchmarks.memory import peak_of_process, print_peak

RESULTS = Path(__file__).parent / "results" / "training.json"
LAYERS, WIDTH, HEADS, VOCABULARY = 12, 512, 8, 8000
THREADS, ROUNDS = 2, 3
# The seed's model: 2,048 embeddings a step, in sequences of this length. The language model: one.
SEED, LM = "seed's model", "language model"
CASES = [(SEED, 256), (SEED, 1024), (SEED, 2048), (LM, 1024), (LM, 4096)]

Step = Callable[[], Any]


def ours_torch(model: str, seq: int) -> Step:
    """Ours in PyTorch."""
    import torch

    from alibi_spec import ALiBiConfig, Recipe
    from alibi_torch import ALiBiLM, ALiBiTransformer, Trainer

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if model == SEED:
        return _of_embeddings(ALiBiTransformer(ALiBiConfig.jaketae()), seq)
    recipe = Recipe(batch_size=1, max_grad_norm=None)
    trainer, batch = Trainer(ALiBiLM(_config()), recipe), _batch(seq)
    return lambda: float(trainer.step(batch).loss)


def ours_flax(model: str, seq: int) -> Step:
    """Ours in JAX; the seed's model is not trained by it."""
    import jax

    from alibi_flax import ALiBiLM, Trainer
    from alibi_spec import Recipe

    assert model == LM
    lm, batch = ALiBiLM(_config()), _batch(seq)
    params = jax.jit(lm.init)(jax.random.key(0), batch["tokens"][:, :2])["params"]
    trainer = Trainer(lm, params, Recipe(batch_size=1, max_grad_norm=None))
    return lambda: float(trainer.step(batch).loss)


def seed(model: str, seq: int) -> Step:
    """The seed's model as the seed computes it."""
    import torch

    from alibi_spec import ALiBiConfig
    from alibi_torch import ALiBiTransformer
    from benchmarks.training_torch import SeedAttention

    assert model == SEED
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = ALiBiConfig.jaketae()
    transformer = ALiBiTransformer(config)
    for layer in transformer.layers:
        layer.attn = SeedAttention(config, seq)
    return _of_embeddings(transformer, seq)


def transformers(model: str, seq: int) -> Step:
    """BLOOM of transformers."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    assert model == LM
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    lm: Any = BloomForCausalLM(config).train()
    optimizer = torch.optim.AdamW(lm.parameters())
    tokens = torch.from_numpy(_batch(seq)["tokens"])

    def step() -> float:
        loss = lm(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # as ours does: between steps no peer holds gradients
        return loss.item()

    return step


def products(model: str, seq: int) -> Step:
    """The matrix products of the language model's blocks and head, forward and backward."""
    import torch

    assert model == LM
    torch.set_num_threads(THREADS)
    block = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    weights = [torch.randn(shape) for shape in (*(block * LAYERS), (VOCABULARY, WIDTH))]
    widths = {size for weight in weights for size in weight.shape}
    rows = {width: torch.randn(seq, width) for width in widths}

    def step() -> None:
        for weight in weights:
            new, old = weight.shape
            rows[old] @ weight.T  # forward
            rows[new] @ weight  # the gradient of its input
            rows[new].T @ rows[old]  # and of the weight

    return step


PEERS: dict[str, Callable[[str, int], Step]] = {
    "alibi_torch": ours_torch,
    "alibi_flax": ours_flax,
    "seed": seed,
    "transformers": transformers,
    "products": products,
}
OF_MODEL = {
    SEED: ("alibi_torch", "seed"),
    LM: ("alibi_torch", "alibi_flax", "transformers", "products"),
}


def _config() -> Any:
    """BLOOM's, of our size, without dropout."""
    from alibi_spec import ALiBiConfig

    return ALiBiConfig(
        num_layers=LAYERS,
        d_model=WIDTH,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        expansion_factor=4,
        activation="gelu_tanh",
        embedding_norm=True,
        dropout=0.0,
    )


def _batch(seq: int) -> dict[str, np.ndarray]:
    from alibi_spec import next_token_targets

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, seq))
    return {"tokens": tokens, "targets": next_token_targets(tokens)}


def _of_embeddings(model: Any, seq: int) -> Step:
    """A step of a model without a vocabulary, towards random outputs."""
    import torch

    optimizer = torch.optim.AdamW(model.train().parameters())
    x, target = torch.randn(2, 2048 // seq, seq, model.config.d_model)

    def step() -> float:
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def serve(peer: str, model: str, seq: int) -> None:
    """Take a step for each line of the standard input, and answer with its seconds."""
    step = PEERS[peer](model, seq)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - started), flush=True)


def in_turns(model: str, seq: int) -> list[dict[str, Any]]:
    """One row per peer; the first step compiles and allocates."""
    words = ["--serve", model, str(seq)]
    command = [sys.executable, "-m", "benchmarks.training", *words]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {peer: subprocess.Popen([*command, peer], **pipes) for peer in OF_MODEL[model]}
    raw: dict[str, list[float]] = {peer: [] for peer in workers}
    for number in range(ROUNDS + 1):
        for peer, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            seconds = json.loads(worker.stdout.readline())
            if number > 0:
                raw[peer].append(seconds)
    for worker in workers.values():
        worker.communicate()
    rows = []
    for peer, seconds in raw.items():
        row = {"peer": peer, "model": model, "seq": seq, "seconds": statistics.median(seconds)}
        row |= {"raw": seconds, "peak_extra_bytes": None}
        if peer != "products":
            row["peak_extra_bytes"] = peak_of_process("benchmarks.training", peer, model, str(seq))
        rows.append(row)
        megabytes = (row["peak_extra_bytes"] or 0) / 1e6
        print(f"{peer:14} {model} {seq:5} {row['seconds']:7.2f} s {megabytes:7.0f} MB", flush=True)
    return rows


def main() -> int:
    """Measure, print and write the results."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[4], sys.argv[2], int(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["--peak-of"]:
        peer, model, seq = sys.argv[2:]
        step = PEERS[peer](model, int(seq))
        print_peak(lambda: step)  # weights, moments and what is compiled are no part of it
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for case in CASES for row in in_turns(*case)]
    found = {(row["peer"], row["model"], row["seq"]): row for row in rows}

    def ratio(what: str, peer: str, other: str, model: str, seq: int) -> float:
        return found[peer, model, seq][what] / found[other, model, seq][what]

    wanted: list[tuple[str, float | None, str, float]] = []
    for seq, speed, memory in ((1024, 1.15, 0.7), (4096, 2.0, 0.35)):
        case = (LM, seq)
        against = f"alibi_torch against transformers, {seq:,} tokens"
        faster = ratio("seconds", "transformers", "alibi_torch", *case)
        smaller = ratio("peak_extra_bytes", "alibi_torch", "transformers", *case)
        wanted += [(f"{against}: speed", faster, ">=", speed)]
        wanted += [(f"{against}: memory", smaller, "<=", memory)]
    for model, seq in CASES:
        if model == SEED:
            faster = ratio("seconds", "seed", "alibi_torch", model, seq)
            wanted.append((f"alibi_torch against the seed, {seq:,}: speed", faster, ">=", 1.0))
    names = ("alibi-duo", "torch", "jax", "flax", "optax", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    shape = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCABULARY}
    results = {
        "versions": {"python": platform.python_version()} | versions,
        "threads": THREADS,
        "language_model": shape | {"dtype": "float32", "batch": 1},
        "goals": goals(wanted),
        "rows": rows,
    }
    write(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
