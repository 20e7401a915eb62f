"""Pickles and the archives around them: consent, no code, no bit that nobody looks at."""

from __future__ import annotations

import argparse
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, open_checkpoint, torch_to_flax
from parity_tests.cases import draw_parameters
from parity_tests.checkpoints import CONFIG, assert_holds, write


def test_pickles_need_consent_and_stay_harmless(tmp_path: Path) -> None:
    """Refused by default; with consent, only tensors are read and code is not run."""
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
    with pytest.raises(CheckpointError, match=r"more than tensors \(generator, step\); save only"):
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
