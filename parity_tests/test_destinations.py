"""Where a conversion writes: with consent, whole or not at all, read back."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import alibi_torch
from alibi_convert import CheckpointError, MismatchError, convert
from alibi_convert.formats import FORMATS
from alibi_convert.tensors import Tensors
from alibi_convert.writing.layout import sidecar
from alibi_spec import ALiBiConfig
from parity_tests.cases import CONFIGS
from parity_tests.checkpoints import CONFIG, assert_holds, make_folder, write

ROOT = Path(__file__).parent.parent


def test_a_changed_model_is_not_saved(tmp_path: Path) -> None:
    model = alibi_torch.ALiBiLM(CONFIG)
    model.token_embedding = torch.nn.Embedding(20, CONFIG.d_model)
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight  is \[20, 48\]"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_destinations_are_respected(tmp_path: Path) -> None:
    """Existing checkpoints need consent, other people's files are never touched."""
    source = write(tmp_path / "model")
    other = write(tmp_path / "other", config=CONFIGS["decoder"])
    with pytest.raises(CheckpointError, match=r"other exists; .*overwrite=True \(--overwrite\)"):
        convert(source, other)
    assert_holds(other, CONFIGS["decoder"])
    convert(source, other, overwrite=True)
    assert_holds(other, CONFIG)
    convert(source, make_folder(tmp_path / "empty"))
    assert_holds(tmp_path / "empty", CONFIG)

    home = make_folder(tmp_path / "home")
    (home / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"holds other files \(thesis\.txt\); choose"):
            convert(source, home, overwrite=overwrite)
    beside = sidecar(tmp_path / "model.msgpack")
    beside.write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.msgpack\.json exists"):
        convert(source, tmp_path / "model.msgpack")
    assert beside.read_text() == "mine"
    assert not (tmp_path / "model.msgpack").exists()
    with pytest.raises(
        ValueError, match=r"does not end in \.msgpack, the suffix of format msgpack"
    ):
        convert(source, tmp_path / "model.bin", to="msgpack")
    with pytest.raises(ValueError, match="to='onnx' is not known; expected one of alibi, "):
        convert(source, tmp_path / "model.onnx", to="onnx")
    with pytest.raises(ValueError, match=r"model\.pth: \.pth is not written; expected .*\.pt"):
        convert(source, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        convert(source, tmp_path / "small", dtype="int8")


def test_folders_that_only_look_like_ours(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    thesis = make_folder(make_folder(tmp_path / "home") / "params") / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds other files \(params\)"):
        convert(source, tmp_path / "home", overwrite=True)
    assert thesis.exists()


def test_nothing_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up half way leaves the source, the old destination and no debris."""
    source = write(tmp_path / "model")
    old = write(tmp_path / "old", config=CONFIGS["decoder"])

    def full_disk(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alibi_convert.formats.shards.write_safetensors", full_disk)
    message = (
        r"cannot be written: No space left on device; 190,848 bytes are needed, [\d,]+ are free"
    )
    for destination in (old, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=message):
            convert(source, destination, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old"]
    assert_holds(old, CONFIGS["decoder"])


@pytest.mark.parametrize("kind", ["pt", "msgpack", "orbax"])
def test_a_disk_that_fills_up_under_other_libraries(tmp_path: Path, kind: str) -> None:
    """In a process of its own: orbax's threads go on failing after the call."""
    source = write(tmp_path / "model")
    destination = (tmp_path / "new").with_suffix(FORMATS[kind].suffix)
    code = f"""
        import resource
        from alibi_convert import CheckpointError, convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            convert({str(source)!r}, {str(destination)!r}, {kind!r})
        except CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(r"new.* cannot be written: File too large", done.stdout), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failures_leave_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "model")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alibi_convert.formats.shards.write_safetensors", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source, tmp_path / "new" / "deep" / "result")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["old", "old.msgpack"])
def test_what_was_there_comes_back_when_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The last rename fails: the old checkpoint, and the configuration beside it, are as before."""
    source = write(tmp_path / "model")
    kind = "msgpack" if target.endswith("msgpack") else "alibi"
    old = write(tmp_path / "old", kind, config=CONFIGS["decoder"])
    before = {path.name for path in tmp_path.iterdir()}
    rename = os.replace

    def failing(origin: Any, destination: Any) -> None:
        if Path(destination) == old and "replaced" not in str(origin):
            raise OSError(5, "Input/output error")
        rename(origin, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"):
        convert(source, old, overwrite=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == before
    assert_holds(old, CONFIGS["decoder"])


def test_a_wrong_write_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination is read back: one flipped bit on the way and it never appears."""
    source = write(tmp_path / "model")
    save = FORMATS["safetensors"].write

    def corrupting(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
        hashes = save(path, config, tensors)
        contents = bytearray(path.read_bytes())
        contents[-5] ^= 1
        path.write_bytes(contents)
        return hashes

    corrupted = dataclasses.replace(FORMATS["safetensors"], write=corrupting)
    monkeypatch.setitem(FORMATS, "safetensors", corrupted)
    with pytest.raises(MismatchError, match=r"copy.*\.(weight|bias)\[.*\] is .*, expected"):
        convert(source, tmp_path / "copy.safetensors")
    assert not (tmp_path / "copy.safetensors").exists()
    convert(source, tmp_path / "copy.safetensors", verify="none")
