"""Checkpoints damaged at random: one clear error, or exactly what an independent reader sees."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from safetensors import safe_open

from alibi_cli.main import main
from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.store import write_folder
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.cases import draw_parameters
from parity_tests.compare import assert_bitwise

CONFIG = ALiBiConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_len=16)
INDEX = "model.safetensors.index.json"
Files = dict[str, bytes]
Damage = Callable[[Files], None]


def healthy() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), CONFIG, Tensors.of(draw_parameters(CONFIG)), 1500)
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
    kind = draw(st.sampled_from(["field", "duplicate", "rename", "length", "drop", "metadata"]))
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
            elif kind == "duplicate":
                again = json.dumps({tensor: header[tensor]}).encode()
                text = again[:-1] + b"," + json.dumps(header).encode()[1:]
        except (ValueError, TypeError, KeyError, ZeroDivisionError):  # other damage came first
            return
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


DAMAGES = st.lists(byte_damage() | header_damage() | folder_damage(), min_size=1, max_size=2)


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


@hypothesis.settings(deadline=None, max_examples=2000)
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
