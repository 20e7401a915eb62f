"""`alibi demo`, small: the main job from text to picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from alibi_cli.experiments.texts import read_text
from alibi_cli.experiments.torch_models import new_model
from alibi_cli.main import main
from alibi_spec import ALiBiConfig

SMALL = ["--steps=3", "--length=16", "--batch=2", "--layers=1", "--width=16", "--heads=2"]
SMALL += ["--seeds=1", "--processes=1"]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is there, both backends agree, and a second run needs consent."""
    output = tmp_path / "demo"
    notes = tmp_path / "demo" / "notes.txt"
    output.mkdir()
    notes.write_text("mine")
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be, that is the question. " * 400)
    arguments = ["demo", *SMALL, "--seeds=2", f"--output={output}"]
    arguments.append(f"--text={text}")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert str(text) in printed
    assert "256 tokens, identical" in printed
    assert re.search(r"rotary +Flax +\d\.\d{4} ± 0\.\d{4}", printed)
    assert "every check passed" in printed
    report = json.loads((output / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    curves = {(curve["positions"], curve["backend"]): curve for curve in report["bits_per_byte"]}
    kinds = ("ALiBi", "rotary", "sinusoidal")
    assert set(curves) == {(kind, backend) for kind in kinds for backend in ("PyTorch", "Flax")}
    for kind in kinds:
        ours, theirs = curves[kind, "PyTorch"], curves[kind, "Flax"]
        for name in ("bits_per_byte", "mean", "spread"):
            assert list(ours[name]) == list(theirs[name]) == ["16", "32", "64", "128"]
        for length, losses in ours["bits_per_byte"].items():
            assert len(losses) == 2
            assert losses[0] != losses[1]
            for loss, other in zip(losses, theirs["bits_per_byte"][length], strict=True):
                assert abs(loss - other) < 1e-5 * loss
            assert min(losses) < ours["mean"][length] < max(losses)
            assert 0 < ours["spread"][length] < 1
    assert (output / "extrapolation.png").read_bytes().startswith(b"\x89PNG")

    assert main(arguments) == 2
    assert "holds alibi, alibi.msgpack, report.json, extrapolation.png; pass --overwrite" in (
        capsys.readouterr().err
    )
    assert notes.read_text() == "mine"


@pytest.mark.slow
def test_one_process_gives_what_two_give(tmp_path: Path) -> None:
    output, text = tmp_path / "demo", tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be, that is the question. " * 400)
    found = []
    for processes in (1, 2):
        options = ["--seeds=2", f"--processes={processes}", "--overwrite"]
        assert main(["demo", *SMALL, *options, f"--output={output}", f"--text={text}"]) == 0
        (output / "notes.txt").write_text("mine")
        found.append(json.loads((output / "report.json").read_text())["bits_per_byte"])
    assert found[0] == found[1]
    assert (output / "notes.txt").read_text() == "mine"


def test_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"too short")
    assert read_text(None, 512).training_bytes > 1_000_000  # Python's own library
    arguments = ["demo", *SMALL, f"--output={tmp_path / 'demo'}"]
    assert main([*arguments, f"--text={text}", "--overwrite"]) == 2
    assert "has 9 bytes; at least" in capsys.readouterr().err
    assert main([*arguments, f"--text={tmp_path / 'absent'}", "--overwrite"]) == 3


def test_a_folder_of_the_same_name_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed's own clone is called alibi, too."""
    clone = tmp_path / "alibi" / "model.py"
    clone.parent.mkdir()
    clone.write_text("class ALiBiTransformer: ...")
    assert main(["demo", *SMALL, f"--output={tmp_path}", "--overwrite"]) == 3
    assert "holds other files (model.py)" in capsys.readouterr().err
    assert clone.exists()


@pytest.mark.parametrize("option", ["--steps=0", "--batch=-1", "--layers=x"])
def test_impossible_options(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["demo", *SMALL, option, f"--output={tmp_path}"])
    assert usage.value.code == 2


@pytest.mark.parametrize("kind", ["sinusoidal", "rotary", "learned", "none"])
def test_positions_are_told_apart(kind: str) -> None:
    """The compared models see order, as ALiBi does; without positions one layer would not."""
    config = ALiBiConfig(1, 16, 2, 16, 0.0, vocab_size=256, init_std=0.25)
    torch.manual_seed(0)
    model = new_model(config, kind).eval()
    there, back = torch.tensor([[1, 2, 3, 9]]), torch.tensor([[3, 2, 1, 9]])
    difference = (model(there) - model(back))[0, -1].abs().max()
    assert (difference > 1e-3) == (kind != "none")


def test_rotation_is_relative() -> None:
    """Queries times keys depend on the distance alone (Su et al. 2021, eq. 16)."""
    config = ALiBiConfig(1, 16, 2, 16, 0.0, vocab_size=256, init_std=0.25)
    attn = new_model(config, "rotary").transformer.layers[0].attn
    x = torch.randn(1, 1, 16).expand(1, 12, 16)
    query, key = (map_(x).view(12, 2, 8).transpose(0, 1) for map_ in (attn.query, attn.key))
    logits = query @ key.transpose(1, 2)
    shifted = logits[:, 1:, 1:] - logits[:, :-1, :-1]
    assert shifted.abs().max() < 1e-5 * logits.abs().max()
    assert logits.std(dim=2).min() > 1e-3
