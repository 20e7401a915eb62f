"""One safetensors file: checked first, read as views of it, written as a stream.

The library's own writer wants a whole shard in memory, garbles strided arrays (0.8.0), and its
reader accepts a name that is there twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from alibi_convert.errors import CheckpointError
from alibi_convert.files import open_regular, parse_json, require_regular
from alibi_convert.formats.config_file import config_json, parse_config, with_sidecar
from alibi_convert.formats.format import Asked, Format, Opened
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_spec import ALiBiConfig

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
_CONFIG = "alibi_config"  # the key of our configuration in it

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one file, unread, and its metadata; what is read is a view of the file.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or with a name that is there twice.
    """
    header, data_start = _read_header(path)
    metadata = header.pop(_METADATA, None) or {}
    headers = {name: _lazy(path, name, entry, data_start) for name, entry in header.items()}
    return Tensors(headers), metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = require_regular(path).st_size
    with open_regular(path) as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or not safetensors: a header of {length:,} bytes in a file "
                f"of {size:,} (the format allows {MAX_HEADER_BYTES:,})"
            )
        text = file.read(length)
    try:
        with safe_open(path, framework="numpy"):  # checks dtypes, shapes and offsets
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from None
    return parse_json(text, f"the header of {path}"), _LENGTH_BYTES + length


def _lazy(path: Path, name: str, entry: Any, data_start: int) -> LazyTensor:
    # The library takes a list for an object, and an object for a string.
    if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):
        raise CheckpointError(
            f"the header of {path} says {json.dumps(entry)} of {name}, expected an object with "
            "dtype, shape and data_offsets"
        )
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}"
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start = data_start + entry["data_offsets"][0]
    return LazyTensor(shape, dtype, lambda: view_of_file(path, dtype, shape, start))


def view_of_file(path: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
    """The array that begins at a byte of a file, read-only and unread.

    Raises:
        CheckpointError: the file is gone, or too short.
    """
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    try:
        view = np.memmap(path, dtype, mode="r", offset=start, shape=shape).view(np.ndarray)
    except (OSError, ValueError) as error:  # gone, or shorter than when it was opened
        raise CheckpointError(f"{path} has changed since it was opened: {error}") from None
    # The format does not align data, and few libraries check alignment before they cast a pointer.
    return view if view.flags.aligned else view.copy()


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> str:
    """One file, a few megabytes in memory at a time, flushed to the disk; its XXH3.

    Raises:
        CheckpointError: a dtype that the format lacks.
    """
    headers = (tensors if isinstance(tensors, Tensors) else Tensors.of(tensors)).headers
    # Wide elements first, so that each tensor is aligned when the file is mapped.
    headers = dict(sorted(headers.items(), key=lambda item: -item[1].dtype.itemsize))
    start = _header(headers, {"format": "pt", **(metadata or {})})
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        file.write(start)
        digest.update(start)
        for name, header in headers.items():
            written = 0
            for chunk in header.chunks():
                if chunk.dtype != header.dtype:
                    raise TypeError(f"{name} was declared {header.dtype} and is {chunk.dtype}")
                data = chunk.view(np.uint8).data
                file.write(data)
                digest.update(data)
                written += data.nbytes
            if written != header.nbytes:
                raise TypeError(f"{name} was declared {header.nbytes} bytes and has {written}")
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest()


def _header(headers: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, header in headers.items():
        if header.dtype not in _DTYPE_NAMES:
            known = ", ".join(map(str, _DTYPE_NAMES))
            raise CheckpointError(f"{name} has dtype {header.dtype}; expected one of {known}")
        start, end = end, end + header.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def recognises(path: Path) -> bool:
    """By the name."""
    return path.suffix == ".safetensors"


def read(path: Path, _: Asked) -> Opened:
    """The tensors, and the configuration that we put into the metadata, if it is there."""
    tensors, metadata = read_safetensors(path)
    carried = None
    if _CONFIG in metadata:
        origin = f"metadata of {path}"
        carried = parse_config(parse_json(metadata[_CONFIG], origin), origin)
    return Opened("safetensors", path, with_sidecar(path), tensors, carried)


def write(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
    """A torch state dict in one file, with the configuration in its metadata."""
    return {path.name: write_safetensors(path, tensors, {_CONFIG: config_json(config)})}


FORMAT = Format("torch state dict", ".safetensors", write, recognises, read, streams=True)
