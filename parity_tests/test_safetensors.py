"""One safetensors file: what we write the library reads, and what we read is the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import xxhash

from alibi_convert import CheckpointError
from alibi_convert.formats.safetensors import read_safetensors, write_safetensors
from alibi_convert.tensors import (
    CHUNK_BYTES,
    LazyTensor,
    Tensors,
    as_numpy,
    contiguous_chunks,
    paired_chunks,
)
from parity_tests.compare import assert_bitwise

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?", ml_dtypes.bfloat16]
RNG = np.random.default_rng(0)


def arrays() -> dict[str, np.ndarray]:
    """Every dtype in odd sizes, so that nothing is aligned by accident; scalars; nothing at all."""
    found = {
        f"{np.dtype(dtype)}.{len(shape)}": RNG.integers(0, 2, shape).astype(dtype)
        for dtype in DTYPES
        for shape in ((), (3,), (5, 7))
    }
    found["empty"] = np.zeros((3, 0), np.float32)
    found["“quoted” name\n"] = np.array([np.nan, -0.0, np.inf], np.float16)
    return found


def awkward(array: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "transposed": array.T,
        "strided": array[::3, 1::2],
        "reversed": array[::-1, ::-1],
        "broadcast": np.broadcast_to(array[:, :1], array.shape),
        "swapped": array.reshape(4, -1, array.shape[1]).swapaxes(0, 1),
    }


def pack(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file made by hand; `header` is JSON, or text that may be none."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    expected = arrays()
    xxh3 = write_safetensors(path, expected, {"note": "kept"})
    contents = path.read_bytes()
    assert xxh3 == xxhash.xxh3_128(contents).hexdigest()
    length = int.from_bytes(contents[:8], "little")
    assert length % 8 == 0
    header = json.loads(contents[8 : 8 + length])
    for name, array in expected.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0, name  # can be mapped
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert_bitwise(found[name], array, name)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert_bitwise(as_numpy(tensor), expected[name], name)


def test_we_read_what_we_and_the_library_write(tmp_path: Path) -> None:
    expected = arrays()
    write_safetensors(tmp_path / "ours", expected)
    safetensors.numpy.save_file(expected, tmp_path / "theirs", {"note": "kept"})
    for path, note in ((tmp_path / "ours", {"format": "pt"}), (tmp_path / "theirs", {})):
        tensors, metadata = read_safetensors(path)
        assert metadata == note | ({"note": "kept"} if not note else {})
        assert set(tensors) == set(expected)
        for name, array in expected.items():
            assert tensors.headers[name].shape == array.shape
            assert tensors.headers[name].nbytes == array.nbytes
            for _ in range(2):
                assert_bitwise(tensors[name], array, name)


def test_what_is_read_is_a_view_of_the_file(tmp_path: Path) -> None:
    """Nothing is copied, and nobody can write to the file by way of an array."""
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"a": np.arange(3.0), "b": np.arange(4, dtype=np.float32)})
    tensors, _ = read_safetensors(path)
    for array in tensors.values():
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert type(array) is np.ndarray
    contents = bytearray(path.read_bytes())
    before = tensors["b"]
    contents[-4:] = np.float32(9).tobytes()
    with path.open("r+b") as file:
        file.write(contents)
    assert_bitwise(before, np.array([0, 1, 2, 9], np.float32), "the same view")


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    """A header of odd length: legal, and a trap for whoever casts pointers."""
    array = RNG.standard_normal(2).astype(np.float32)
    header = json.dumps({"a": entry(0, 8)}).encode()
    header += b" " * (-len(header) % 8 + 3)
    tensors, _ = read_safetensors(pack(tmp_path / "odd", header, array.tobytes()))
    assert tensors["a"].flags.aligned
    assert_bitwise(tensors["a"], array, "a")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [8, 1024])
def test_awkward_layouts_reach_the_disk_intact(tmp_path: Path, rows: int, dtype: Any) -> None:
    """In one chunk, and in several: safetensors 0.8.0 writes the buffers of these as they lie."""
    array = RNG.standard_normal((rows, 3072)).astype(dtype)
    assert (array.nbytes > CHUNK_BYTES) == (rows == 1024)
    expected = awkward(array)
    assert not any(each.flags.c_contiguous for each in expected.values())
    write_safetensors(tmp_path / "file", expected)
    found = safetensors.numpy.load_file(tmp_path / "file")
    for name, each in expected.items():
        assert_bitwise(found[name], np.ascontiguousarray(each), name)


@hypothesis.given(
    base=hypothesis.extra.numpy.arrays(
        np.uint16, hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=4, min_side=0)
    ),
    data=st.data(),
    nbytes=st.integers(1, 40),
)
def test_chunks_are_the_elements_in_order(base: np.ndarray, data: Any, nbytes: int) -> None:
    axes = data.draw(st.permutations(range(base.ndim)))
    steps = tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in axes)
    array = base.transpose(axes)[steps]
    chunks = list(contiguous_chunks(array, nbytes))
    assert all(chunk.flags.c_contiguous and chunk.ndim == 1 for chunk in chunks)
    assert all(chunk.nbytes <= max(nbytes, array.itemsize) for chunk in chunks)
    joined = np.concatenate([np.empty(0, np.uint16), *chunks])
    assert_bitwise(joined, np.ascontiguousarray(array).reshape(-1), "chunks")


@hypothesis.given(sizes=st.tuples(*[st.lists(st.integers(1, 5), max_size=6)] * 2))
def test_pairs_of_chunks_match(sizes: tuple[list[int], list[int]]) -> None:
    total = min(map(sum, sizes))
    numbers = np.arange(total)
    streams = [np.split(numbers, np.cumsum(each)[np.cumsum(each) < total]) for each in sizes]
    pairs = list(paired_chunks(*(iter([c for c in each if c.size]) for each in streams)))
    for left, right in pairs:
        assert_bitwise(left, right, "pair")
    assert sum(left.size for left, _ in pairs) == total


def test_a_tensor_that_is_not_what_it_said(tmp_path: Path) -> None:
    for array, message in (
        (np.zeros(3, np.float32), "declared 8 bytes and has 12"),
        (np.zeros(2, np.float64), "declared float32 and is float64"),
    ):
        lying = LazyTensor((2,), np.dtype(np.float32), lambda array=array: array)
        with pytest.raises(TypeError, match=message):
            write_safetensors(tmp_path / "file", Tensors({"a": lying}))


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 0, "truncated or not safetensors"),
        ({"a": entry(0, 8)}, b"", None, "truncated or not safetensors"),
        ({"a": entry(0, 8)}, bytes(9), None, "truncated or not safetensors"),
        ({"a": entry(1, 9)}, bytes(9), None, "truncated or not safetensors"),
        ({"a": entry(8, 0)}, bytes(8), None, "truncated or not safetensors"),
        ({"a": entry(0, 8, shape=(2**62, 2))}, bytes(8), None, "truncated or not safetensors"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), None, "truncated or not safetensors"),
        ({"a": entry(0, 8, dtype="F33")}, bytes(8), None, "truncated or not safetensors"),
        ({"__metadata__": {"a": 3}}, b"", None, "truncated or not safetensors"),
        (b"{}", b"", 2**63, "a header of 9,223,372,036,854,775,808 bytes in a file of 10"),
        (b"{}", b"", 3, "a header of 3 bytes in a file of 10"),
        ({"a": entry(0, 2, dtype="F8_E4M3")}, bytes(2), None, "a has dtype F8_E4M3; expected one"),
        (
            b'{"a":%(e)b,"a":%(e)b}' % {b"e": json.dumps(entry(0, 8)).encode()},
            bytes(8),
            None,
            "the header of .* is not valid JSON: duplicate key 'a'; one of the two must go",
        ),
    ],
)
def test_broken_files(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    path = pack(tmp_path / "broken", header, data, length)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    """Sparse: a file of 200 MB that says that most of it is header."""
    path = pack(tmp_path / "large", b"{", length=150_000_000)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match=r"150,000,000 bytes .* \(the format allows 100,000,"):
        read_safetensors(path)


def test_files_that_go_away(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_safetensors(path, {"a": np.zeros(5000)})
    tensors, _ = read_safetensors(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        tensors["a"]
    path.unlink()
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        tensors["a"]
    with pytest.raises(CheckpointError, match="does not exist"):
        read_safetensors(path)
    with pytest.raises(CheckpointError, match="is a folder, expected a regular file"):
        read_safetensors(tmp_path)


def test_dtypes_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a has dtype complex64; expected one of float64, "):
        write_safetensors(tmp_path / "file", {"a": np.zeros(2, np.complex64)})
