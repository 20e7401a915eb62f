"""Broken and foreign input: one clear error, and nothing written.

Pickles: test_damaged_pickles.py; destinations: test_destinations.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.formats.config_file import config_json
from alibi_convert.formats.shards import read_tensors
from alibi_convert.writing.layout import sidecar
from parity_tests.checkpoints import CONFIG, assert_holds, edit, make_folder, truncate, write


@pytest.mark.timeout(60)
def test_only_regular_files(tmp_path: Path) -> None:
    """A pipe would be waited for, a device never ends; a link to a file is one."""
    folder, file = write(tmp_path / "model"), write(tmp_path / "model", "pt")
    files = [folder / "config.json", folder / "model.safetensors", file, sidecar(file)]
    for path in files:
        os.rename(path, tmp_path / "kept")
        source = folder if path.parent == folder else file
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match=f"{path.name} is a pipe, expected a regular"):
            open_checkpoint(source, allow_pt=True)
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match=f"{path.name} is a device, expected a regular"):
            open_checkpoint(source, allow_pt=True)
        path.unlink()
        path.symlink_to(tmp_path / "kept")
        open_checkpoint(source, allow_pt=True)
        path.unlink()
        os.rename(tmp_path / "kept", path)


def test_sparse_files_are_not_read_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    for name in ("config.json", "model.safetensors.index.json"):
        with (folder / name).open("ab") as file:
            file.truncate(2**33)
        with pytest.raises(CheckpointError, match=f"{name} has 8,589,9.* bytes; expected at"):
            open_checkpoint(folder)
        (folder / name).unlink()
        (folder / "config.json").write_text(config_json(CONFIG))
    for name in ("model.pt", "model.msgpack", "model.safetensors", "model.gguf"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**33)
        with pytest.raises(CheckpointError, match="is truncated or not"):
            open_checkpoint(tmp_path / name, config=CONFIG, allow_pt=True)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "msgpack", "gguf"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "model", kind)
    truncate(path)
    with pytest.raises(CheckpointError, match="is truncated or not"):
        open_checkpoint(path, allow_pt=True)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is truncated or not"):
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
        (lambda f: edit(f, tie_embeddings=True), r"lm_head\.weight and token_.* must be the same"),
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
    ("name", "message"),
    [
        ("transformer.h.0.mlp.dense_h_to_4h.qweight", "quantised by GPTQ or AWQ .*; save it deq"),
        ("transformer.h.0.mlp.dense_h_to_4h.weight.absmax", "quantised by bitsandbytes"),
        (
            "transformer.h.0.mlp.dense_h_to_4h.weight.quant_state.bitsandbytes__nf4",
            "quantised by bitsandbytes",
        ),
        ("transformer.h.0.mlp.dense_h_to_4h.SCB", "quantised by bitsandbytes"),
        ("transformer.h.0.mlp.dense_h_to_4h.weight_scale", "is quantised"),
        (
            "base_model.model.h.0.query_key_value.lora_A.weight",
            "holds an adapter .*; open its base model with adapter=",
        ),
        (
            "base_model.model.wte.lora_embedding_B.default",
            "holds an adapter .*; open its base model with adapter=",
        ),
    ],
)
def test_what_holds_no_model_as_it_is(tmp_path: Path, name: str, message: str) -> None:
    """Quantised weights and adapters, each by its name and with the way out."""
    folder = write(tmp_path / "model")
    stored = {key: array.copy() for key, array in read_tensors(folder).items()}
    save_file(stored | {name: np.zeros(4, np.uint8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_adapters_without_their_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/bloom"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for config in (None, "{}"):
        if config is not None:
            (folder / "config.json").write_text(config)
        with pytest.raises(
            CheckpointError, match=r"only an adapter, for 'org/bloom'; open that .*--adapter"
        ):
            open_checkpoint(folder)


def test_shards_without_an_index(tmp_path: Path) -> None:
    """Their numbers tell whether all are there."""
    whole = write(tmp_path / "whole")
    folder = tmp_path / "shards"
    convert(whole, folder, max_shard_size=60_000, verify="none")
    (folder / "model.safetensors.index.json").unlink()
    assert_holds(folder, CONFIG)
    count = len(list(folder.glob("model-*.safetensors")))
    first, second = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in (1, 2))
    (folder / second).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=f"has {first} and no {second}; the checkpoint is in"):
        open_checkpoint(folder)
    shutil.copy(folder / first, folder / second)
    with pytest.raises(CheckpointError, match=rf"{second} holds \S+ a second time; remove one"):
        open_checkpoint(folder)
    (folder / "elsewhere").rename(folder / second)
    shutil.copy(folder / first, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has shards of several checkpoints .*; remove those"
    ):
        open_checkpoint(folder)


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


@pytest.mark.parametrize("size", [0, 2**20])
def test_damaged_orbax_manifests(tmp_path: Path, size: int) -> None:
    """tensorstore takes gigabytes over large ones, and may end the process over zeros."""
    folder = write(tmp_path / "model", "orbax")
    for path in (folder / "params").rglob("manifest.ocdbt"):
        contents = path.read_bytes()
        path.write_bytes(bytes(len(contents)) if size == 0 else contents)
        os.truncate(path, path.stat().st_size + size)
        with pytest.raises(
            CheckpointError, match=r"manifest\.ocdbt (is damaged|has 1,04[89],\d{3} by)"
        ):
            open_checkpoint(folder)
        path.write_bytes(contents)
        contents = bytearray(contents)
        contents[20] ^= 1
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=r"manifest\.ocdbt is damaged"):
            open_checkpoint(folder)
        contents[20] ^= 1
        path.write_bytes(contents)
    assert_holds(folder, CONFIG)


def test_orbax_metadata_too_deep_to_parse(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "orbax")
    (folder / "params" / "_METADATA").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="_METADATA is not valid JSON"):
        open_checkpoint(folder)


def test_msgpack_that_contradicts_itself(tmp_path: Path) -> None:
    import msgpack
    from flax import serialization

    path, flat = tmp_path / "model.msgpack", np.zeros(2, np.float32)
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": flat}}
    for change in (
        {"shape": {"0": 3}},
        {"shape": {"1": 2}},
        {"shape": 2},
        {"shape": {"0": -2}},
        {"chunks": {"1": flat}},
        {"chunks": {"0": 3}},
        {"chunks": {}},
    ):
        path.write_bytes(serialization.msgpack_serialize({"a": pieces | change}))
        with pytest.raises(CheckpointError, match=r"is truncated or not Flax msgpack: .* array"):
            open_checkpoint(path, config=CONFIG)
    for dtype in (5, "(1,2,f4", "f4,,", "f4,f4", "O", "V4"):
        packed = msgpack.ExtType(1, msgpack.packb([[2], dtype, bytes(8)]))
        path.write_bytes(msgpack.packb({"a": packed}))
        with pytest.raises(CheckpointError, match=r"not Flax msgpack: an array has the dtype"):
            open_checkpoint(path, config=CONFIG)
    twice = msgpack.packb({"a": 1, "b": 2}).replace(b"b", b"a")
    for contents, cause in ((twice, "duplicate key 'a'"), (b"\x80\x80", "something follows")):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=f"not Flax msgpack: {cause}"):
            open_checkpoint(path, config=CONFIG)


def test_params_that_are_no_arrays(tmp_path: Path) -> None:
    from flax import serialization

    tree = {"step": 3, "kernel": np.zeros(2)}
    (tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(CheckpointError, match="step is a int, expected an array; give only"):
        open_checkpoint(tmp_path / "state.msgpack", config=CONFIG)


def test_parameters_are_floating_point(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", dtype=np.int32)
    with pytest.raises(CheckpointError, match=r"\.weight is int32; expected one of"):
        open_checkpoint(folder)


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
        ("model.gguf", "gguf"),
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
        ("gguf", ["convert", "SOURCE", "out.gguf"], "gguf"),
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
