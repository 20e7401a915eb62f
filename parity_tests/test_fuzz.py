"""Checkpoints damaged at random: one clear error, or exactly what an independent reader sees."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import torch
from safetensors import safe_open

from alibi_cli.main import main
from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.formats import FORMATS
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import ALiBiConfig
from parity_tests.cases import draw_parameters
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise

CONFIG = ALiBiConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_len=16)
INDEX = "model.safetensors.index.json"
Files = dict[str, bytes]
Damage = Callable[[Files], None]
OnDisk = Callable[[Path], None]
SHAPES = {name: array.shape for name, array in draw_parameters(CONFIG).items()}
STRUCTURES = {("pt", "archive_damage"), ("msgpack", "msgpack_damage")}


def healthy() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(
            Path(folder), CONFIG, Tensors.of(draw_parameters(CONFIG)), max_shard_bytes=1500
        )
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


HEALTHY = healthy()
SHARDS = [name for name in HEALTHY if name.startswith("model-")]


def header_end(contents: bytes) -> int:
    return min(len(contents), 8 + int.from_bytes(contents[:8], "little"))


@st.composite
def byte_damage(draw: st.DrawFn) -> Damage:
    """Bytes flipped, inserted, deleted or cut off, in headers more often than in data."""
    name = draw(st.sampled_from(sorted(HEALTHY)))
    kind = draw(st.sampled_from(["flip", "flip", "insert", "delete", "truncate", "replace"]))
    where = draw(st.floats(0, 1))
    in_header = name in SHARDS and draw(st.booleans())
    junk = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b'"', b"{", b"9", b"-", b","]))
    size = draw(st.integers(1, 40))

    def damage(files: Files) -> None:
        if not files.get(name):
            return
        contents = files[name]
        at = int(where * ((header_end(contents) if in_header else len(contents)) - 1))
        files[name] = {
            "flip": contents[:at] + bytes([contents[at] ^ (1 << size % 8)]) + contents[at + 1 :],
            "insert": contents[:at] + junk + contents[at:],
            "delete": contents[:at] + contents[at + size :],
            "truncate": contents[:at],
            "replace": contents[:at] + junk + contents[at + len(junk) :],
        }[kind]

    return damage


@st.composite
def header_damage(draw: st.DrawFn) -> Damage:
    """A well-formed header that lies: sizes, offsets, shapes, dtypes, names, duplicates."""
    name = draw(st.sampled_from(SHARDS))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    value = draw(
        st.sampled_from(["F32", "F16", "I32", "F64", "BOOL", "F8_E5M2", "", 3, None, [], {}])
        | st.lists(st.integers(-2, 2**65) | st.integers(0, 300), max_size=3)
    )
    which = draw(st.integers(0, 9))
    kinds = ["field", "duplicate", "rename", "length", "drop", "metadata", "types"]
    kind = draw(st.sampled_from(kinds))
    entry = draw(st.sampled_from([3, None, "F32", [], {}, "values", "dtype", "no metadata"]))
    length = draw(st.integers(0, 2**64 - 1) | st.integers(0, 3000))

    def damage(files: Files) -> None:
        contents = files.get(name, b"")
        end = header_end(contents)
        try:
            header = json.loads(contents[8:end])
            tensor = sorted(header)[which % len(header)]
            text = b""
            if kind == "field":
                header[tensor][field] = value
            elif kind == "rename":
                header[tensor + "x"] = header.pop(tensor)
            elif kind == "drop":
                del header[tensor]
            elif kind == "metadata":
                header["__metadata__"] = {"format": value}
            elif kind == "types" and entry == "values":  # which serde takes for the object
                header[tensor] = list(header[tensor].values())
            elif kind == "types" and entry == "dtype":
                header[tensor]["dtype"] = {header[tensor]["dtype"]: None}
            elif kind == "types":
                header["__metadata__" if entry == "no metadata" else tensor] = (
                    None if entry == "no metadata" else entry
                )
            elif kind == "duplicate":
                again = json.dumps({tensor: header[tensor]}).encode()
                text = again[:-1] + b"," + json.dumps(header).encode()[1:]
        except (AttributeError, ValueError, TypeError, KeyError, ZeroDivisionError):
            return  # other damage came first
        text = text or json.dumps(header).encode()
        size = length if kind == "length" else len(text)
        files[name] = size.to_bytes(8, "little") + text + contents[end:]

    return damage


@st.composite
def folder_damage(draw: st.DrawFn) -> Damage:
    """Files swapped, renamed, removed, emptied; an index that points elsewhere."""
    first, second = draw(st.permutations(sorted(HEALTHY)))[:2]
    kind = draw(st.sampled_from(["swap", "rename", "remove", "empty", "copy", "index"]))
    target = draw(
        st.sampled_from(["../x", "/etc/passwd", "a/b", "", ".", "..", "x" * 300, *SHARDS])
    )

    def damage(files: Files) -> None:
        if first not in files or second not in files:
            return
        if kind == "swap":
            files[first], files[second] = files[second], files[first]
        elif kind == "rename":
            files["model.safetensors" if first in SHARDS else "renamed"] = files.pop(first)
        elif kind == "remove":
            del files[first]
        elif kind == "empty":
            files[first] = b""
        elif kind == "copy":
            files[first] = files[second]
        elif INDEX in files:
            files[INDEX] = files[INDEX].replace(SHARDS[0].encode(), target.encode())

    return damage


@st.composite
def kind_damage(draw: st.DrawFn) -> OnDisk:
    """Something that is no file in place of one; a link to it; a file that is sparse and huge."""
    which = draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["pipe", "device", "folder", "link", "dangling", "sparse"]))

    def damage(folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        path = files[which % len(files)]
        if kind == "sparse":
            os.truncate(path, 2**33)
            return
        kept = folder.parent / "kept"
        os.replace(path, kept)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"device": "/dev/zero", "link": kept, "dangling": "nowhere"}[kind])

    return damage


FOLDER_DAMAGE = byte_damage() | header_damage() | folder_damage()
DAMAGES = st.lists(FOLDER_DAMAGE, min_size=1, max_size=2)


def other_formats() -> dict[str, Files]:
    """The files of one checkpoint in ours and in each of the formats that other libraries read."""
    found = {}
    for kind in ("alibi", "pt", "msgpack", "orbax", "gguf"):
        with tempfile.TemporaryDirectory() as name:
            write(Path(name) / "model", kind, CONFIG)
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            found[kind] = {str(path.relative_to(name)): path.read_bytes() for path in files}
    return found


OTHERS = other_formats()


@st.composite
def any_byte_damage(draw: st.DrawFn) -> Damage:
    """Bytes of any file changed, cut off, put in or zeroed."""
    which, at, size = (draw(st.integers(0, 2**16)) for _ in range(3))
    kind = draw(st.sampled_from(["flip", "flip", "delete", "truncate", "junk", "zeros", "remove"]))
    junk = draw(st.binary(min_size=1, max_size=6))

    def damage(files: Files) -> None:
        name = sorted(files)[which % len(files)]
        start = at % (len(files[name]) or 1)
        before, after = files[name][:start], files[name][start:]
        if kind == "remove" and len(files) > 1:
            del files[name]
            return
        files[name] = {
            "flip": before + bytes(byte ^ (1 << size % 8) for byte in after[:1]) + after[1:],
            "delete": before + after[size % 40 :],
            "truncate": before,
            "junk": before + junk + after[size % 8 :],
        }.get(kind, bytes(len(files[name])))

    return damage


@st.composite
def archive_damage(draw: st.DrawFn) -> Damage:
    """An archive whose CRCs are right and whose entries are not."""
    damaged = draw(any_byte_damage())
    kind = draw(st.sampled_from(["bytes", "bytes", "pickle", "pickle", "double", "pack", "script"]))

    def damage(files: Files) -> None:
        name = next((name for name in files if name.endswith(".pt")), "")
        with contextlib.suppress(zipfile.BadZipFile, KeyError, ValueError):  # other damage first
            with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
                entries = {each: archive.read(each) for each in archive.namelist()}
            pickled = {each: entries[each] for each in entries if each.endswith("data.pkl")}
            damaged(pickled if kind == "pickle" else entries)
            contents = io.BytesIO()
            method = zipfile.ZIP_DEFLATED if kind == "pack" else zipfile.ZIP_STORED
            with zipfile.ZipFile(contents, "w", method) as archive:
                for each, data in (entries | pickled).items():
                    archive.writestr(each, data)
                    if kind == "double":
                        archive.writestr(each.upper(), data)
                if kind == "script":
                    archive.writestr("model/constants.pkl", b"")
            files[name] = contents.getvalue()

    return damage


@st.composite
def msgpack_damage(draw: st.DrawFn) -> Damage:
    """A well-formed tree that lies: pieces, shapes and dtypes of arrays, types, keys twice."""
    which = draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["pieces", "array", "code", "value", "double", "deep"]))
    shape = draw(st.lists(st.integers(-2, 2**40) | st.none(), max_size=3))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "O", "V8", "<f4,<f4", "", "no", "M8[s]"]))
    chunks = draw(st.sampled_from([{}, {"0": 1}, {"1": b""}, [], 3, None]))
    code = draw(st.integers(0, 127))

    def damage(files: Files) -> None:
        tree = msgpack.unpackb(OTHERS["msgpack"]["model.msgpack"])
        node = tree
        while isinstance(node[key := sorted(node)[which % len(node)]], dict):
            node = node[key]
        old = node[key]
        said, _, data = msgpack.unpackb(old.data)
        if kind == "pieces":
            pieces = chunks if which % 2 else {"0": old}
            numbered = {str(i): size for i, size in enumerate(shape)}
            node[key] = {"__msgpack_chunked_array__": True, "shape": numbered, "chunks": pieces}
        elif kind == "array":
            packed = [shape if which % 2 else said, dtype, data]
            node[key] = msgpack.ExtType(1, msgpack.packb(packed))
        elif kind == "code":
            node[key] = msgpack.ExtType(code, old.data)
        elif kind == "value":
            node[key] = chunks
        elif kind == "deep":
            node[key] = {}
            for _ in range(which * 6):
                node[key] = {"a": node[key]}
        contents = msgpack.packb(tree)
        if kind == "double":
            contents = contents.replace(b"query", b"value")
        files["model.msgpack"] = contents

    return damage


OTHER_DAMAGES = st.tuples(
    st.sampled_from(["alibi", *["pt"] * 5, *["msgpack"] * 3, "orbax", "gguf", "gguf"]),
    st.lists(any_byte_damage(), max_size=2),
    st.none() | archive_damage() | msgpack_damage(),
    st.none() | st.none() | st.none() | kind_damage(),
)


def independent(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads, by the index if there is one."""
    names: dict[str, str | None] = {"model.safetensors": None}
    if (folder / INDEX).exists():
        names = dict.fromkeys(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    elif not (folder / "model.safetensors").exists():  # shards are enough, if all are there
        names = dict.fromkeys(path.name for path in folder.glob("model-*.safetensors"))
    found = {}
    for name in names:
        with safe_open(folder / name, framework="numpy") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def check(damages: list[Damage]) -> None:
    files = dict(HEALTHY)
    for damage in damages:
        damage(files)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        for file, contents in files.items():
            (folder / file).write_bytes(contents)
        error = None
        try:
            found = open_checkpoint(folder)
        except CheckpointError as caught:
            error = str(caught)
            assert error
        else:
            expected = independent(folder)
            assert set(found.tensors) == set(expected)
            for key, array in expected.items():
                assert_bitwise(found.tensors[key], array, key)
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(["convert", str(folder), str(Path(name) / "out")])
        if error is None:
            assert code == 0
            copy = open_checkpoint(Path(name) / "out").tensors
            for key, array in expected.items():
                assert_bitwise(copy[key], array, key)
        else:
            assert code == 3
            assert errors.getvalue() == f"error: {error}\n"
            assert {path.name for path in Path(name).iterdir()} == {"model"}


def check_other(
    kind: str, damages: list[Damage], structure: Damage | None, on_disk: OnDisk | None
) -> None:
    """One clear error or the parameters; those of a .pt as torch reads them, unmapped."""
    files = dict(OTHERS[kind])
    if structure is not None and (kind, structure.__qualname__.split(".")[0]) in STRUCTURES:
        structure(files)
        damages = damages[1:]
    for damage in damages:
        damage(files)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        for file, contents in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(contents)
        if on_disk is not None:
            on_disk(root)
        path = (root / "model").with_suffix(FORMATS[kind].suffix)
        try:
            found = open_checkpoint(path, allow_pt=True, config=CONFIG)
            tensors = {key: found.tensors[key] for key in found.tensors}
        except CheckpointError:
            return
        assert {key: array.shape for key, array in tensors.items()} == SHAPES
        if kind == "pt":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle that says it is of another protocol
                expected = torch.load(path, weights_only=True, map_location="cpu")
            for key, tensor in expected.items():
                assert_bitwise(tensors[key], as_numpy(tensor), key)


# The event loops of orbax's failed reads are cleared away late, and say so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(OTHER_DAMAGES)
def test_damage_in_other_formats(case: Any) -> None:
    check_other(*case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@hypothesis.settings(deadline=None, max_examples=10_000)
@hypothesis.given(OTHER_DAMAGES)
def test_much_damage_in_other_formats(case: Any) -> None:
    check_other(*case)


@hypothesis.settings(deadline=None, max_examples=250)
@hypothesis.given(DAMAGES)
def test_damaged_checkpoints(damages: list[Damage]) -> None:
    check(damages)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@hypothesis.settings(deadline=None, max_examples=10_000)
@hypothesis.given(DAMAGES)
def test_many_damaged_checkpoints(damages: list[Damage]) -> None:
    check(damages)


def test_without_damage() -> None:
    check([])
