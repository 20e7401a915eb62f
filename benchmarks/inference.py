"""Reading prompts and continuing them, beside peers, on the CPU: `python -m benchmarks.inference`.

A random BLOOM is written to a folder, which every peer opens in a process of its own: in one their
pools of threads would slow each other down. Peers run in turns; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import draw, goals, write

RESULTS = Path(__file__).parent / "results" / "inference.json"
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 1024, 16, 8000
PROMPT, NEW, BATCHES = 128, 128, (1, 8)
PREFILLS = (2048, 4096)
CONTEXTS = (32_768, 131_072)
THREADS, ROUNDS = 2, 5
PACKED = "alibi_torch, packed weights"

UNTIL_THE_END = ExitStack()  # of `serve`

Generate = Callable[[np.ndarray, int], Any]  # prompts [batch, seq] and how many new tokens


def write_model(folder: Path) -> None:
    """A random BLOOM, and the tokenizer that CTranslate2 asks for."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        torch_dtype="float32",
    )
    BloomForCausalLM(config).save_pretrained(folder)
    words = {f"t{token}": token for token in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "t1", "eos_token": "t2", "unk_token": "t0", "pad_token": "t3"}
    settings = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def alibi_torch(folder: Path, packed: bool = False) -> Generate:
    """Ours in PyTorch."""
    import torch

    from alibi_torch import ALiBiLM, generate
    from alibi_torch.linear import packed_weights

    torch.set_num_threads(THREADS)
    model = ALiBiLM.from_pretrained(folder).eval()
    if packed:
        UNTIL_THE_END.enter_context(packed_weights(model))
    return lambda prompts, new: generate(model, torch.from_numpy(prompts), new).tokens.numpy()


def alibi_flax(folder: Path) -> Generate:
    """Ours in JAX."""
    from alibi_flax import from_pretrained, generate

    model, params = from_pretrained(folder)
    call: Any = generate
    return lambda prompts, new: np.asarray(call(model, params, prompts, new).tokens)


def transformers(folder: Path) -> Generate:
    """`generate` of transformers' BLOOM."""
    import torch
    from transformers import BloomForCausalLM

    torch.set_num_threads(THREADS)
    model: Any = BloomForCausalLM.from_pretrained(folder).eval()

    def run(prompts: np.ndarray, new: int) -> np.ndarray:
        tokens = torch.from_numpy(prompts)
        limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **limits).numpy()

    return run


def ctranslate2(folder: Path) -> Generate:
    """`generate_batch` of CTranslate2."""
    import ctranslate2 as library

    converted = str(folder) + "-ctranslate2"
    if not Path(converted).exists():
        library.converters.TransformersConverter(str(folder)).convert(converted)
    generator = library.Generator(converted, device="cpu", inter_threads=1, intra_threads=THREADS)

    def run(prompts: np.ndarray, new: int) -> np.ndarray:
        words = [[f"t{token}" for token in row] for row in prompts]
        limits = {"max_length": new, "min_length": new, "sampling_topk": 1}
        found = generator.generate_batch(words, include_prompt_in_result=False, **limits)
        new_tokens = np.array([each.sequences_ids[0] for each in found])
        return np.concatenate([prompts, new_tokens], axis=1)

    return run


PEERS: dict[str, Callable[[Path], Generate]] = {
    "alibi_torch": alibi_torch,
    PACKED: partial(alibi_torch, packed=True),
    "alibi_flax": alibi_flax,
    "transformers": transformers,
    "CTranslate2": ctranslate2,
}


def torch_products(seq: int) -> Callable[[], Any]:
    """The matrix products of the blocks, for one prompt, in PyTorch, by the call of the model."""
    import torch

    from alibi_torch.linear import linear

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
    weights = [torch.randn(shape) for shape in shapes]
    inputs = {width: torch.randn(seq, width) for width in (WIDTH, 4 * WIDTH)}
    return lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights]


def flax_products(seq: int) -> Callable[[], Any]:
    """The matrix products of the blocks, for one prompt, in JAX."""
    import jax
    import jax.numpy as jnp

    shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * LAYERS
    weights = [jnp.full(shape, 0.5) for shape in shapes]
    inputs = {width: jnp.full((seq, width), 0.5) for width in (WIDTH, 4 * WIDTH)}
    call = jax.jit(lambda inputs, weights: [inputs[len(weight)] @ weight for weight in weights])
    return lambda: jax.block_until_ready(call(inputs, weights))


