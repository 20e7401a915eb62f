"""The plan of a conversion is what the conversion then does, and costs no reading."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, plan
from alibi_convert.formats import FORMATS, exported
from alibi_convert.formats.shards import read_tensors
from alibi_convert.planning import Problem
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, parameter_table
from parity_tests.checkpoints import CONFIG, OURS, make_folder, truncate, write


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", OURS)
def test_the_plan_is_what_happens(tmp_path: Path, kind: str, dtype: str | None) -> None:
    source = write(tmp_path / "model")
    destination = (tmp_path / "out").with_suffix(FORMATS[kind].suffix)
    planned = plan(source, destination, to=kind, dtype=dtype, max_shard_size=20_000)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert planned.possible
    assert planned.problems == ()
    report = convert(source, destination, to=kind, dtype=dtype, max_shard_size=20_000)
    for name in ("source", "source_format", "destination_format", "family", "nbytes", "dropped"):
        assert getattr(planned, name) == getattr(report, name), name
    assert planned.config == CONFIG.to_dict()
    rows = {row.name: row.shape for row in parameter_table(CONFIG)}
    assert {name: each.shape for name, each in planned.tensors.items()} == rows
    for name, each in planned.tensors.items():
        assert each.sources == (name,)
        assert (each.source_dtype, each.dtype) == ("float32", dtype or "float32")
        assert each.nbytes == np.prod(each.shape) * (2 if dtype else 4)
    if kind == "alibi":
        assert planned.stored == read_tensors(destination).shapes
        assert planned.files.keys() < report.destination_xxh3.keys()
        index = json.loads((destination / "model.safetensors.index.json").read_text())
        found = {name: file for file, names in planned.files.items() for name in names}
        assert found == index["weight_map"]
    else:
        assert planned.files == {destination.name: list(rows)}


def test_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the tensors would be is looked up."""
    source = write(tmp_path / "model")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(np, "memmap", forbidden)
    assert plan(source, dtype="bfloat16").nbytes == 190_848 // 2
    with pytest.raises(AssertionError, match="a tensor was read"):
        convert(source, tmp_path / "out")


def test_memory_depends_on_the_format(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    whole, streamed = plan(source, to="msgpack"), plan(source, to="alibi")
    assert whole.peak_memory_bytes - streamed.peak_memory_bytes < 2 * whole.nbytes
    config = ALiBiConfig(num_layers=4, d_model=1024, num_heads=8)
    source = write(tmp_path / "larger", config=config)
    whole, streamed = plan(source, to="msgpack"), plan(source, to="alibi")
    largest = max(each.nbytes for each in whole.tensors.values())
    difference = whole.peak_memory_bytes - streamed.peak_memory_bytes
    assert difference == 2 * (whole.nbytes - largest)


def test_problems_and_their_mends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "model", dtype=np.float64)
    existing = write(tmp_path / "existing")

    def problems(*arguments: Any, **options: Any) -> dict[str, tuple[str, bool]]:
        found = plan(source, *arguments, **options)
        assert found.possible == (not any(problem.stops for problem in found.problems))
        return {each.cause: (each.mend, each.stops) for each in found.problems}

    assert problems() == {}
    mend = "choose another name or pass overwrite=True (--overwrite)"
    assert problems(existing) == {f"{existing} exists": (mend, True)}
    assert problems(existing, overwrite=True) == {}
    other = make_folder(tmp_path / "home")
    (other / "thesis.txt").write_text("years of work")
    cause = f"{other} holds other files (thesis.txt)"
    assert problems(other, overwrite=True) == {cause: ("choose another folder", True)}
    narrow = "values of float64 beyond 65504 do not fit float16"
    assert problems(dtype="float16") == {
        narrow: ("choose bfloat16, or see whether it converts", False)
    }
    usage = shutil.disk_usage(tmp_path)._replace(free=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert problems() == {
        "381,696 bytes are needed, 7 are free": ("make room or choose another disk", True)
    }
    monkeypatch.undo()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flax" else find_spec(name)
    )
    cause = "writing msgpack needs flax, which is not installed"
    assert problems(to="msgpack") == {cause: ("pip install 'alibi-duo[flax]'", True)}
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert problems(tmp_path / "out") == {
        f"{tmp_path} cannot be written": ("choose a folder that you may write to", True)
    }
    monkeypatch.undo()
    monkeypatch.setattr("alibi_convert.planning.available_memory", lambda: 4096)
    (cause,) = problems()
    assert cause.endswith("bytes of memory are needed, 4,096 are available")


def test_memory_is_what_the_process_may_still_take() -> None:
    code = """
        import resource
        from alibi_convert.machine import available_memory
        resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
        print(available_memory())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**30


def test_a_configuration_that_the_format_cannot_express(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: ALiBiConfig) -> dict[str, Any]:
        raise CheckpointError("theirs has no num_heads")

    def foreign(_: ALiBiConfig, tensors: Tensors) -> Tensors:
        return tensors

    monkeypatch.setitem(FORMATS, "theirs", exported(refuse, foreign, "theirs"))
    planned = plan(write(tmp_path / "model"), to="theirs")
    assert planned.problems == (
        Problem("theirs has no num_heads", "choose another format", stops=True),
    )
    with pytest.raises(CheckpointError, match="theirs has no num_heads"):
        convert(tmp_path / "model", tmp_path / "out", to="theirs")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 for what would fail, 0 otherwise; the JSON is the plan."""
    source = write(tmp_path / "model")
    arguments = ["plan", str(source), str(tmp_path / "out"), "--dtype=bfloat16"]
    assert main([*arguments, "--max-shard-size=20KB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source} (alibi-duo, alibi) -> alibi"
    row = next(line for line in lines if line.startswith("  lm_head.weight "))
    assert " ".join(row.split()) == "lm_head.weight float32 -> bfloat16 [101, 48] 9,696 bytes"
    assert sum(line.startswith("model-0000") for line in lines) > 3
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = plan(*arguments[1:3], dtype="bfloat16")
    expected = replace(expected, free_disk_bytes=found["free_disk_bytes"])  # others write, too
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert main(["plan", str(source), str(source)]) == 3
    assert "problem: " in capsys.readouterr().out
    assert main(["plan", str(source), str(source), "--overwrite"]) == 0
    assert main(["plan", str(source), "--max-shard-size=much"]) == 2
    truncate(source / "model.safetensors")
    assert main(["plan", str(source)]) == 3
