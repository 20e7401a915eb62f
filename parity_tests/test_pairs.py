"""Every writer of checkpoints with every reader: the same bits, or a refusal that says why.

What `convert` writes is read back by the library of the format, not by us.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
import transformers

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.families import FAMILIES
from alibi_convert.formats import FORMATS
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_convert.writing.layout import ORBAX_FOLDER
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.families import redraw
from parity_tests.pairs import PAIRS, READERS, WRITERS, Party, is_refused
from parity_tests.test_family_conversion import SIZES
from parity_tests.test_seed import seed_state

Arrays = Mapping[str, np.ndarray]
CLASSES = {"bloom": "Bloom", "mpt": "Mpt", "falcon": "Falcon"}  # of transformers
SHARD = 5_000  # bytes, of which a model has more


class Model(NamedTuple):
    """One model: its tensors as its own library names them, and as we do."""

    foreign: Arrays
    config: ALiBiConfig
    canonical: Arrays


def peer(family: str) -> Any:
    """A small model of transformers in bfloat16, always the same."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(vocab_size=17, **SIZES[family])
    return redraw(getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config)).bfloat16()


def write_published(path: Path, family: str, **options: Any) -> None:
    """What the family's own library saves."""
    if family == "jaketae":
        torch.save({name: as_torch(each) for name, each in seed_state(4, True).items()}, path)
    else:
        peer(family).save_pretrained(path, **options)


@cache
def model_of(family: str) -> Model:
    """The same model as it is published, and as it is read from there."""
    if family == "jaketae":
        foreign: Arrays = seed_state(4, True)
    else:
        foreign = {name: as_numpy(each) for name, each in peer(family).state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.pt"
        write_published(path, family)
        found = open_checkpoint(path, allow_pt=True)
        canonical = {name: found.tensors[name].copy() for name in found.tensors}
    return Model(foreign, found.config, canonical)


def state_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: as_torch(array) for name, array in model.canonical.items()}


def params_of(model: Model) -> Any:
    return jax.tree.map(jnp.asarray, flax_tree(Tensors.of(model.canonical), model.config))


def of_class(package: Any, config: ALiBiConfig) -> Any:
    return package.ALiBiTransformer if config.vocab_size is None else package.ALiBiLM


def write_by_torch(path: Path, model: Model) -> None:
    module = of_class(alibi_torch, model.config)(model.config)
    module.load_state_dict(state_of(model), assign=True)
    module.save_pretrained(path)


def write_by_flax(path: Path, model: Model) -> None:
    module = of_class(alibi_flax, model.config)(model.config)
    alibi_flax.save_pretrained(path, module, params_of(model))


def write_orbax(path: Path, model: Model) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params_of(model))


def by_convert(kind: str, **options: Any) -> Callable[[Path, Model], None]:
    """What `convert` does between reading and checking."""

    def write(path: Path, model: Model) -> None:
        if kind == "alibi":
            path.mkdir()
        FORMATS[kind].write(path, model.config, Tensors.of(model.canonical), **options)

    return write


# Suffix, and how it is written; the last four carry no configuration.
WRITE: dict[str, tuple[str, Callable[[Path, Model], Any]]] = {
    "`alibi_torch`'s `save_pretrained`": ("", write_by_torch),
    "`alibi_flax`'s `save_pretrained`": ("", write_by_flax),
    "`convert` to shards": ("", by_convert("alibi", max_shard_bytes=SHARD)),
    "`convert` to .safetensors": (".safetensors", by_convert("safetensors")),
    "`convert` to .pt": (".pt", by_convert("pt")),
    "`convert` to .msgpack": (".msgpack", by_convert("msgpack")),
    "`convert` to orbax": ("", by_convert("orbax")),
    "safetensors' `save_file`": (
        ".safetensors",
        lambda path, model: safetensors.torch.save_file(state_of(model), path),
    ),
    "`torch.save`": (".pt", lambda path, model: torch.save(state_of(model), path)),
    "flax's `to_bytes`": (
        ".msgpack",
        lambda path, model: path.write_bytes(flax.serialization.to_bytes(params_of(model))),
    ),
    "orbax's `StandardCheckpointer`": ("", write_orbax),
}
BARE = list(WRITE)[-4:]