PRODUCTS = {"alibi_torch": torch_products, "alibi_flax": flax_products}


def long_steps(context: int) -> dict[str, Callable[[], Any]]:
    """One query against a long context, of 8 heads of 64 with trained-like numbers, in PyTorch."""
    import torch
    import torch.nn.functional as F

    from alibi_spec import ALiBiConfig, slopes
    from alibi_torch import KVCache

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    query, key, value = (torch.from_numpy(array)[None] for array in draw(context, "trained-like"))
    config = ALiBiConfig(num_layers=1, d_model=512, num_heads=8)
    rest = {"slopes": torch.from_numpy(slopes(8)), "causal": True, "scale": 64**-0.5}
    rest |= {"attention_mask": None, "segment_ids": None, "distance": "absolute"}

    def read(cache: KVCache, start: int, end: int) -> tuple[KVCache, Any]:
        cache = cache.grown(cache.config, (1, end - start), None)
        arrays = {"query": query, "key": key, "value": value}
        part = {name: array[:, :, start:end] for name, array in arrays.items()}
        return cache, cache.attend(0, part | rest, "auto")

    cache, last = KVCache.empty(config, 1, context), context - 1
    for start in range(0, last, 8192):
        cache, _ = read(cache, start, min(start + 8192, last))
    distance = torch.arange(1 - context, 1, dtype=torch.float32)
    bias, newest = (
        (rest["slopes"][:, None] * distance)[None, :, None],
        query[:, :, -1:].contiguous(),
    )

    def ours() -> torch.Tensor:
        return read(replace(cache), last, context)[1]

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(newest, key, value, attn_mask=bias)

    torch.testing.assert_close(ours(), sdpa())
    return {"alibi_torch": ours, "scaled_dot_product_attention": sdpa}


def in_turns_here(context: int) -> list[dict[str, Any]]:
    """Rows of `long_steps`: both are PyTorch, in this process."""
    steps = long_steps(context)
    raw: dict[str, list[float]] = {peer: [] for peer in steps}
    for number in range(8 * ROUNDS + 5):
        for peer, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 5:
                raw[peer].append(time.perf_counter() - started)
    rows = []
    for peer, seconds in raw.items():
        row = {"peer": peer, "kind": "step", "batch": 1, "seq": context, "new": 1}
        rows.append(row | {"seconds": statistics.median(seconds), "raw": seconds})
        print(f"{peer:28} step at {context:7,} {rows[-1]['seconds'] * 1e3:9.2f} ms", flush=True)
    return rows


def cache_bytes(checkpoint: Path) -> dict[str, int]:
    """What a cache of one sequence of a checkpoint holds at the longest context."""
    from alibi_cli.commands.windows import cache_bytes as held
    from alibi_convert import open_checkpoint
    from alibi_spec.bounds import model_windows

    source = open_checkpoint(checkpoint)
    windows, longest = model_windows(source.config, source.tensors), CONTEXTS[-1]
    return {
        "with windows": held(source.config, windows, longest),
        "whole": held(source.config, None, longest),
    }


def serve(peer: str, folder: Path) -> None:
    """Answer each line of the standard input, (kind, batch, seq, new), with seconds and tokens."""
    generate = PEERS[peer](folder)
    products: dict[int, Callable[[], Any]] = {}
    for line in sys.stdin:
        kind, batch, seq, new = json.loads(line)
        prompts = np.random.default_rng(seq).integers(4, VOCABULARY, (batch, seq))
        if kind == "products" and seq not in products:
            products[seq] = PRODUCTS[peer](seq)
        started = time.perf_counter()
        result = products[seq]() if kind == "products" else generate(prompts, new)
        seconds = time.perf_counter() - started
        tokens = [] if kind == "products" else result[:, seq:].tolist()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
    UNTIL_THE_END.close()


