"""The `alibi` command on checkpoints: exit codes, one error line, JSON; and what a name says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import (
    convert,
    inspect,
    plan,
)
from alibi_convert.conversion import check_target
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.tensors import Tensors
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.checkpoints import CONFIG, assert_holds, make_folder, write


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented exit codes, one error line, and JSON that parses."""
    source = write(tmp_path / "model")
    assert main(["inspect", str(source)]) == 0
    assert "ALiBiLM, alibi-duo (alibi)" in capsys.readouterr().out
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(source)

    destination = tmp_path / "model.msgpack"
    assert main(["convert", str(source), str(destination), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    assert main(["convert", str(source), str(destination)]) == 3
    assert capsys.readouterr().err.startswith(f"error: {destination} exists")
    assert main(["convert", str(source), str(destination), "--overwrite", "--dtype=float16"]) == 0
    assert "largest relative rounding error" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "x.bin"), "--to=msgpack"]) == 2

    assert main(["verify", str(source), str(destination), "--new-tokens=5"]) == 0
    assert "ok   the second checkpoint is the first, cast to float16" in capsys.readouterr().out
    other = write(tmp_path / "other", config=CONFIGS["decoder"])
    assert main(["verify", str(source), str(other)]) == 1
    assert "FAIL both checkpoints hold the same model" in capsys.readouterr().out
    assert main(["verify", str(source), "--new-tokens=5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True

    assert main(["inspect", str(tmp_path / "nothing")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(source)])
    assert usage.value.code == 2


def test_command_line_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a conversion shows apart from its report, and what it can be told to refuse."""
    source, arguments = write(tmp_path / "model"), ["convert", str(tmp_path / "model")]
    assert main([*arguments, str(tmp_path / "a"), "--progress", "--max-shard-size=40KB"]) == 0
    output = capsys.readouterr()
    assert "reading and writing: 100%" in output.err
    assert "checking bits: 100%" in output.err
    lines = output.out.splitlines()
    assert lines[0] == f"{source} (alibi-duo, alibi) -> {tmp_path / 'a'} (alibi)"
    assert lines[1].startswith("36 tensors, 190,848 bytes, ")
    assert sum("  model-0000" in line for line in lines) == 5
    assert lines[-2] == "read back: bitwise as expected"
    assert lines[-1].startswith("outputs not compared: nothing was renamed")
    assert main([*arguments, str(tmp_path / "b"), "--progress", "--json", "--verify=none"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert json.loads(output.out)["verification"]["bitwise"] is False
    with pytest.raises(ValueError, match="verify=True is not known; expected one of logits, bits"):
        convert(source, tmp_path / "e", verify=True)  # pyright: ignore[reportArgumentType]

    parameters = dict(draw_parameters(CONFIG)) | {"lm_head.weight": np.full((101, 48), np.inf)}
    write_folder(make_folder(tmp_path / "inf"), CONFIG, Tensors.of(parameters))
    arguments[1] = str(tmp_path / "inf")
    assert main([*arguments, str(tmp_path / "c")]) == 0
    assert "  NaN or infinite: 4,848 elements of lm_head.weight" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "d"), "--strict-values"]) == 3
    assert "NaN or infinity in 1 tensors: lm_head.weight (4,848); " in capsys.readouterr().err
    assert main([*arguments, "/proc/1/out"]) == 3
    assert capsys.readouterr().err.startswith("error: /proc/1 cannot be written: ")


def test_command_line_configuration(tmp_path: Path) -> None:
    """--config takes the JSON of a configuration, or the config.json of a checkpoint."""
    save_file(dict(draw_parameters(CONFIG)), tmp_path / "mine.safetensors")
    (tmp_path / "plain.json").write_text(CONFIG.to_json())
    folder = write(tmp_path / "model")
    for index, file in enumerate((tmp_path / "plain.json", folder / "config.json")):
        destination = tmp_path / f"out{index}"
        arguments = ["convert", str(tmp_path / "mine.safetensors"), str(destination)]
        assert main(arguments) == 3
        assert main([*arguments, "--config", str(file)]) == 0
        assert_holds(destination, CONFIG)
    assert main([*arguments, "--config", str(tmp_path / "absent.json")]) == 3


def test_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `~` that no shell has replaced is not the name of a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(make_folder(tmp_path / "here"))
    save_file(dict(draw_parameters(CONFIG)), tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(CONFIG.to_json())
    assert main(["convert", "~/mine.safetensors", "~/out", "--config=~/mine.json"]) == 0
    convert("~/out", "~/again")
    assert plan("~/out", "~/again").problems[0].cause == f"{tmp_path / 'again'} exists"
    model = alibi_torch.ALiBiLM.from_pretrained("~/again")
    model.save_pretrained("~/from_torch")
    alibi_flax.save_pretrained("~/from_flax", *alibi_flax.from_pretrained("~/from_torch"))
    made = {"out", "again", "from_torch", "from_flax"}
    assert {path.name for path in tmp_path.iterdir()} == made | {
        "here",
        "mine.safetensors",
        "mine.json",
    }
    assert not list((tmp_path / "here").iterdir())


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"alibi-duo {importlib.metadata.version('alibi-duo')}\n"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "alibi-duo of a checkout that is not installed\n"


def test_a_shell_completes_commands_options_values_and_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As bash itself completes a line by the script that is printed for it."""
    with pytest.raises(SystemExit) as done:
        main(["--print-comp", "bash", "convert"])  # abbreviated, as argparse allows
    assert done.value.code == 0
    script = capsys.readouterr().out
    (tmp_path / "a_model").mkdir()
    for line, expected in (
        ("alibi conv", ["convert"]),
        ("alibi convert --overw", ["--overwrite"]),
        ("alibi convert --to blo", ["bloom"]),
        ("alibi inspect a_m", ["a_model"]),
        ("alibi verify --json a_m", ["a_model"]),
    ):
        words = line.split()
        asks = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_alibi"
        show = 'printf "%s\\n" "${COMPREPLY[@]}"'
        shell = ["bash", "-c", f"{script}\n{asks}\n{show}"]
        ran = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ran.stdout.split() == expected, line


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("model.orbax", "orbax"),
        ("model.pt", "pt"),
        ("bloom-7b1", "alibi"),
        ("v1.5", "alibi"),
        ("mpt-7b.bf16", "alibi"),
        ("checkpoint.step-1000", "alibi"),
        ("model.onnx", None),
        ("weights.h5", None),
        ("model.bin", None),
        ("model.GGUF", None),
        ("model.Safetensors", None),
        ("model.safetensor", None),
        ("model.eqx", None),
    ],
)
def test_suffixes_name_formats(tmp_path: Path, name: str, to: str | None) -> None:
    """What a name says is done, or refused; a dot by itself says nothing."""
    if to is not None:
        assert check_target(tmp_path / name, None, None) == to
        return
    message = (
        r"is not written; expected \.gguf, \.msgpack, \.orbax, \.pt, \.safetensors or a folder's "
        r"name; to="
    )
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path / name, None, None)
    assert check_target(tmp_path / name, "alibi", None) == "alibi"


def test_orbax_by_its_name(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    assert convert(source, tmp_path / "model.orbax").destination_format == "orbax"
    assert main(["convert", str(source), str(tmp_path / "model.onnx")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.orbax"}


@pytest.mark.parametrize("buffered", [False, True])
def test_output_that_nobody_takes(tmp_path: Path, buffered: bool) -> None:
    """A reader that has gone away is no error to report; a full disk is one line."""
    program = [sys.executable, "-m", "alibi_cli"]
    command = [*program, "inspect", str(write(tmp_path / "model"))]
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}

    def run(output: int) -> tuple[int, bytes]:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.PIPE, check=False
        )
        return done.returncode, done.stderr

    read_end, write_end = os.pipe()
    os.close(read_end)
    assert run(write_end) == (141, b"")
    command = [*program, "--print-completion", "bash"]
    assert run(write_end) == (141, b"")
    command = [*program, "inspect", str(tmp_path / "model")]
    os.close(write_end)
    with Path("/dev/full").open("w") as full:
        assert run(full.fileno()) == (3, b"error: [Errno 28] No space left on device\n")
