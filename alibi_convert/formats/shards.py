"""The files with a folder's weights: one of safetensors, or shards with an index, or pickles.

Names and layouts of tensors stay as they are; `families` decides what they mean.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.formats.pt import PICKLE_SUFFIXES, load_pickle, require_consent, state_dict
from alibi_convert.formats.safetensors import read_safetensors, write_safetensors
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_convert.writing.journal import Journal
from alibi_convert.writing.layout import (
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    WEIGHTS_FILE,
)

MAX_SHARD_BYTES = 5 * 10**9
_WRITERS = 2  # shards at a time: most of the work is the kernel's, and it does two at once
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500MB" or a plain number, in powers of 1000.

    Raises:
        ValueError: not a positive size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(text).strip().upper())
    size = int(Fraction(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size; expected bytes, or a number with KB, MB, GB, TB")
    return size


def read_tensors(folder: Path, allow_pt: bool = False) -> Tensors:
    """The tensors, unread, of a folder with safetensors, or with pickles that are allowed.

    Raises:
        CheckpointError: a file is missing, broken, or the index and the shards disagree.
    """
    return read_weights(folder, allow_pt)[0]


def read_weights(folder: Path, allow_pt: bool) -> tuple[Tensors, list[str]]:
    """`read_tensors`, and the names of their files: the index, if there is one, and the shards."""
    index, shards = _shards(folder, allow_pt)
    headers: dict[str, LazyTensor] = {}
    for shard, listed in shards.items():
        tensors = _read_shard(folder / shard, allow_pt)
        twice = sorted(headers.keys() & set(tensors))
        if twice:
            raise CheckpointError(f"{folder / shard} holds {twice[0]} a second time; remove one")
        if listed is not None and listed != set(tensors):
            odd = sorted(listed ^ set(tensors))
            raise CheckpointError(f"{folder / shard} and the index disagree about {', '.join(odd)}")
        headers.update(tensors.headers)
    return Tensors(headers), [*index, *shards]


def _shards(folder: Path, allow_pt: bool) -> tuple[list[str], Mapping[str, set[str] | None]]:
    """The name of the index, or none; and of every shard, with the tensors that the index lists."""
    pickles = (PICKLE_INDEX_FILE, PICKLE_FILE) if allow_pt else ()
    for file in (INDEX_FILE, WEIGHTS_FILE, *pickles):
        path = folder / file
        if not path.exists():
            continue
        if file in (WEIGHTS_FILE, PICKLE_FILE):
            return [], {file: None}
        return [file], _listed(path)
    for stem, suffix in (
        ("model", "safetensors"),
        *([("pytorch_model", "bin")] if allow_pt else []),
    ):
        shards = _numbered_shards(folder, stem, suffix)
        if shards:
            return [], dict.fromkeys(shards)
    found = [name for name in (PICKLE_INDEX_FILE, PICKLE_FILE) if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("pytorch_model-*-of-*.bin"))
    if found:
        require_consent(folder / found[0], allow_pt)
    raise CheckpointError(
        f"{folder} holds no weights: {WEIGHTS_FILE} does not exist, nor does {INDEX_FILE}, "
        f"{PICKLE_FILE} or {PICKLE_INDEX_FILE}"
    )


def _numbered_shards(folder: Path, stem: str, suffix: str) -> list[str]:
    """Shards without an index, which their own numbers tell to be complete; or none."""
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
    found = {path.name: pattern.fullmatch(path.name) for path in folder.iterdir()}
    numbers = {name: (int(each[1]), int(each[2])) for name, each in found.items() if each}
    for name, (_, count) in sorted(numbers.items()):
        for number in range(1, count + 1):
            other = f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
            if other not in numbers:
                raise CheckpointError(
                    f"{folder} has {name} and no {other}; the checkpoint is incomplete"
                )
        if len(numbers) != count:
            raise CheckpointError(
                f"{folder} has shards of several checkpoints ({', '.join(sorted(numbers)[:4])}); "
                f"remove those that are not meant, or add {stem}.{suffix}.index.json"
            )
    return sorted(numbers)


def _listed(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard, as the index lists them."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to file names")
    for shard in weight_map.values():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index} has no weight_map from tensors to file names")
        # A plain name may still be a symbolic link: that is how download caches share files.
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".."):
            raise CheckpointError(f"{index} names {shard!r}, outside the folder")
    shards: dict[str, set[str]] = {shard: set() for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        shards[shard].add(name)
    return shards


def _read_shard(path: Path, allow_pt: bool) -> Tensors:
    if path.suffix in PICKLE_SUFFIXES:
        return state_dict(load_pickle(path, allow_pt), path)
    if not os.path.exists(path):  # unlike Path.exists, False for names that no file can have
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete")
    return read_safetensors(path)[0]


def write_tensors(
    folder: Path,
    tensors: Tensors,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    journal: Journal | None = None,
) -> dict[str, str]:
    """One safetensors file, or shards with an index, into an existing folder.

    Files that a journal knows to be whole are kept.

    Returns:
        the XXH3 of every file with weights, by name.
    """
    files = shard_names(tensors.headers, max_shard_bytes)
    is_over = threading.Event()

    def write(file: str) -> str:
        part = {name: _until(is_over, tensors.headers[name]) for name in files[file]}
        return _write_shard(folder / file, Tensors(part), journal)

    with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
        try:
            hashes = dict(zip(files, pool.map(write, files), strict=True))
        finally:  # an error or an interruption does not wait for gigabytes to be written
            is_over.set()
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        contents = {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return hashes


def _until(is_over: threading.Event, tensor: LazyTensor) -> LazyTensor:
    """The tensor, as long as it is of use."""

    def stream() -> Iterator[np.ndarray]:
        for chunk in tensor.chunks():
            if is_over.is_set():
                raise CancelledError
            yield chunk

    return replace(tensor, stream=stream)


def _write_shard(path: Path, tensors: Tensors, journal: Journal | None) -> str:
    kept = None if journal is None else journal.finished(path)
    if kept is not None:
        return kept
    xxh3 = write_safetensors(path, tensors)
    if journal is not None:
        journal.record(path, xxh3)
    return xxh3


def shard_names(
    headers: Mapping[str, LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[str]]:
    """The names of the tensors in each file that `write_tensors` writes."""
    shards = list(_split(headers, max_shard_bytes))
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _split(headers: Mapping[str, LazyTensor], max_shard_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, header in headers.items():
        if names and size + header.nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += header.nbytes
    yield names
