"""The container of GGUF: what its header says, checked before anything is believed, and writing it.

gguf's own reader follows counts without end and takes what lies past the end of the file for empty.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.gguf import shortest
from alibi_convert.files import open_regular, require_regular
from alibi_convert.formats.safetensors import view_of_file
from alibi_convert.machine import require
from alibi_convert.tensors import LazyTensor, Tensors

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32
_MAX_AXES = 4
_MAX_HEADER_BYTES = 2**26  # a vocabulary of a quarter of a million tokens takes a sixth of it
_LEAST_ENTRY = 13  # bytes of a key with a value, or of a tensor's entry, at least
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}

_DTYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_QUANTISED = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


class _Damaged(Exception):
    """What is wrong with a file, in words."""


@dataclass
class _Cursor:
    """A place in the header of a file; nothing is read, or counted, beyond where it can end."""

    file: BinaryIO
    left: int  # bytes

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise _Damaged(f"{count:,} bytes are announced where {self.left:,} are left")
        self.left -= count
        return self.file.read(count)

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        contents = self.bytes(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", contents)

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def string(self) -> str:
        length = int.from_bytes(self.bytes(8), "little")  # there may be half a million of them
        return self.bytes(length).decode()

    def count(self, what: str, least: int) -> int:
        """How many of something follow, each of at least so many bytes."""
        found = self.number("Q")
        if found * least > self.left:
            raise _Damaged(f"{found:,} {what} are announced where {self.left:,} bytes are left")
        return found

    def value(self) -> Any:
        return self._value(self.number("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner = self.number("I")
            if inner == _STRING:
                return [self.string() for _ in range(self.count("strings", 8))]
            if inner not in _SCALARS:
                raise _Damaged(f"an array has elements of type {inner}")
            return list(self.numbers(_SCALARS[inner], self.count("numbers", 1)))
        if kind not in _SCALARS:
            raise _Damaged(f"a value has the type {kind}")
        found = self.number(_SCALARS[kind])
        return shortest(found) if kind == _FLOAT32 else found


def read_gguf(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file, unread, and its metadata; what is read is a view of the file.

    Raises:
        CheckpointError: missing, truncated, not GGUF, big-endian, a part of several files, with a
            name that is there twice, or with tensors that are not floats.
    """
    size = require_regular(path).st_size
    with open_regular(path) as file:
        cursor = _Cursor(file, min(size, _MAX_HEADER_BYTES))
        try:
            metadata, entries = _header(cursor)
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
                raise _Damaged(f"general.alignment is {alignment!r}, expected a power of two")
            start = file.tell() + -file.tell() % alignment
            ends = {name: start + entry.offset + entry.nbytes for name, entry in entries.items()}
            for name, end in ends.items():
                if end > size:
                    raise _Damaged(f"{name} ends at byte {end:,} of {size:,}")
        except (_Damaged, UnicodeDecodeError, struct.error) as error:
            raise CheckpointError(f"{path} is truncated or not GGUF: {error}") from None
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):  # 0 in what llama-gguf-split has merged
        raise CheckpointError(
            f"{path} is one of {parts} files of a model; join them first (llama.cpp: "
            "llama-gguf-split --merge)"
        )
    headers = {name: _lazy(path, name, entry, start) for name, entry in entries.items()}
    return Tensors(headers), metadata


@dataclass(frozen=True)
class _Entry:
    """What the header says about one tensor; the shape is in our order."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def nbytes(self) -> int:
        dtype = _DTYPES.get(self.kind)
        return 0 if dtype is None else math.prod(self.shape) * dtype.itemsize


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    if cursor.bytes(len(_MAGIC)) != _MAGIC:
        raise _Damaged("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise _Damaged(
            "it is big-endian; convert it first (gguf: gguf-convert-endian)"
            if is_swapped
            else f"it has version {version}; expected {' or '.join(map(str, _VERSIONS))}"
        )
    tensors = cursor.count("tensors", _LEAST_ENTRY)
    keys = cursor.count("keys", _LEAST_ENTRY)
    metadata = _collected(cursor, keys, lambda: cursor.value())
    return metadata, _collected(cursor, tensors, lambda: _entry(cursor))


def _collected(cursor: _Cursor, count: int, read: Callable[[], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in found:
            raise _Damaged(f"{name} is there twice")
        found[name] = read()
    return found


def _entry(cursor: _Cursor) -> _Entry:
    axes = cursor.number("I")
    if axes > _MAX_AXES:
        raise _Damaged(f"a tensor has {axes:,} axes")
    shape = cursor.numbers("Q", axes)[::-1]
    return _Entry(shape, cursor.number("I"), cursor.number("Q"))


def _lazy(path: Path, name: str, entry: _Entry, start: int) -> LazyTensor:
    if entry.kind not in _DTYPES:
        kind = _QUANTISED.get(entry.kind, f"of type {entry.kind}")
        raise CheckpointError(
            f"{path}: {name} is {kind}, which is quantised or no float; take the model's file of "
            "F32, F16 or BF16"
        )
    dtype, at = _DTYPES[entry.kind], start + entry.offset
    return LazyTensor(entry.shape, dtype, lambda: view_of_file(path, dtype, entry.shape, at))


def write_gguf(
    path: Path, architecture: str, tensors: Tensors, metadata: Mapping[str, Any]
) -> None:
    """One file, a few megabytes of it in memory at a time.

    Args:
        path: of the file.
        architecture: what `general.architecture` says.
        tensors: by llama.cpp's names.
        metadata: by whole keys; an integer is written as uint32, or int32 in a list, a float as
            float32.

    Raises:
        ValueError: gguf is not installed.
    """
    require("gguf", "gguf", "writing .gguf")
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, header in tensors.headers.items():
        kind = GGMLQuantizationType(_TYPES[header.dtype])
        writer.add_tensor_info(name, header.shape, header.dtype, header.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = (writer.fout or [])[0]  # one, for nothing is split
        for header in tensors.headers.values():
            writer.write_padding(file, file.tell())
            for chunk in header.chunks():
                file.write(chunk.view(np.uint8).data)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
