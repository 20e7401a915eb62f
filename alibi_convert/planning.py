"""What a conversion would do, only from headers: no tensor data is read, nothing is written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from alibi_convert.carrying import carried
from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.conversion import settle
from alibi_convert.errors import CheckpointError
from alibi_convert.formats import FORMATS
from alibi_convert.formats.format import Format
from alibi_convert.formats.shards import shard_names
from alibi_convert.machine import available_memory, existing_parent, free_bytes, is_installed
from alibi_convert.tensors import CHUNK_BYTES, LazyTensor, Tensors
from alibi_convert.writing.atomic import check_destination
from alibi_convert.writing.provenance import reader_of_companions

_INTERPRETER_BYTES = 100 * 10**6  # Python, NumPy and a few chunks


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor on its way.

    Attributes:
        sources: its name or names in the source.
        shape: as in the canonical layout.
        source_dtype, dtype: before and after.
        nbytes: after.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Problem:
    """Something in the way.

    Attributes:
        cause: what is wrong.
        mend: how to fix it.
        stops: whether the conversion would fail, or merely lose something.
    """

    cause: str
    mend: str
    stops: bool


@dataclass(frozen=True)
class Plan:
    """What a conversion would do.

    Attributes:
        source: as given.
        source_format, destination_format, family: as in `Report`.
        config: of the model.
        tensors: by canonical name.
        stored: shape of every tensor as the destination names it and lays it out.
        files: names of the tensors, as the destination names them, in each file.
        dropped, optimizer, adapter, folded, ignored: as in `Report`.
        nbytes: of all tensors in the destination.
        peak_memory_bytes: estimated need of the conversion.
        free_disk_bytes: where the destination would be, if the file system says.
        problems: what would stop the conversion, or lose something.
    """

    source: str
    source_format: str
    destination_format: str
    family: str
    config: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    stored: dict[str, tuple[int, ...]]
    files: dict[str, list[str]]
    dropped: dict[str, str]
    optimizer: dict[str, Any]
    adapter: dict[str, Any]
    folded: dict[str, str]
    ignored: dict[str, Any]
    nbytes: int
    peak_memory_bytes: int
    free_disk_bytes: int | None
    problems: tuple[Problem, ...]

    @property
    def possible(self) -> bool:
        """Nothing known now would stop the conversion."""
        return not any(problem.stops for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {**asdict(self), "possible": self.possible}


def plan(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    to: str | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    **reading: Unpack[Reading],
) -> Plan:
    """What `convert` with the same arguments would do; the destination may be left open.

    Raises:
        CheckpointError: the source cannot be read at all.
        ValueError: unknown `to`, `dtype` or `max_shard_size`.
    """
    place = Path("converted" if destination is None else os.path.expanduser(destination))
    if destination is None and to in FORMATS:
        place = place.with_suffix(FORMATS[to].suffix)
    target = settle(place, to, dtype, max_shard_size)
    checkpoint, form = open_checkpoint(source, **reading), FORMATS[target.format]
    wanted = target.cast(checkpoint).tensors
    optimizer = carried(checkpoint, target.format, is_planned=True)
    problems = []
    if destination is not None:
        problems += _destination_problems(place, overwrite)
    stored = Tensors({})
    try:
        stored = form.stored(checkpoint.config, wanted)
        form.check(checkpoint.config, reader_of_companions(checkpoint))
    except CheckpointError as error:
        problems.append(Problem(str(error), "choose another format", stops=True))
    merged = Tensors({}) if checkpoint.merged is None else checkpoint.merged.added
    headers = [header for each in (wanted, stored, merged) for header in each.headers.values()]
    peak = _peak_memory(form, headers, wanted.nbytes + optimizer.nbytes)
    problems += [*_disk_problems(place, wanted.nbytes + optimizer.nbytes), *_memory_problems(peak)]
    problems += [*_library_problems(target.format), *_cast_problems(checkpoint, dtype)]
    single = {place.name: list(stored)}
    sharded = not form.suffix and form.streams
    return Plan(
        source=checkpoint.source,
        source_format=checkpoint.format,
        destination_format=target.format,
        family=checkpoint.family,
        config=checkpoint.config.to_dict(),
        tensors=_rows(checkpoint, wanted),
        stored=stored.shapes,
        files=shard_names(stored.headers, target.max_shard_bytes) if sharded else single,
        dropped=dict(optimizer.dropped),
        optimizer=optimizer.to_dict(),
        adapter=checkpoint.adapter,
        folded=dict(checkpoint.folded),
        ignored=dict(checkpoint.ignored),
        nbytes=wanted.nbytes,
        peak_memory_bytes=peak,
        free_disk_bytes=free_bytes(place),
        problems=tuple(problems),
    )


def _rows(checkpoint: Checkpoint, wanted: Tensors) -> dict[str, PlannedTensor]:
    before = checkpoint.tensors.headers
    return {
        name: PlannedTensor(
            sources=checkpoint.origins.get(name, (name,)),
            shape=header.shape,
            source_dtype=str(before[name].dtype),
            dtype=str(header.dtype),
            nbytes=header.nbytes,
        )
        for name, header in wanted.headers.items()
    }


def _peak_memory(form: Format, headers: list[LazyTensor], nbytes: int) -> int:
    if not form.streams:
        return _INTERPRETER_BYTES + 2 * nbytes
    largest = max((header.nbytes for header in headers), default=0)
    return _INTERPRETER_BYTES + 2 * max(largest, CHUNK_BYTES)


def _destination_problems(destination: Path, overwrite: bool) -> list[Problem]:
    try:
        check_destination(destination, overwrite)
    except CheckpointError as error:
        cause, _, mend = str(error).rpartition("; ")
        return [Problem(cause, mend, stops=True)]
    return []


def _disk_problems(destination: Path, nbytes: int) -> list[Problem]:
    problems = []
    free, parent = free_bytes(destination), existing_parent(destination)
    if not os.access(parent, os.W_OK):
        cause = f"{parent} cannot be written"
        problems.append(Problem(cause, "choose a folder that you may write to", stops=True))
    if free is not None and nbytes > free:
        cause = f"{nbytes:,} bytes are needed, {free:,} are free"
        problems.append(Problem(cause, "make room or choose another disk", stops=True))
    return problems


def _memory_problems(peak: int) -> list[Problem]:
    available = available_memory()
    if available is None or peak <= available:
        return []
    cause = f"about {peak:,} bytes of memory are needed, {available:,} are available"
    return [Problem(cause, "choose a format that streams: a folder or .safetensors", stops=False)]


def _library_problems(to: str) -> list[Problem]:
    library = FORMATS[to].library
    if library is None or is_installed(library[0]):
        return []
    cause = f"writing {to} needs {library[0]}, which is not installed"
    return [Problem(cause, f"pip install 'alibi-duo[{library[1]}]'", stops=True)]


def _cast_problems(checkpoint: Checkpoint, dtype: str | None) -> list[Problem]:
    sources = {header.dtype for header in checkpoint.tensors.headers.values()}
    narrow = [str(each) for each in sources if str(each) != "float16"] if dtype == "float16" else []
    if not narrow:
        return []
    cause = f"values of {', '.join(sorted(narrow))} beyond 65504 do not fit float16"
    return [Problem(cause, "choose bfloat16, or see whether it converts", stops=False)]
