"""The scripts of examples/ run, and what they print and leave is what the other backend gives."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alibi_convert import open_checkpoint
from alibi_convert.tensors import as_numpy
from alibi_spec import reference_forward
from alibi_spec.bounds import model_windows
from alibi_spec.budgets import BUDGETS
from alibi_spec.pooling import pooled
from alibi_torch import ALiBiLM, KVCache, generate, token_log_probabilities
from parity_tests.compare import assert_bitwise, assert_within

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def script(name: str) -> dict[str, Any]:
    """What a script defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def printed_tokens(out: str) -> np.ndarray:
    """The numbers of the line "tokens: […]"."""
    (line,) = re.findall(r"^tokens: \[(.*)\]$", out, re.MULTILINE)
    return np.array([int(token) for token in line.split(",")])


def new_tokens(folder: Path, prompt: bytes, count: int, **options: Any) -> np.ndarray:
    """What PyTorch adds to a prompt of bytes, with a cache that keeps everything."""
    model = ALiBiLM.from_pretrained(folder)
    found = generate(model, torch.tensor([list(prompt)]), count, **options)
    return as_numpy(found.tokens)[0, len(prompt) :]


def test_bloom_on_tpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = script("bloom_on_tpu")
    folder = example["drawn_bloom"](tmp_path)
    example["main"](["--folder", str(folder), "--prompt=A bloom", "--new-tokens=6"])
    expected = new_tokens(folder, b"A bloom", 6, **example["SAMPLING"])
    assert len(set(expected.tolist())) > 1
    assert_bitwise(printed_tokens(capsys.readouterr().out), expected, "tokens")
    assert open_checkpoint(folder).family == "bloom"


@pytest.mark.slow
def test_bloom_on_eight_devices(tmp_path: Path) -> None:
    """Weights are divided, and the tokens are those of one device."""
    example = script("bloom_on_tpu")
    folder = example["drawn_bloom"](tmp_path)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(EXAMPLES / "bloom_on_tpu.py"), "--folder", str(folder)]
    environment = os.environ | flags | {"PYTHONPATH": paths}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "8 devices (cpu): {'fsdp': 1, 'tensor': 8}" in run.stdout
    assert "(64, 8, 8), of which each has (64, 1, 8)" in run.stdout
    expected = new_tokens(folder, b"The sea was", 8, **example["SAMPLING"])
    assert_bitwise(printed_tokens(run.stdout), expected, "tokens")


def test_mpt_long_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens of a cache that keeps all; and no more memory than the script says."""
    example = script("mpt_long_context")
    folder = example["drawn_mpt"](tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(b"to and fro, " * 40)
    options = [f"--text={text}", "--new-tokens=5", "--chunk=128"]
    example["main"]([f"--folder={folder}", *options])
    out = capsys.readouterr().out
    expected = new_tokens(folder, text.read_bytes(), 5, **example["SAMPLING"])
    assert_bitwise(printed_tokens(out), expected, "tokens")

    checkpoint = open_checkpoint(folder)
    assert checkpoint.family == "mpt"
    assert "reading 480 tokens, 128 at a time; trained at 128" in out
    windows = model_windows(checkpoint.config, checkpoint.tensors)
    for positions in (1_000, 10_000):
        cache = KVCache.empty(checkpoint.config, 1, positions, windows=windows)
        with torch.no_grad():
            _, cache = ALiBiLM.from_pretrained(folder)(torch.tensor([[1, 2]]), cache=cache)
        held = sum(x.numel() for each in (cache.keys, cache.values) for x in each.values())
        assert f"cache at {positions:,} positions: {held:,} numbers instead of" in out


def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cosines are those of the reference, and the most alike sentence comes first."""
    example = script("embeddings")
    folder = example["drawn_encoder"](tmp_path)
    sentences = ["a cat sat", "rain", "a kitten sat down", "a cat sat"]
    checkpoint = open_checkpoint(folder)
    rows = [np.array([list(sentence.encode())]) for sentence in sentences]
    hidden = [reference_forward(checkpoint.config, checkpoint.tensors, row) for row in rows]
    states = [each["output"] for each in hidden]
    vectors = np.concatenate([pooled(x, np.ones(x.shape[:2], bool)) for x in states])
    exact = vectors @ vectors.T
    found = as_numpy(example["similarities"](folder, sentences, "mean"))
    assert_within(found, exact, BUDGETS["float32", "cpu"].forward, "cosines", dtype="float32")

    example["main"]([*sentences, f"--folder={folder}"])
    first, *lines = capsys.readouterr().out.splitlines()
    order = 1 + np.argsort(-exact[0, 1:])
    expected = [f"{exact[0, place]:8.4f}  {sentences[place]}" for place in order]
    assert (first, lines) == (sentences[0], expected)


@pytest.mark.slow
def test_train_in_jax_serve_in_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls, and three programs generate the same from the two folders."""
    example = script("train_in_jax_serve_in_torch")
    example["main"]([f"--output={tmp_path / 'tuned'}", "--steps=20", "--length=32"])
    out = capsys.readouterr().out
    first, last = map(float, re.findall(r"loss (\d\.\d+)", out))
    assert last < 0.8 * first
    assert "JAX and transformers agree: True" in out
    text = (EXAMPLES / "train_in_jax_serve_in_torch.py").read_bytes()
    for folder in (tmp_path / "tuned/ours", tmp_path / "tuned/bloom"):
        assert_bitwise(printed_tokens(out), new_tokens(folder, text[:16], 16), folder.name)
        model = ALiBiLM.from_pretrained(folder)
        mean = token_log_probabilities(model, torch.tensor([list(text[:500])])).mean()
        assert -float(mean) < 0.8 * first, "what was saved was not trained"


def test_scripts_are_listed_and_small() -> None:
    """README.md and each docstring say how a script is run; each fits a screen or two."""
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+)\.py\)", listed)) == SCRIPTS
    for name in SCRIPTS:
        code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in code
        assert len(code.splitlines()) <= 90
