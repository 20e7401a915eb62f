"""A case, and the folder that holds them: a manifest, and a file of safetensors for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from alibi_spec.conformance.levels import LEVELS

DATA = Path(__file__).parent / "data"
MANIFEST = "manifest.json"

Arrays = Mapping[str, np.ndarray]


class DamagedKitError(OSError):
    """A file of the kit is not the one that its manifest describes."""


@dataclass(frozen=True)
class Case:
    """One call of one function, and what it must return.

    Attributes:
        level: of `LEVELS`.
        name: unique within the level.
        shows: which mistakes it is there for.
        budget: of what is expected: "exact", "forward", "gradient" or "training" (README.md).
        options: arguments that are no arrays, as plain JSON values, among them `config`.
        inputs: arguments that are arrays; "parameters/NAME" is an entry of `parameters`.
        expected: what the function returns, by name, in the order of computation; float32, -inf
            where a logit is masked, or integers.
    """

    level: str
    name: str
    shows: str
    budget: str
    options: Mapping[str, Any]
    inputs: Arrays
    expected: Arrays

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.level}/{self.name}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the function by name, arrays read-only."""
        found: dict[str, Any] = dict(self.options)
        for path, array in self.inputs.items():
            name, _, entry = path.partition("/")
            view = array.view()
            view.setflags(write=False)
            if entry:
                found.setdefault(name, {})[entry] = view
            else:
                found[name] = view
        return found


def write_cases(cases: Iterable[Case], folder: Path = DATA) -> None:
    """Write every case into `folder`, and a manifest with the SHA-256 of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        data, file = _packed(case), f"{case.level}-{case.name}.safetensors"
        (folder / file).write_bytes(data)
        row = {name: getattr(case, name) for name in ("level", "name", "shows", "budget")}
        row |= {"file": file, "sha256": hashlib.sha256(data).hexdigest()}
        row |= {"inputs": [*case.inputs], "expected": [*case.expected], "options": case.options}
        rows.append(json.dumps(row, ensure_ascii=False))
    lines = ",\n".join(rows)
    text = f'{{"format": "alibi-conformance", "version": 1, "cases": [\n{lines}\n]}}\n'
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_cases(levels: Iterable[str] = tuple(LEVELS), folder: Path = DATA) -> Iterator[Case]:
    """The cases of these levels, in the order of `LEVELS`.

    Raises:
        DamagedKitError: a file is not the one whose hash is in the manifest.
        OSError: a file is missing.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    wanted = set(levels)
    for row in manifest["cases"]:
        if row["level"] in wanted:
            yield _read(row, folder / row["file"])


def _packed(case: Case) -> bytes:
    groups = (("inputs", case.inputs), ("expected", case.expected))
    return save(
        {
            f"{group}/{name}": np.asarray(array, order="C")
            for group, arrays in groups
            for name, array in arrays.items()
        }
    )


def _read(row: Mapping[str, Any], file: Path) -> Case:
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != row["sha256"]:
        raise DamagedKitError(
            f"{file} is damaged: its SHA-256 is {found}, expected {row['sha256']}; install "
            "alibi-duo again, or write the kit with `python -m alibi_spec.conformance`"
        )
    arrays = load(data)
    inputs, expected = (
        {name: arrays[f"{group}/{name}"] for name in row[group]} for group in ("inputs", "expected")
    )
    told = (row[name] for name in ("level", "name", "shows", "budget", "options"))
    return Case(*told, inputs=inputs, expected=expected)
