"""jaketae/alibi: its forward pass, plainly derived again, against `ALiBiConfig.jaketae`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, inspect, open_checkpoint
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_within

LAYERS, WIDTH, MAX_LEN = 2, 36, 128
each_model = pytest.mark.parametrize(
    ("num_heads", "causal"), [(4, True), (4, False), (6, True), (3, False), (1, True)]
)


def seed_state(num_heads: int, causal: bool, expansion_factor: int = 2) -> dict[str, np.ndarray]:
    """A state dict with the seed's keys, shapes and buffers, and random values."""
    rng = np.random.default_rng(0)
    hidden = WIDTH * expansion_factor
    state: dict[str, np.ndarray] = {}
    for index in range(LAYERS):
        layer = f"layers.{index}"
        for norm in ("ffn_norm", "attn_norm"):
            state[f"{layer}.{norm}.weight"] = 1 + 0.3 * rng.standard_normal(WIDTH)
            state[f"{layer}.{norm}.bias"] = 0.3 * rng.standard_normal(WIDTH)
        for name, rows, columns in (("fc1", hidden, WIDTH), ("fc2", WIDTH, hidden)):
            weight = rng.standard_normal((rows, columns)) / math.sqrt(columns)
            state[f"{layer}.ffn.{name}.weight"] = weight
            state[f"{layer}.ffn.{name}.bias"] = 0.3 * rng.standard_normal(rows)
        ratio = (2**8) ** (1 / num_heads)
        slopes = np.array([1 / ratio ** (head + 1) for head in range(num_heads)])
        state[f"{layer}.attn.m"] = slopes.reshape(num_heads, 1, 1)
        state[f"{layer}.attn.kqv.weight"] = rng.standard_normal((3 * WIDTH, WIDTH)) / 3
        if causal:
            state[f"{layer}.attn.mask"] = np.tril(np.ones((1, 1, MAX_LEN, MAX_LEN)))
    return {name: array.astype(np.float32) for name, array in state.items()}