def written(writer: Party, family: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of this family's model, and what must be said to read it."""
    if writer.family is not None:
        path = folder / ("source.pt" if family == "jaketae" else "source")
        options = {"max_shard_size": SHARD} if writer.name.endswith("in shards") else {}
        write_published(path, family, **options)
        return path, {"allow_pt": True}
    model, (suffix, write) = model_of(family), WRITE[writer.name]
    path = folder / f"source{suffix}"
    write(path, model)
    config = {"config": model.config} if writer.name in BARE else {}
    return path, {"allow_pt": True, **config}


def read_by_torch(path: Path, expected: ALiBiConfig, **reading: Any) -> Arrays:
    model = of_class(alibi_torch, expected).from_pretrained(path, **reading)
    assert model.config == expected
    return {name: as_numpy(tensor) for name, tensor in model.state_dict().items()}


def read_by_flax(path: Path, expected: ALiBiConfig, **reading: Any) -> Arrays:
    model, params = alibi_flax.from_pretrained(path, **reading)
    assert model.config == expected
    return canonical_tensors(params, expected)


def read_by_the_reference(path: Path, expected: ALiBiConfig, **reading: Any) -> Arrays:
    found = open_checkpoint(path, **reading)
    assert found.config == expected
    return found.tensors


def load_safetensors(path: Path, config: ALiBiConfig) -> Arrays:
    """Of a file, or of all files of a folder, whose config.json must be right, too."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.is_dir():
        values = json.loads((path / "config.json").read_text())
        del values["format"], values["format_version"], values["model_type"]
        assert ALiBiConfig.from_dict(values) == config
    found = [safetensors.torch.load_file(file) for file in files]
    return {name: as_numpy(each) for state in found for name, each in state.items()}


def load_shards(path: Path, config: ALiBiConfig) -> Arrays:
    assert len(list(path.glob("*.safetensors"))) > 3
    return load_safetensors(path, config)


def load_torch(path: Path, _: ALiBiConfig) -> Arrays:
    state = torch.load(path, weights_only=True)
    return {name: as_numpy(tensor) for name, tensor in state.items()}


def load_msgpack(path: Path, config: ALiBiConfig) -> Arrays:
    return canonical_tensors(flax.serialization.msgpack_restore(path.read_bytes()), config)


def load_orbax(path: Path, config: ALiBiConfig) -> Arrays:
    with ocp.StandardCheckpointer() as checkpointer:
        return canonical_tensors(checkpointer.restore(path / ORBAX_FOLDER), config)


def load_transformers(family: str) -> Callable[[Path, ALiBiConfig], Arrays]:
    """By the family's own model, which finds every tensor and no other."""

    def load(path: Path, _: ALiBiConfig) -> Arrays:
        model_class = getattr(transformers, f"{CLASSES[family]}ForCausalLM")
        model, report = model_class.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), report
        return {name: as_numpy(tensor) for name, tensor in model.state_dict().items()}

    return load


OPEN = {
    "`alibi_torch`": read_by_torch,
    "`alibi_flax`": read_by_flax,
    "`alibi_spec`": read_by_the_reference,
}
# Name of the destination, options of `convert`, and the library that reads it.
CONVERT: dict[str, tuple[str, dict[str, Any], Callable[[Path, ALiBiConfig], Arrays]]] = {
    "folder": ("out", {}, load_safetensors),
    "shards": ("out", {"max_shard_size": SHARD}, load_shards),
    ".safetensors": ("out.safetensors", {}, load_safetensors),
    ".pt": ("out.pt", {}, load_torch),
    ".msgpack": ("out.msgpack", {}, load_msgpack),
    "orbax": ("out.orbax", {}, load_orbax),
    "BLOOM": ("out", {"to": "bloom"}, load_transformers("bloom")),
    "MPT": ("out", {"to": "mpt"}, load_transformers("mpt")),
    "Falcon-RW": ("out", {"to": "falcon"}, load_transformers("falcon")),
    "jaketae": ("out.pt", {"to": "jaketae"}, load_torch),
}


def quickly_shown(writer: Party, reader: Party) -> bool:
    """Each writer with our readers, each reader with one writer: each of the tables once."""
    return reader.name in OPEN or writer is WRITERS[0]


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(
            *(writer, reader),
            id=f"{writer.name} to {reader.name}".replace("`", ""),
            marks=() if quickly_shown(writer, reader) else pytest.mark.slow,
        )
        for writer, reader in PAIRS
    ],
)
def test_every_pair(tmp_path: Path, writer: Party, reader: Party) -> None:
    family = writer.family or reader.family or "bloom"
    model, (path, reading) = model_of(family), written(writer, family, tmp_path)
    if reader.name in OPEN:
        found = OPEN[reader.name](path, model.config, **reading)
    else:
        name, options, load = CONVERT[reader.name]
        destination = tmp_path / name
        if is_refused(writer, reader):
            with pytest.raises(CheckpointError, match=rf"{reader.family} cannot express \w+="):
                convert(path, destination, **options, **reading)
            assert not destination.exists()
            return
        report = convert(path, destination, verify="bits", **options, **reading)
        assert report.verified
        assert report.rounding is None
        found = load(destination, model.config)
    expected = model.canonical if reader.family is None else model.foreign
    assert set(found) == set(expected)
    for tensor, array in expected.items():
        assert_bitwise(found[tensor], array, tensor)


def test_every_party_takes_part() -> None:
    """The table of the documents lists whom the tests try."""
    ours = {writer.name for writer in WRITERS if writer.family is None}
    assert ours == set(WRITE)
    assert {reader.name for reader in READERS} == {*OPEN, *CONVERT}
    names = {options.get("to") or name for name, (_, options, _) in CONVERT.items()}
    suffixes = {kind.suffix for kind in FORMATS.values() if kind.suffix}
    suffixes -= {".gguf"}  # see test_gguf.py
    folders = {name for name, kind in FORMATS.items() if not kind.suffix} - {"alibi"}
    folders -= {family.name for family in FAMILIES if family.peer is None}  # see test_family_*.py
    assert names == {"folder", "shards", "jaketae"} | suffixes | folders
