"""GGUF, the files of llama.cpp: one of the families that it runs, with its tokenizer.

llama.cpp wants norms, biases and token types in float32 whatever the dtype of the matrices is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families import export_tensors
from alibi_convert.families.gguf import ARCHITECTURES, architecture_named, architecture_of
from alibi_convert.formats.format import Asked, Format, Opened
from alibi_convert.formats.gguf_file import read_gguf, write_gguf
from alibi_convert.formats.gguf_tokenizer import (
    HELD,
    Companion,
    companions,
    has_tokenizer,
    tokenizer_metadata,
    why_not_rebuilt,
)
from alibi_convert.tensors import DTYPES, LazyTensor, Tensors
from alibi_spec import ALiBiConfig

_ARCHITECTURE = "general.architecture"
# What a file says about itself, not about what the model computes.
_ABOUT = ("general.", "tokenizer.", "split.", "quantize.")
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
_QUANTIZATION_VERSION = 2
_TYPE_COUNT = "tokenizer.ggml.token_type_count"  # which is the model's, whatever its name says


def recognises(path: Path) -> bool:
    """By the name."""
    return path.suffix == ".gguf"


def read(path: Path, _: Asked) -> Opened:
    """The tensors of a family that llama.cpp runs, and its metadata as their configuration.

    Raises:
        CheckpointError: as for `read_gguf`, or another architecture.
    """
    tensors, metadata = read_gguf(path)
    architecture = architecture_named(metadata.get(_ARCHITECTURE), tensors)
    if architecture is None:
        raise CheckpointError(
            f"{path} holds a model of the architecture {metadata.get(_ARCHITECTURE)!r}; with "
            f"ALiBi are known: {', '.join(dict.fromkeys(each.name for each in ARCHITECTURES))}"
        )
    own = {
        name.removeprefix(f"{architecture.name}."): value
        for name, value in metadata.items()
        if not name.startswith(_ABOUT)
    }
    lost = why_not_rebuilt(metadata) if has_tokenizer(metadata) else None
    return Opened(
        "gguf",
        path,
        {path.name: path},
        architecture.settled(tensors),
        foreign={"model_type": architecture.label, **own},
        left={} if lost is None else {"tokenizer": lost},
        inside=lambda: companions(metadata),
    )


def held(path: Path) -> dict[str, bytes]:
    """The companions that a file holds, by name.

    Raises:
        CheckpointError: as for `read_gguf`.
    """
    return companions(read_gguf(path)[1])


def stored(config: ALiBiConfig, tensors: Tensors) -> Tensors:
    """The tensors under llama.cpp's names.

    Raises:
        CheckpointError: llama.cpp cannot express the configuration, or a tensor has a dtype that it
            does not compute in.
    """
    for name, header in tensors.headers.items():
        if str(header.dtype) not in _FILE_TYPES:
            raise CheckpointError(
                f"{name} is {header.dtype}, which llama.cpp does not compute in; choose another "
                f"dtype (--dtype): {', '.join(_FILE_TYPES)}"
            )
    return export_tensors(architecture_of(config).family, config, tensors)


def dtype(name: str, header: LazyTensor, asked: np.dtype | None) -> np.dtype:
    """Vectors and token types stay in float32, or become it."""
    is_added = len(header.shape) == 1 or name == "token_type_embedding.weight"
    return DTYPES["float32"] if is_added else asked or header.dtype


def _tokenizer(config: ALiBiConfig, companion: Companion) -> dict[str, Any]:
    name = architecture_of(config).name
    return tokenizer_metadata(companion, config.vocab_size or 0, name)


def _no_companion(_: str) -> None:
    return None


def write(
    path: Path,
    config: ALiBiConfig,
    tensors: Tensors,
    companion: Companion = _no_companion,
    **_: Any,
) -> dict[str, str]:
    """A model and its tokenizer in one file; whatever llama.cpp cannot express is refused."""
    foreign = stored(config, tensors)
    architecture = architecture_of(config)
    matrices = [str(header.dtype) for header in foreign.headers.values() if len(header.shape) > 1]
    metadata = {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[matrices[0]],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture.name}.{key}": each for key, each in architecture.write(config).items()},
        **_tokenizer(config, companion),
    }
    if config.type_vocab_size is not None:
        metadata[_TYPE_COUNT] = config.type_vocab_size
    write_gguf(path, architecture.name, foreign, metadata)
    return {}


FORMAT = Format(
    "file that llama.cpp runs",
    ".gguf",
    write,
    recognises,
    read,
    streams=True,
    library=("gguf", "gguf"),
    stored=stored,
    dtype=dtype,
    holds=HELD,
    check=_tokenizer,
)
