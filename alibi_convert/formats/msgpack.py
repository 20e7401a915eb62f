"""Flax params in msgpack, read strictly: flax's own reader takes a key twice and trusts chunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.files import open_regular, without_duplicates
from alibi_convert.formats.config_file import read_sidecar, with_sidecar, write_sidecar
from alibi_convert.formats.format import Asked, Beside, Format, Opened
from alibi_convert.formats.train_state import at, beside_params, find_params
from alibi_convert.machine import require
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig

# The types that flax adds to msgpack.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"  # marks an array of more than a gigabyte, in pieces
# The arrays that JAX has, by the names that flax writes.
_DTYPES = {
    str(np.dtype(kind)).encode(): np.dtype(kind)
    for kind in (
        *(np.bool_, np.float16, np.float32, np.float64, np.complex64, np.complex128),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4),
    )
}


def load_msgpack(path: Path) -> Any:
    """What `flax.serialization.msgpack_serialize` wrote: a tree whose arrays are NumPy's.

    Raises:
        CheckpointError: not that, truncated, or saying two things under one key.
    """
    require("msgpack", "flax", "reading .msgpack")
    import msgpack
    from msgpack.exceptions import UnpackException

    with open_regular(path) as file:
        try:
            # From a file: of a huge one no more is read than it claims to need.
            unpacker = msgpack.Unpacker(
                file,
                max_buffer_size=0,
                ext_hook=_unpack,
                object_pairs_hook=_joined,
            )
            tree = unpacker.unpack()
            if unpacker.tell() != path.stat().st_size:
                raise ValueError("something follows its end")
        except (UnpackException, ValueError, TypeError, RecursionError) as error:
            cause = str(error) or type(error).__name__
            raise CheckpointError(f"{path} is truncated or not Flax msgpack: {cause}") from None
    return tree


def _unpack(code: int, data: bytes) -> Any:
    import msgpack

    if code in (_ARRAY, _SCALAR):
        shape, name, buffer = msgpack.unpackb(data, raw=True)
        _require_sizes(shape)
        if not isinstance(name, bytes) or name not in _DTYPES:
            raise ValueError(f"an array has the dtype {name!r}")
        return np.frombuffer(buffer, _DTYPES[name]).reshape(shape)
    if code == _COMPLEX:
        real, imaginary = msgpack.unpackb(data)
        return complex(real, imaginary)
    raise ValueError(f"it holds the unknown type {code}")


def _joined(pairs: list[tuple[str, Any]]) -> Any:
    """A mapping, or the array whose pieces it holds."""
    tree = without_duplicates(pairs)
    if _CHUNKED not in tree:
        return tree
    if set(tree) != {_CHUNKED, "shape", "chunks"}:
        raise ValueError("an array in pieces lacks its shape or its chunks")
    shape, chunks = (_in_order(tree[name]) for name in ("shape", "chunks"))
    _require_sizes(shape)
    if not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise ValueError("the pieces of an array are not flat arrays")
    if len({chunk.dtype for chunk in chunks}) != 1 or math.prod(shape) != sum(map(len, chunks)):
        raise ValueError("the pieces of an array do not make up its shape")
    return np.concatenate(chunks).reshape(shape)


def _in_order(values: Any) -> list[Any]:
    """The values of {"0": …, "1": …}, as flax writes tuples."""
    numbers = [str(i) for i in range(len(values))] if isinstance(values, dict) else []
    if not isinstance(values, dict) or set(numbers) != set(values):
        raise ValueError("the shape or the pieces of an array are not numbered")
    return [values[number] for number in numbers]


def _require_sizes(shape: Any) -> None:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has the shape {shape!r}")


def recognises(path: Path) -> bool:
    """By the name."""
    return path.suffix == ".msgpack"


def read(path: Path, asked: Asked) -> Opened:
    """Flax params, or a training state with them, and what is beside them.

    Raises:
        CheckpointError: truncated, not msgpack, or not the params of this configuration.
    """
    config = asked.settle(read_sidecar(path))
    tree = load_msgpack(path)
    found, left = find_params(tree, path)
    tensors = Tensors.of(canonical_tensors(found.params, config))
    optimizer = None
    if found.optimizer:
        name = "/".join(found.optimizer)
        optimizer = Beside(name, "optax", lambda: at(tree, found.optimizer))
    return Opened(
        *("msgpack", path, with_sidecar(path), tensors, config), left=left, optimizer=optimizer
    )


def write(
    path: Path, config: ALiBiConfig, tensors: Tensors, optimizer: Any = None, **_: Any
) -> dict[str, str]:
    """Flax params, and their configuration in another file.

    With an optimizer's state they are in the tree of a `TrainState`.
    """
    require("flax", "flax", "writing .msgpack")
    from flax import serialization

    path.write_bytes(serialization.to_bytes(beside_params(flax_tree(tensors, config), optimizer)))
    write_sidecar(path, config)
    return {}


FORMAT = Format("Flax params", ".msgpack", write, recognises, read, library=("flax", "flax"))
