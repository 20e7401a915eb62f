"""`alibi extrapolate`, small: what is trained, what is read, and an experiment that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alibi_cli.experiments import extrapolation, training
from alibi_cli.experiments.texts import read_documents
from alibi_cli.experiments.torch_models import bits_per_byte, new_model
from alibi_cli.experiments.training import Training, trained
from alibi_cli.main import main
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_within

CONFIG = ALiBiConfig(1, 16, 2, 8, 0.0, vocab_size=256, init_std=0.25)
SMALL = ["--steps=2", "--step-bytes=16", "--layers=1", "--width=16", "--heads=2", "--seeds=2"]
SMALL += ["--processes=1", "--excerpts=2", "--lengths", "8", "4"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty documents; every tenth is long, and the last of those is longest."""
    file = tmp_path / "documents.jsonl"
    texts = [f"{number}: " + "to be or not to be, " * (number % 10 or 20) for number in range(30)]
    texts = [*texts[1:], texts[0]]
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return file


def test_an_experiment_goes_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was stopped has the results of one that was not; every curve is there."""
    arguments = ["extrapolate", *SMALL, f"--text={text}"]
    assert main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    assert "ALiBi, slopes × L/L'" in capsys.readouterr().out
    report = json.loads((tmp_path / "whole" / "results.json").read_text())
    found = {
        (curve["windows"], curve["positions"], curve["training_length"]): curve["bits_per_byte"]
        for curve in report["curves"]
    }
    assert len(found) == 2 * 6 * 2
    for (_, positions, length), losses in found.items():
        factors = (1,) if positions == "learned" else (1, 2, 4, 8, 16)
        assert list(losses) == [str(factor * length) for factor in factors]
        assert all(len(set(of_seeds)) == 2 for of_seeds in losses.values())
    for windows in ("apart", "sliding"):
        alibi, interpolated = (
            found[windows, name, 8] for name in ("ALiBi", "ALiBi, slopes × L/L'")
        )
        assert alibi["8"] == interpolated["8"]
        for factor in (2, 4, 8, 16):
            assert alibi[str(8 * factor)] != interpolated[str(8 * factor)]
    assert found["apart", "ALiBi", 8]["16"] != found["sliding", "ALiBi", 8]["16"]
    assert (tmp_path / "whole" / "extrapolation.png").read_bytes().startswith(b"\x89PNG")

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        models = iter(range(7))
        measured = extrapolation.measured

        def measured_until_stopped(job: extrapolation.Job) -> dict[str, Any]:
            if next(models) == 6:
                raise KeyboardInterrupt
            return measured(job)

        patch.setattr(extrapolation, "measured", measured_until_stopped)
        assert main([*arguments, f"--output={stopped}"]) == 130
    capsys.readouterr()
    assert [file.name for file in stopped.iterdir()] == ["unfinished.json"]
    assert main([*arguments, f"--output={stopped}"]) == 0
    assert "14 of 20 models to train" in capsys.readouterr().out
    assert json.loads((stopped / "results.json").read_text())["curves"] == report["curves"]
    assert {file.name for file in stopped.iterdir()} == {"results.json", "extrapolation.png"}
    assert main([*arguments, f"--output={stopped}"]) == 2
    assert "holds results.json; pass --overwrite" in capsys.readouterr().err


def test_another_experiment_is_not_gone_on_with(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(job: extrapolation.Job) -> dict[str, Any]:
        if job.seed == 1:
            raise KeyboardInterrupt
        loss = {"positions": job.positions, "windows": "apart", "length": 8}
        return {
            "positions": job.positions,
            "training_length": job.length,
            "seed": job.seed,
            "cpu_seconds": 0.0,
            "losses": [loss | {"bits_per_byte": job.experiment.steps}],
        }

    monkeypatch.setattr(extrapolation, "measured", measured)
    arguments = ["extrapolate", *SMALL, f"--text={text}", f"--output={tmp_path}"]
    assert main(arguments) == 130
    capsys.readouterr()
    assert main([*arguments, "--steps=3"]) == 2
    assert "of another experiment, which differs in steps" in capsys.readouterr().err
    assert main([*arguments, "--steps=3", "--seeds=1", "--overwrite"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["curves"]
    assert {loss for curve in found for [loss] in curve["bits_per_byte"].values()} == {3}


def test_texts_that_do_not_serve(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([f"--text={text}", "--lengths=64"], "none of those has the 1,025 bytes"),
        ([f"--text={tmp_path / 'a.md'}"], "is no text; expected .txt, .jsonl"),
        ([f"--text={text}", "--heads=3"], "num_heads=3"),
    ):
        assert main(["extrapolate", *SMALL, *arguments, f"--output={tmp_path}"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "unfinished.json").exists()


def test_documents_are_held_out(text: Path) -> None:
    """Every tenth; those are read from their beginnings, and nobody learns from them."""
    found = read_documents([text], 128, 9)
    assert found.excerpts.shape == (3, 129)
    assert [bytes(row).split(b":")[0] for row in found.excerpts] == [b"10", b"20", b"0"]
    assert len(found.documents) == 27
    assert not {bytes(each).split(b":")[0] for each in found.documents} & {b"0", b"10", b"20"}
    assert read_documents([text], 128, 2).excerpts.shape == (2, 129)


def test_excerpts_are_within_documents() -> None:
    """Every place of every document that is long enough, each as often as any other."""
    documents = [
        np.arange(start, start + size, dtype=np.uint8)
        for start, size in ((0, 9), (20, 4), (40, 12), (80, 10))
    ]
    batches = training._batches(Training("ALiBi", 0, 1e-3, CONFIG, 1, 4000), documents)
    rows = next(batches)
    assert rows.shape == (4000, 9)
    assert np.array_equal(np.diff(rows), np.ones((4000, 8)))
    firsts, counts = np.unique(rows[:, 0], return_counts=True)
    assert firsts.tolist() == [0, 40, 41, 42, 43, 80, 81]
    assert counts.min() > 4000 / 7 * 0.8
    short = training._batches(Training("ALiBi", 0, 1e-3, CONFIG, 1, 1), documents[1:2])
    with pytest.raises(ValueError, match="no document has the 9 bytes"):
        next(short)


@pytest.mark.parametrize("kind", ["ALiBi", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize("stride", [6, 4, 1])
def test_bits_per_byte(kind: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte but the first of an excerpt counts once, read after those of its window."""
    monkeypatch.setattr("alibi_cli.experiments.torch_models.READ_TOGETHER", 16)
    torch.manual_seed(0)
    model = new_model(CONFIG, kind).eval()
    excerpts = np.random.default_rng(0).integers(0, 256, (5, 24), dtype=np.uint8)
    losses = []
    for excerpt in torch.from_numpy(excerpts.astype(np.int64)):
        for target in range(1, 24):
            end = 6 if target <= 6 else min(23, 6 + math.ceil((target - 6) / stride) * stride)
            with torch.inference_mode():
                logits = model(excerpt[None, max(0, end - 6) : target])[0, -1]
            losses.append(-logits.double().log_softmax(0)[excerpt[target]].item() / math.log(2))
    found = bits_per_byte(model, excerpts, 6, stride)
    assert_within(np.float64(found), np.mean(losses), 1e-6, "bits per byte")


def test_learned_positions_are_learned() -> None:
    documents = [np.arange(64, dtype=np.uint8)]
    config = Training("learned", 0, 1e-2, CONFIG, 2, 2)
    model = trained(config, documents)
    torch.manual_seed(0)
    fresh = new_model(CONFIG, "learned").positions.weight
    assert fresh.shape == (8, 16)
    assert (model.positions.weight != fresh).all()
