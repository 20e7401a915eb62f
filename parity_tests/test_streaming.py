"""Folders of any size: shards, values on the way, what comes along, memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file

from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.formats import FORMATS, exported
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.formats.shards import parse_size, read_tensors
from alibi_convert.tensors import Tensors, as_torch
from alibi_convert.values import count_nonfinite
from alibi_convert.writing.layout import COMPANIONS
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import AGREEMENTS
from parity_tests.cases import draw_parameters
from parity_tests.checkpoints import CONFIG, OURS, assert_holds, make_folder, write
from parity_tests.compare import assert_bitwise, assert_within

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 40_000


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def write_sharded(folder: Path, **changed: np.ndarray) -> Path:
    parameters = {**draw_parameters(CONFIG), **changed}
    write_folder(make_folder(folder), CONFIG, Tensors.of(parameters), max_shard_bytes=SHARD_BYTES)
    return folder


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5e9), ("500MB", 5e8), ("1.5 kb", 1500), ("2T", 2e12), ("7", 7), (7, 7), ("9B", 9)],
)
def test_sizes(text: str | int, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5GiB", "1e9", "5 G B", "0.1"])
def test_sizes_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a size; expected bytes, or a number with KB"):
        convert(write(tmp_path / "model"), tmp_path / "result", max_shard_size=text)


def test_sharded_conversions(tmp_path: Path) -> None:
    """Whole to shards to whole: no shard above the limit, every hash that of the file."""
    source = write(tmp_path / "whole", dtype=ml_dtypes.bfloat16)
    report = convert(source, tmp_path / "sharded", max_shard_size="20KB")
    assert len(shards(tmp_path / "sharded")) > 3
    assert_holds(tmp_path / "sharded", CONFIG, ml_dtypes.bfloat16)
    weight_map = json.loads((tmp_path / "sharded" / INDEX).read_text())["weight_map"]
    for path in shards(tmp_path / "sharded"):
        arrays = load_file(path)
        assert {name for name, file in weight_map.items() if file == path.name} == set(arrays)
        assert sum(array.nbytes for array in arrays.values()) <= 20_000 or len(arrays) == 1
    for hashes, folder, function in (
        (report.source_sha256, source, hashlib.sha256),
        (report.destination_xxh3, "sharded", xxhash.xxh3_128),
    ):
        assert hashes == {
            path.name: function(path.read_bytes()).hexdigest()
            for path in (tmp_path / folder).iterdir()
            if path.name != "conversion.json"
        }
    convert(tmp_path / "sharded", tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"lm_head.weight": "/etc/passwd"}), "names '/etc/passwd', outside"),
        (lambda m: m.update({"lm_head.weight": "../x.safetensors"}), r"names '\.\./x\.safetensors"),
        (lambda m: m.update({"lm_head.weight": "a/x.safetensors"}), "names 'a/x.safetensors', out"),
        (lambda m: m.update({"lm_head.weight": "a\\x"}), r"names 'a\\\\x', outside"),
        (lambda m: m.update({"lm_head.weight": ".."}), r"names '\.\.', outside the folder"),
        (lambda m: m.update({"lm_head.weight": ""}), "names '', outside the folder"),
        (lambda m: m.update({"extra": "x" * 999}), "does not exist; the checkpoint is"),
        (lambda m: m.update({"extra": "none"}), r"none does not exist; the checkpoint is"),
        (lambda m: m.update({"lm_head.weight": 3}), "no weight_map from tensors to file names"),
        (lambda m: m.update({"extra": max(m.values())}), "and the index disagree about extra"),
        (lambda m: m.pop("lm_head.weight"), r"and the index disagree about lm_head\.weight"),
        (lambda m: m.clear(), "no weight_map from tensors to file names"),
    ],
)
def test_indexes_that_lie(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_sharded(tmp_path / "model")
    edit_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_missing_shards_and_weights(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    shards(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-0000\d\.safetensors does not exist"):
        open_checkpoint(folder)
    for path in (folder / INDEX, *shards(folder)):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no weights: model\.safetensors does not exist, no"):
        open_checkpoint(folder)


def test_shards_that_are_links(tmp_path: Path) -> None:
    """As in download caches: the name is plain, the file lies elsewhere."""
    folder = write_sharded(tmp_path / "model")
    for path in shards(folder):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert_holds(folder, CONFIG)
    assert convert(folder, tmp_path / "copy").verified


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_pickles(tmp_path: Path, sharded: bool) -> None:
    arrays = dict(draw_parameters(CONFIG))
    names = list(arrays)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {"a.bin": names[:9], "b.bin": names[9:]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    for file, part in parts.items():
        torch.save({name: as_torch(arrays[name]) for name in part}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"is a pickle, .* pass allow_pt=True"):
        read_tensors(tmp_path)
    tensors = read_tensors(tmp_path, allow_pt=True)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert_bitwise(tensors[name], array, name)
    (tmp_path / parts.popitem()[0]).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path, allow_pt=True)


def test_foreign_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that another library reads: its configuration, its names, our shards."""

    def foreign(_: ALiBiConfig, tensors: Tensors) -> Tensors:
        return Tensors({f"theirs.{name}": each for name, each in tensors.headers.items()})

    form = exported(lambda config: {"heads": config.num_heads}, foreign, "theirs")
    monkeypatch.setitem(FORMATS, "theirs", form)
    source = write(tmp_path / "model")
    convert(source, tmp_path / "out", to="theirs", max_shard_size=SHARD_BYTES, verify="none")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"heads": CONFIG.num_heads, "dtype": "float32"}
    tensors = read_tensors(tmp_path / "out")
    for name, array in draw_parameters(CONFIG).items():
        assert_bitwise(tensors[f"theirs.{name}"], array, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_counting_what_is_not_finite(dtype: str) -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 1, -6e4]).astype(dtype)
    assert count_nonfinite(values) == 4
    assert count_nonfinite(values[4:]) == 0
    assert count_nonfinite(values[:0]) == 0


