"""Broken, foreign and unsafe input: one clear error, nothing half-written, nothing lost."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import CheckpointError, MismatchError, convert, open_checkpoint
from alibi_convert.formats import FORMATS, sidecar
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.cases import CONFIGS
from parity_tests.checkpoints import CONFIG, assert_holds, edit, make_folder, truncate, write


def test_pickles_need_consent_and_stay_harmless(tmp_path: Path) -> None:
    """Refused by default; with consent, tensors alone are read and code is not run."""
    path = write(tmp_path / "model", "pt")
    with pytest.raises(CheckpointError, match=r"is a pickle, .* pass allow_pt=True \(--allow-pt\)"):
        open_checkpoint(path)
    assert_holds(path, CONFIG)

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"weight": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        open_checkpoint(tmp_path / "attack.pt", allow_pt=True)
    assert not (tmp_path / "attacked").exists()
    torch.save({"model": {"weight": torch.zeros(1)}, "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors \(model, step\); save the"):
        open_checkpoint(tmp_path / "nested.pt", allow_pt=True)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "msgpack"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "model", kind)
    truncate(path)
    with pytest.raises(CheckpointError, match="is truncated or not"):
        open_checkpoint(path, allow_pt=True)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is truncated or not"):
        open_checkpoint(path, allow_pt=True)


def test_every_truncation_of_a_pickle(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "pt")
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is truncated or not a plain state dict"):
            open_checkpoint(path, allow_pt=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "has no config.json; expected a checkpoint folder",
        ),
        (lambda f: truncate(f / "config.json"), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt_neox"}'),
            r"of no known family \(model_type 'gpt_neox'\); known: alibi-duo, ",
        ),
        (lambda f: edit(f, format_version=2), "format_version 2; this release reads 1"),
        (lambda f: edit(f, num_heads=7), "num_heads=7 does not divide"),
        (lambda f: edit(f, num_head=7), "unknown option 'num_head'"),
        (lambda f: edit(f, num_layers=3), r"16 tensors missing, 0 unexpected"),
        (lambda f: edit(f, tie_embeddings=True), r"unexpected +lm_head\.weight"),
        (lambda f: truncate(f / "model.safetensors"), "is truncated or not safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = write(tmp_path / "model")
    damage(folder)
    for read in (open_checkpoint, alibi_torch.ALiBiLM.from_pretrained, alibi_flax.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"weight_map": {"a": 3}}', "has no weight_map from tensors to file names"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_damaged_indexes(tmp_path: Path, contents: str, message: str) -> None:
    folder = write(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(contents)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_damaged_orbax(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "orbax")
    for path in (folder / "params").rglob("*"):
        if path.is_file() and path.name != "_CHECKPOINT_METADATA":
            path.unlink()
    with pytest.raises(CheckpointError, match="is not a complete orbax checkpoint"):
        open_checkpoint(folder)


def test_params_that_are_no_arrays(tmp_path: Path) -> None:
    from flax import serialization

    tree = {"step": 3, "params": {"kernel": np.zeros(2)}}
    (tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(CheckpointError, match="step is a int, expected an array; give the params"):
        open_checkpoint(tmp_path / "state.msgpack", config=CONFIG)


def test_parameters_are_floating_point(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", dtype=np.int32)
    with pytest.raises(CheckpointError, match=r"\.weight is int32; expected one of"):
        open_checkpoint(folder)


def test_a_changed_model_is_not_saved(tmp_path: Path) -> None:
    model = alibi_torch.ALiBiLM(CONFIG)
    model.token_embedding = torch.nn.Embedding(20, CONFIG.d_model)
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight  is \[20, 48\]"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("config.json", "alibi"),
        ("model.safetensors", "alibi"),
        ("pytorch_model.bin", "alibi"),
        ("model.safetensors", "safetensors"),
        ("model.pt", "pt"),
        ("model.msgpack", "msgpack"),
        ("model.msgpack.json", "msgpack"),
    ],
)
@pytest.mark.parametrize("allow_pt", [False, True])
def test_files_that_git_lfs_has_not_fetched(
    tmp_path: Path, file: str, kind: str, allow_pt: bool
) -> None:
    """The usual end of a clone without git-LFS: the cure is named, not the symptom."""
    path = write(tmp_path / "model", kind)
    target = path / file if path.is_dir() else tmp_path / file
    if file == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
    target.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    if kind == "pt" and not allow_pt:
        with pytest.raises(CheckpointError, match=r"model\.pt is a pointer of git-LFS"):
            open_checkpoint(path)
        return
    message = rf"{re.escape(str(target))} is a pointer of git-LFS, .*; run `git lfs pull` in "
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, allow_pt=allow_pt)


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("flax", ["convert", "SOURCE", "out.msgpack"], "flax"),
        ("orbax.checkpoint", ["convert", "SOURCE", "out", "--to=orbax"], "flax"),
        ("torch", ["convert", "SOURCE", "out.pt"], "torch"),
        ("matplotlib", ["demo"], "demo"),
        ("torch", ["verify", "SOURCE"], "torch"),
    ],
)
def test_missing_extras(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    arguments: list[str],
    extra: str,
) -> None:
    source = write(tmp_path / "model")
    find_spec = importlib.util.find_spec

    def not_installed(name: str) -> Any:
        if name == module and "." in name:  # as when the parent package is missing, too
            raise ModuleNotFoundError(name)
        return None if name == module else find_spec(name)

    monkeypatch.setattr("importlib.util.find_spec", not_installed)
    monkeypatch.chdir(tmp_path)
    assert main([str(source) if each == "SOURCE" else each for each in arguments]) == 2
    assert f"pip install 'alibi-duo[{extra}]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a checkpoint folder or file"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"unknown suffix '\.txt'; expected a folder"):
        open_checkpoint(tmp_path / "notes.txt")
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="carries no configuration"):
        open_checkpoint(tmp_path / "other.safetensors")


def test_wrong_class(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with pytest.raises(ValueError, match="vocab_size=101 describes an ALiBiLM"):
        alibi_torch.ALiBiTransformer.from_pretrained(tmp_path / "model")


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
    with pytest.raises(ValueError, match=r"model\.pth: torch state dicts are written as \.pt or"):
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

    monkeypatch.setattr("alibi_convert.store.write_safetensors", full_disk)
    message = (
        r"cannot be written: No space left on device; 190,848 bytes are needed, [\d,]+ are free"
    )
    for destination in (old, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=message):
            convert(source, destination, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old"]
    assert_holds(old, CONFIGS["decoder"])


def test_failures_leave_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "model")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alibi_convert.store.write_safetensors", full_disk)
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