def seed_forward(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The seed in evaluation mode, one sequence and one head at a time, in float64."""
    weights = {name: array.astype(np.float64) for name, array in state.items()}
    outputs = []
    for hidden in x.astype(np.float64):
        for index in range(LAYERS):
            layer = f"layers.{index}"
            hidden = hidden + _seed_attention(weights, layer, _norm(weights, layer, "attn", hidden))
            inner = _norm(weights, layer, "ffn", hidden) @ weights[f"{layer}.ffn.fc1.weight"].T
            inner = inner + weights[f"{layer}.ffn.fc1.bias"]
            erf = np.array([math.erf(v / math.sqrt(2)) for v in inner.ravel()]).reshape(inner.shape)
            inner = inner * 0.5 * (1 + erf)
            hidden = hidden + inner @ weights[f"{layer}.ffn.fc2.weight"].T
            hidden = hidden + weights[f"{layer}.ffn.fc2.bias"]
        outputs.append(hidden)
    return np.stack(outputs)


def _norm(weights: dict[str, np.ndarray], layer: str, which: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normed = (x - mean) / np.sqrt(variance + 1e-5)
    name = f"{layer}.{which}_norm"
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _seed_attention(weights: dict[str, np.ndarray], layer: str, x: np.ndarray) -> np.ndarray:
    key, query, value = np.split(x @ weights[f"{layer}.attn.kqv.weight"].T, 3, axis=-1)
    slopes = weights[f"{layer}.attn.m"].ravel()
    causal = f"{layer}.attn.mask" in weights
    seq, head_dim = len(x), WIDTH // len(slopes)
    positions = np.arange(seq)
    bias = positions[None, :] - positions[:, None]  # key minus query, also for later keys
    heads = []
    for head, slope in enumerate(slopes):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(WIDTH) + slope * bias
        if causal:
            scores = np.where(bias > 0, -np.inf, scores)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(exponentials / exponentials.sum(-1, keepdims=True) @ value[:, columns])
    return np.concatenate(heads, axis=-1)


@each_model
def test_both_backends_are_the_seed(tmp_path: Path, num_heads: int, causal: bool) -> None:
    """From its state dict on disk to the same outputs, in float64 and at full length."""
    state = seed_state(num_heads, causal)
    save_file(state, tmp_path / "seed.safetensors")
    x = np.random.default_rng(1).standard_normal((3, MAX_LEN, WIDTH))
    expected = seed_forward(state, x)
    limit = BUDGETS["float64", "cpu"].forward

    ours = alibi_torch.ALiBiTransformer.from_pretrained(
        tmp_path / "seed.safetensors", dtype=torch.float64
    )
    assert_within(as_numpy(ours(torch.from_numpy(x))), expected, limit, "torch")
    theirs, params = alibi_flax.from_pretrained(tmp_path / "seed.safetensors", dtype="float64")
    assert_within(np.asarray(theirs.apply({"params": params}, x)), expected, limit, "flax")


@each_model
def test_the_configuration_is_in_the_shapes(tmp_path: Path, num_heads: int, causal: bool) -> None:
    state = seed_state(num_heads, causal, expansion_factor=3)
    torch.save({name: as_torch(array) for name, array in state.items()}, tmp_path / "seed.pt")
    checkpoint = open_checkpoint(tmp_path / "seed.pt", allow_pt=True)
    assert checkpoint.config == ALiBiConfig.jaketae(
        num_layers=LAYERS,
        d_model=WIDTH,
        num_heads=num_heads,
        causal=causal,
        expansion_factor=3,
        max_len=MAX_LEN if causal else 256,
    )
    contents = inspect(tmp_path / "seed.pt", allow_pt=True)
    assert contents["family"] == "jaketae"
    buffers = ["m", "mask"] if causal else ["m"]
    assert set(contents["derived"]) == {
        f"layers.{index}.attn.{name}" for index in range(LAYERS) for name in buffers
    }


def test_what_shapes_cannot_say_may_be_given(tmp_path: Path) -> None:
    save_file(seed_state(4, False), tmp_path / "seed.safetensors")
    config = open_checkpoint(tmp_path / "seed.safetensors").config
    given = dataclasses.replace(config, dropout=0.3, max_len=77)
    assert open_checkpoint(tmp_path / "seed.safetensors", config=given).config == given
    with pytest.raises(CheckpointError, match="the configuration given is not that of"):
        open_checkpoint(tmp_path / "seed.safetensors", config=ALiBiConfig())


def test_it_goes_past_max_len(tmp_path: Path) -> None:
    """What the seed asserts against, and what the method is for."""
    save_file(seed_state(4, True), tmp_path / "seed.safetensors")
    model = alibi_torch.ALiBiTransformer.from_pretrained(tmp_path / "seed.safetensors")
    x = torch.randn(1, 3 * MAX_LEN, WIDTH, generator=torch.Generator().manual_seed(0))
    longer, shorter = model(x), model(x[:, :MAX_LEN])
    limit, what = BUDGETS["float32", "cpu"].forward, "what comes later changes nothing before"
    assert_within(as_numpy(longer[:, :MAX_LEN]), as_numpy(shorter), limit, what)
    assert torch.isfinite(longer).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("layers.1.ffn.fc2.bias"), r"missing +layers\.1\.ffn\.fc2\.bias"),
        (lambda state: state.pop("layers.0.attn.m"), r"without layers\.0\.attn\.m"),
        (
            lambda state: state.update({"layers.1.attn.m": state["layers.1.attn.m"] * 2}),
            r"layers\.1\.attn\.m holds .* not jaketae/alibi's slopes",
        ),
        (lambda state: state.pop("layers.1.attn.m"), r"without layers\.1\.attn\.m"),
        (lambda state: state.pop("layers.1.attn.mask"), r"without layers\.1\.attn\.mask"),
        (
            lambda state: state.update({"layers.1.attn.mask": np.ones((1, 1, 4, 4), np.float32)}),
            r"layers\.1\.attn\.mask is not a causal mask over 128 positions",
        ),
        (
            lambda state: state.update({"layers.0.attn.m": np.zeros((), np.float32)}),
            r"layers\.0\.attn\.m has shape \[\]; expected 3 non-empty axes",
        ),
        (
            lambda state: state.update({"layers.0.ffn.fc1.weight": np.zeros((0, 4), np.float32)}),
            r"fc1\.weight has shape \[0, 4\]; expected 2 non-empty axes",
        ),
        (
            lambda state: state.update({"layers.0.extra": np.zeros(1, np.float32)}),
            r"unexpected +layers\.0\.extra",
        ),
        (
            lambda state: state.update({"layers.1.ffn.fc1.weight": np.zeros((9, 9), np.float32)}),
            r"shape +layers\.1\.ffn\.fc1\.weight  is \[9, 9\]",
        ),
    ],
)
def test_damaged_state_dicts(tmp_path: Path, damage: object, message: str) -> None:
    state = seed_state(4, True)
    damage(state)
    save_file(state, tmp_path / "seed.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "seed.safetensors")