@pytest.mark.parametrize("kind", OURS)
def test_values_that_are_not_finite(tmp_path: Path, kind: str) -> None:
    """Reported by tensor and number, carried bit for bit; refused on request."""
    head = draw_parameters(CONFIG)["lm_head.weight"].copy()
    head[3, 4:6], head[7, 7] = np.inf, np.nan
    norm = draw_parameters(CONFIG)["transformer.final_norm.bias"].copy()
    norm[0] = -np.nan
    changed = {"lm_head.weight": head, "transformer.final_norm.bias": norm}
    source = write_sharded(tmp_path / "model", **changed)
    path = (tmp_path / "out").with_suffix(FORMATS[kind].suffix)
    report = convert(source, path, to=kind)
    assert report.nonfinite == {"lm_head.weight": 3, "transformer.final_norm.bias": 1}
    found = open_checkpoint(path, allow_pt=True)
    for name, array in changed.items():
        assert_bitwise(found.tensors[name], array, name)
    path = (tmp_path / "strict").with_suffix(FORMATS[kind].suffix)
    message = r"infinity in 2 tensors: .*final_norm\.bias \(1\).*; repair"
    with pytest.raises(CheckpointError, match=message):
        convert(source, path, to=kind, strict_values=True)
    assert not path.exists()


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
def test_casts_are_reported_exactly(tmp_path: Path, source: str, target: str) -> None:
    """Against the same figure computed in float64 by other means, in every tensor."""
    arrays = {name: array.astype(source) for name, array in draw_parameters(CONFIG).items()}
    arrays["lm_head.weight"][0, :3] = [0, np.inf, -0.0]
    write_folder(make_folder(tmp_path / "model"), CONFIG, Tensors.of(arrays))
    report = convert(tmp_path / "model", tmp_path / "out", dtype=target)
    worst = {}
    for name, array in arrays.items():
        exact = array.astype(np.float64)
        usual = np.isfinite(exact) & (exact != 0)
        error = np.abs(array.astype(target).astype(np.float64)[usual] / exact[usual] - 1)
        worst[name] = error.max()
    expected = max(worst.values())
    limit = AGREEMENTS["rounding"].relative
    assert_within(np.asarray(report.rounding), np.asarray(expected), limit, "rounding")
    if source == target:
        assert report.casts == []
        return
    (cast,) = report.casts
    assert (cast.source, cast.target, cast.tensors) == (source, target, len(arrays))
    assert cast.where == (max(worst, key=lambda name: worst[name]) if expected else None)
    for name, tensor in open_checkpoint(tmp_path / "out").tensors.items():
        assert_bitwise(tensor, arrays[name].astype(target), name)