class Worker:
    """A peer in a process of its own."""

    def __init__(self, peer: str, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.inference", "--serve", peer, str(folder)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)

    def ask(self, kind: str, batch: int, seq: int, new: int) -> dict[str, Any]:
        """The answer of `serve`."""
        stdin: Any = self._process.stdin
        stdout: Any = self._process.stdout
        stdin.write(json.dumps([kind, batch, seq, new]) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def in_turns(
    workers: dict[str, Worker], kind: str, batch: int, seq: int, new: int
) -> list[dict[str, Any]]:
    """A row per peer, and of prompts one of their products.

    The first call of a turn is not timed: it compiles, and takes memory anew that the system was
    given back during the turns of others.
    """
    asked = []
    for peer in workers:
        asked.append((peer, kind))
        if kind == "prefill" and peer in PRODUCTS:  # right after, so that both meet the same load
            asked.append((peer, "products"))
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in asked}
    for _ in range(ROUNDS):
        for peer, part in asked:
            case = (part, batch, seq, new)
            workers[peer].ask(*case)
            answers[peer, part].append(workers[peer].ask(*case))
    rows = []
    for (peer, part), timed in answers.items():
        seconds = [answer["seconds"] for answer in timed]
        row = {"peer": peer, "kind": part, "batch": batch, "seq": seq, "new": new}
        row |= {"seconds": statistics.median(seconds), "raw": seconds}
        if part != "products":
            ours = answers["alibi_torch", kind][0]["tokens"]
            row["same_tokens"] = timed[0]["tokens"] == ours
        print(f"{peer:28} {part:9} {batch} x {seq:5} {row['seconds'] * 1e3:9.1f} ms", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Measure, print and write the results."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--trained", type=Path, help="a checkpoint whose cache is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "bloom"
        write_model(model)
        workers = {peer: Worker(peer, model) for peer in PEERS}
        rows = [row for batch in BATCHES for row in in_turns(workers, "decode", batch, PROMPT, NEW)]
        workers.pop(PACKED).close()  # of one long prompt it is the same
        for seq in PREFILLS:
            rows += in_turns(workers, "prefill", 1, seq, 1)
        for worker in workers.values():
            worker.close()
    for context in CONTEXTS:
        rows += in_turns_here(context)
    seconds = {(row["peer"], row["kind"], row["batch"], row["seq"]): row["seconds"] for row in rows}

    def faster(peer: str, other: str, batch: int) -> float:
        case = ("decode", batch, PROMPT)
        return seconds[(other, *case)] / seconds[(peer, *case)]

    wanted: list[tuple[str, float | None, str, float]] = []
    for batch, least, best in zip(BATCHES, (1.5, 2.0), ("alibi_torch", PACKED), strict=True):
        for ours, peer, limit in (
            (best, "transformers", least),
            (best, "CTranslate2", 0.9),
            ("alibi_flax", best, 0.8),
        ):
            found = faster(ours, peer, batch)
            wanted.append((f"{ours} against {peer}, batch {batch}", found, ">=", limit))
    for seq in PREFILLS:
        for peer in PRODUCTS:
            found = seconds[peer, "prefill", 1, seq] / seconds[peer, "products", 1, seq]
            wanted.append((f"{peer}, prompt of {seq:,}, over products", found, "<=", 1.35))
    for context, least in zip(CONTEXTS, (4, 8), strict=True):
        peer, case = "scaled_dot_product_attention", ("step", 1, context)
        found = seconds[(peer, *case)] / seconds[("alibi_torch", *case)]
        wanted.append((f"a step at {context:,} against SDPA over all keys", found, ">=", least))
    held = None if options.trained is None else cache_bytes(options.trained)
    if held is not None:
        found = held["with windows"] / held["whole"]
        wanted.append((f"the demo's cache at {CONTEXTS[-1]:,}, with windows", found, "<=", 0.125))
    names = ("alibi-duo", "torch", "jax", "flax", "transformers", "ctranslate2")
    versions = {name: importlib.metadata.version(name) for name in names}
    model_shape = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCABULARY}
    results = {
        "versions": {"python": platform.python_version()} | versions,
        "threads": THREADS,
        "model": model_shape | {"dtype": "float32"},
        "goals": goals(wanted),
        "cache_bytes": held,
        "rows": rows,
    }
    write(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
