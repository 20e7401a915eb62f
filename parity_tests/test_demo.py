"""`alibi demo`, small: the main job from text to picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alibi_cli.main import main

SMALL = ["--steps=3", "--length=16", "--batch=2", "--layers=1", "--width=16", "--heads=2"]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is there, both backends agree, and a second run needs consent."""
    output = tmp_path / "demo"
    notes = tmp_path / "demo" / "notes.txt"
    output.mkdir()
    notes.write_text("mine")
    arguments = ["demo", *SMALL, f"--output={output}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "256 tokens, identical" in printed
    assert "every check passed" in printed
    report = json.loads((output / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    curves = {
        (curve["positions"], curve["backend"]): curve["bits_per_byte"]
        for curve in report["bits_per_byte"]
    }
    assert set(curves) == {
        (positions, backend)
        for positions in ("ALiBi", "sinusoidal")
        for backend in ("PyTorch", "Flax")
    }
    for positions in ("ALiBi", "sinusoidal"):
        ours, theirs = curves[positions, "PyTorch"], curves[positions, "Flax"]
        assert list(ours) == list(theirs) == ["16", "32", "64", "128"]
        for length in ours:
            assert abs(ours[length] - theirs[length]) < 1e-5 * ours[length]
    assert (output / "extrapolation.png").read_bytes().startswith(b"\x89PNG")

    assert main(arguments) == 2
    assert "holds alibi, alibi.msgpack, report.json, extrapolation.png; pass --overwrite" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--overwrite"]) == 0
    assert notes.read_text() == "mine"


def test_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be, that is the question. " * 400)
    arguments = ["demo", *SMALL, f"--output={tmp_path / 'demo'}"]
    assert main([*arguments, f"--text={text}"]) == 0
    assert str(text) in capsys.readouterr().out
    text.write_bytes(b"too short")
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


@pytest.mark.parametrize("knob", ["--steps=0", "--batch=-1", "--layers=x"])
def test_impossible_knobs(knob: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["demo", *SMALL, knob, f"--output={tmp_path}"])
    assert usage.value.code == 2