def test_what_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokenizer files are copied and do not make a folder foreign; other files stay behind."""
    source = write_sharded(tmp_path / "model")
    names = [name.replace("*", "tool_use") for name in COMPANIONS]
    for name in (*names, "README.md", "onnx/model.onnx"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"contents of {name}")
    report = convert(source, tmp_path / "out")
    assert report.copied == names
    assert {"spiece.model", "additional_chat_templates/tool_use.jinja"} <= set(names)
    assert report.left_behind == ["README.md", "onnx/"]
    for name in names:
        assert (tmp_path / "out" / name).read_text() == f"contents of {name}"
    assert not (tmp_path / "out" / "README.md").exists()
    assert set(report.destination_xxh3) > set(names)
    assert main(["convert", str(source), str(tmp_path / "out"), "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert "copied: tokenizer.json, " in printed
    assert "not copied: README.md, onnx/" in printed
    convert(tmp_path / "out", tmp_path / "out", overwrite=True, dtype="bfloat16")  # over itself
    assert_holds(tmp_path / "out", CONFIG, ml_dtypes.bfloat16)
    assert (tmp_path / "out" / "merges.txt").read_text() == "contents of merges.txt"
    single = convert(source, tmp_path / "single.safetensors")
    assert (single.copied, single.left_behind[-1]) == ([], "vocab.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "single.safetensors"}


def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was converted from what, without a trace of the machine but the path as given."""
    write(tmp_path / "model", dtype=np.float64)
    monkeypatch.chdir(tmp_path)
    report = convert("model", tmp_path / "out", dtype="float16")
    text = (tmp_path / "out" / "conversion.json").read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert (found["spec_version"], found["table_version"]) == (1, 1)
    assert set(found["versions"]) == {"python", "alibi-duo", "numpy", "ml_dtypes", "safetensors"}
    assert found["source"] == "model"
    assert found["casts"] == report.to_dict()["casts"] != []
    for name in ("source_sha256", "destination_xxh3", "dropped", "nonfinite", "verification"):
        assert found[name] == getattr(report, name)
    assert found["verification"]["bitwise"] is True
    assert report.seconds > 0


MEMORY = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from alibi_cli.main import main
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, dtype: str | None) -> None:
    """300 MB in shards of 100 MB, by a process that cannot hold one of them."""
    sizes = {"d_model": 1024, "num_heads": 8, "expansion_factor": 1, "vocab_size": 300}
    config = ALiBiConfig(num_layers=13, **sizes)
    parameters = Tensors.of(draw_parameters(config))
    write_folder(make_folder(tmp_path / "model"), config, parameters, max_shard_bytes=10**8)
    assert sum(path.stat().st_size for path in shards(tmp_path / "model")) > 300e6
    code = [sys.executable, "-c", MEMORY, str(150 * 10**6)]
    paths = [str(tmp_path / "model"), str(tmp_path / "out"), "--max-shard-size=100MB"]
    options = [] if dtype is None else [f"--dtype={dtype}"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([*code, *paths, *options], env=environment, check=False)
    assert done.returncode == 0
    assert len(shards(tmp_path / "out")) == (4 if dtype is None else 2)
