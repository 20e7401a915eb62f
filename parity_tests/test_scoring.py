"""Scores of texts: every token counts once, and both backends find the reference's likelihoods."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alibi_cli.commands.score as command
import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from alibi_spec.reference import log_softmax
from alibi_spec.scoring import score_windows
from parity_tests.cases import CONFIGS, SEQ, draw_inputs, draw_mask, draw_parameters
from parity_tests.compare import assert_within

BYTES = ALiBiConfig(num_layers=1, d_model=24, num_heads=3, vocab_size=256, max_len=32)


@given(st.integers(2, 200), st.integers(1, 60), st.data())
def test_every_token_counts_once(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    counted = []
    for number, window in enumerate(score_windows(num_tokens, length, stride)):
        assert 0 <= window.start < window.end <= num_tokens - 1
        assert window.end - window.start <= length
        if number > 0:  # what the first of them sees
            assert window.first - window.start >= min(length - stride + 1, window.first)
        counted += range(window.first, window.end + 1)
    assert counted == list(range(1, num_tokens))


@pytest.mark.parametrize("padding", ["unpadded", "left"])
@pytest.mark.parametrize("config_name", ["lm-tied", "adaptive", "interpolated"])
def test_log_probabilities_are_the_references(config_name: str, padding: str) -> None:
    """Past the chunk in which logits are computed, in both backends; the last token is not read."""
    if config_name == "interpolated":  # only if all but one of the tokens were more than they are
        config = replace(CONFIGS["lm-tied"], slope_interpolation=SEQ - 1)
    else:
        config = CONFIGS[config_name]
    parameters, tokens, mask = draw_parameters(config), draw_inputs(config), draw_mask(padding)
    read, its_mask = tokens[:, :-1], None if mask is None else mask[:, :-1]
    logits = reference_forward(config, parameters, read, its_mask)["logits"]
    exact = np.take_along_axis(log_softmax(logits), tokens[:, 1:, None], 2)[..., 0]
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({name: as_torch(array) for name, array in parameters.items()})
    params = torch_to_flax(model.state_dict(), config)
    given_mask = None if mask is None else torch.tensor(mask)
    ours = alibi_torch.token_log_probabilities(model, torch.tensor(tokens), given_mask)
    theirs = alibi_flax.token_log_probabilities(alibi_flax.ALiBiLM(config), params, tokens, mask)
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(as_numpy(ours), exact, limit, "torch", dtype="float32")
    assert_within(np.asarray(theirs), exact, limit, "flax", dtype="float32")


def _folder(path: Path) -> Path:
    model = alibi_torch.ALiBiLM(BYTES).eval()
    model.load_state_dict({k: as_torch(v) for k, v in draw_parameters(BYTES).items()})
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("stride", [32, 12])
def test_command(stride: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both backends, in batches or not: the likelihoods of the reference, token by token."""
    folder, text = _folder(tmp_path / "model"), tmp_path / "text"
    content = np.random.default_rng(0).integers(0, 256, 150, np.uint8)
    text.write_bytes(content.tobytes())
    expected = 0.0
    for window in score_windows(150, 32, stride):
        tokens = content[window.start : window.end + 1].astype(np.int64)[None]
        logits = reference_forward(BYTES, draw_parameters(BYTES), tokens[:, :-1])["logits"]
        scores = np.take_along_axis(log_softmax(logits), tokens[:, 1:, None], 2)[0, :, 0]
        expected -= scores[window.first - window.start - 1 :].sum()
    for options in ([], ["--backend=flax"], ["--batch-size=1"]):
        command_line = ["score", str(folder), str(text), f"--stride={stride}", "--json", *options]
        assert main(command_line) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tokens"] == 149
        assert math.isclose(found["negative_log_likelihood"], expected, rel_tol=1e-6)
        assert math.isclose(found["perplexity"], math.exp(expected / 149), rel_tol=1e-5)
        assert math.isclose(found["bits_per_byte"], expected / math.log(2) / 150, rel_tol=1e-5)
    assert main(["score", str(folder), str(text), f"--stride={stride}"]) == 0
    assert f"bits per byte: {found['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text, kept = _folder(tmp_path / "model"), tmp_path / "text", tmp_path / "kept.json"
    text.write_bytes(bytes(range(200)))
    command_line = ["score", str(folder), str(text), "--batch-size=1", "--json"]
    assert main(command_line) == 0
    whole = json.loads(capsys.readouterr().out)
    read, torch_of = [], command._torch

    def interrupted(options: object) -> object:
        scored = torch_of(options)

        def call(rows: np.ndarray) -> object:
            if len(read) == 3:
                raise KeyboardInterrupt
            read.append(rows)
            return scored(rows)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(command, "_torch", interrupted)
        assert main([*command_line, f"--resume={kept}"]) == 130
    assert json.loads(kept.read_text())["windows"] == 3
    capsys.readouterr()
    assert main([*command_line, f"--resume={kept}", "--stride=8"]) == 2
    assert "is of another model, text or options" in capsys.readouterr().err
    weights = folder / "model.safetensors"
    before, times = weights.read_bytes(), weights.stat()
    weights.write_bytes(before)  # trained further, say
    assert main([*command_line, f"--resume={kept}"]) == 2
    assert "is of another model, text or options" in capsys.readouterr().err
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main([*command_line, f"--resume={kept}"]) == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert not kept.exists()


def test_what_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = _folder(tmp_path / "model"), tmp_path / "text"
    text.write_bytes(b"x")
    assert main(["score", str(folder), str(text)]) == 2
    assert "a text of 1 tokens has none to predict" in capsys.readouterr().err
    text.write_bytes(b"long enough")
    assert main(["score", str(folder), str(text), "--length=4", "--stride=5"]) == 2
    assert "stride=5 is not valid; expected 1 … length=4" in capsys.readouterr().err
    encoder = ALiBiConfig(num_layers=1, d_model=24, num_heads=3, vocab_size=256, causal=False)
    model, tokens = alibi_torch.ALiBiLM(encoder).eval(), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"an encoder .* predicts no next token"):
        alibi_torch.token_log_probabilities(model, tokens)
    with pytest.raises(ValueError, match=r"an encoder .* predicts no next token"):
        alibi_flax.token_log_probabilities(
            alibi_flax.ALiBiLM(encoder), {}, jnp.zeros((1, 4), jnp.int32)
        )
    with pytest.raises(ValueError, match="expected at least two in a sequence"):
        alibi_torch.token_log_probabilities(alibi_torch.ALiBiLM(BYTES).eval(), tokens[:, :1])
