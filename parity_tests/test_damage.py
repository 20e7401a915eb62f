"""Broken, foreign and unsafe input: one clear error, nothing half-written, nothing lost."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import warnings
import zipfile
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
from alibi_convert import CheckpointError, MismatchError, convert, open_checkpoint, torch_to_flax
from alibi_convert.formats import FORMATS
from alibi_convert.formats.config_file import config_json
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_convert.writing.layout import sidecar
from alibi_spec import ALiBiConfig
from parity_tests.cases import CONFIGS, draw_parameters
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
    torch.save({"generator": {"weight": torch.zeros(1)}, "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors \(generator, step\); save the"):
        open_checkpoint(tmp_path / "nested.pt", allow_pt=True)


@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_every_way_to_a_pickle_needs_consent(tmp_path: Path, index: str) -> None:
    """Whatever names it: refused although it is not even a pickle, so nothing of it was read."""
    folder = write(tmp_path / "model")
    os.rename(folder / "model.safetensors", folder / "weights.bin")
    weight_map = dict.fromkeys(draw_parameters(CONFIG), "weights.bin")
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for read in (open_checkpoint, alibi_torch.ALiBiLM.from_pretrained, alibi_flax.from_pretrained):
        with pytest.raises(CheckpointError, match=r"run code; .* allow_pt=True \(--allow-pt\)"):
            read(folder)
    with pytest.raises(CheckpointError, match="is truncated or not"):
        open_checkpoint(folder, allow_pt=True)


def test_a_pickle_by_another_name_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pt")
    (tmp_path / "model.safetensors").symlink_to("pickle.pt")
    (tmp_path / "model.msgpack").symlink_to("pickle.pt")
    for name in ("model.safetensors", "model.msgpack"):
        with pytest.raises(CheckpointError, match="is truncated or not"):
            open_checkpoint(tmp_path / name, config=CONFIG, allow_pt=True)


@pytest.mark.timeout(60)
def test_regular_files_alone(tmp_path: Path) -> None:
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
    for name in ("model.pt", "model.msgpack", "model.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**33)
        with pytest.raises(CheckpointError, match="is truncated or not"):
            open_checkpoint(tmp_path / name, config=CONFIG, allow_pt=True)


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
        with pytest.raises(CheckpointError, match="is truncated or not"):
            open_checkpoint(path, allow_pt=True)


def test_archives_are_checked_from_end_to_end(tmp_path: Path) -> None:
    """Mapped files are not checked by torch: a flipped bit of data, of a header, of a name."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(64.0)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("model/data/0")
    data = whole.index(np.arange(64.0, dtype=np.float32).tobytes())
    for at, message in (
        (data + 5, "model/data/0 has another CRC"),
        (entry.header_offset, "no header where model/data/0 should be"),
        (entry.header_offset + 8, "the two headers of model/data/0 disagree"),
        (entry.header_offset + 28, "model/data/0 has another CRC"),
        (entry.header_offset + 33, "the two headers of model/data/0 disagree"),
        (len(whole) - 1, "does not end|Bad"),
    ):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"not a sound zip archive: .*({message})"):
            open_checkpoint(path, allow_pt=True)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match="does not end as an archive does"):
        open_checkpoint(path, allow_pt=True)


def test_an_archive_with_less_data_than_its_pickle_says(tmp_path: Path) -> None:
    """Every CRC is right, and the tensor would reach into what follows its data."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(64.0), "other": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["model/data/0"] = contents["model/data/0"][:-8]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="its tensors do not fit the data it holds"):
        open_checkpoint(path, allow_pt=True)


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    """float8, expanded, quantised, without data, sparse; and names that are no text."""
    path, one = tmp_path / "model.pt", torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors leave torch
        quantised = torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)
    for state, message in (
        ({"a": one.to(torch.float8_e4m3fn)}, "a is torch.float8_e4m3fn"),
        ({"a": torch.ones(1).expand(10**12)}, r"a is torch.float32 \[1000000000000\]"),
        ({"a": quantised}, "a is .* \\(quantised"),
        ({"a": one.to("meta")}, "a is .* on meta"),
        ({"a": one.to_sparse()}, "a is .*sparse"),
        ({3: one}, r"holds more than tensors \(3\)"),
    ):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path, allow_pt=True)
    with pytest.raises(CheckpointError, match=r"^a is torch\.float8"):
        torch_to_flax({"a": one.to(torch.float8_e4m3fn)}, CONFIG)


@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_pickles(tmp_path: Path, is_zip: bool) -> None:
    """Whatever the unpickler stumbles over, also inside an archive whose CRCs are right."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(4.0)}, path, _use_new_zipfile_serialization=is_zip)
    contents = {"": path.read_bytes()}
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
    name = "model/data.pkl" if is_zip else ""
    pickled = contents[name]
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(pickled)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        end = rng.integers(len(damaged)) if rng.random() < 0.3 else len(damaged)
        contents[name] = bytes(damaged[:end])
        if is_zip:
            with zipfile.ZipFile(path, "w") as archive:
                for each, data in contents.items():
                    archive.writestr(each, data)
        else:
            path.write_bytes(contents[name])
        with pytest.raises(CheckpointError):
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
            "holds an adapter .*; merge it into",
        ),
        ("base_model.model.wte.lora_embedding_B.default", "holds an adapter .*; merge it into"),
    ],
)
def test_what_holds_no_model_as_it_is(tmp_path: Path, name: str, message: str) -> None:
    """Quantised weights and adapters, each by its name and with the way out."""
    folder = write(tmp_path / "model")
    stored = {key: array.copy() for key, array in read_tensors(folder).items()}
    save_file(stored | {name: np.zeros(4, np.uint8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_adapters_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/bloom"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for config in (None, "{}"):
        if config is not None:
            (folder / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=r"an adapter alone, for 'org/bloom'; merge it"):
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


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """In pickles of our layout and of a family's, and in a live state dict."""
    state: dict[Any, Any] = {7: torch.zeros(2), "weight": torch.zeros(2)}
    namespace = argparse.Namespace(decoder_layers=1)
    path = tmp_path / "model.pt"
    for saved in (state, {"args": namespace, "model": state | {"decoder.embed_tokens.weight": 1}}):
        torch.save(saved, path)
        with pytest.raises(
            CheckpointError, match=r"under the key 7; expected names|more than tens"
        ):
            open_checkpoint(path, allow_pt=True, config=CONFIG)
    with pytest.raises(CheckpointError, match="the state dict has a tensor under the key 7"):
        torch_to_flax(state, CONFIG)


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
        with pytest.raises(CheckpointError, match=r"manifest\.ocdbt (is damaged|has 1,048,\d+ by)"):
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


# orbax's threads and callbacks say what they saw, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["pt", "msgpack", "orbax"])
def test_a_disk_that_fills_up_under_other_libraries(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "model")
    destination = (tmp_path / "new").with_suffix(FORMATS[kind].suffix)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"new.* cannot be written: File too large"):
            convert(source, destination, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
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
