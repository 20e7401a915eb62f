"""The journal of a conversion that may be killed: its task, and which files are finished."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.writing.hashing import file_xxh3


class Journal:
    """A file that says how far a conversion got; replaced as a whole each time it is written.

    Attributes:
        task: source, configuration and target, as plain JSON values.
        files: name -> XXH3 of every file that was finished.
        notes: other facts about the finished files: dicts by name.
        kept: names of files that need not be written again.
    """

    def __init__(self, path: Path, task: Mapping[str, Any]) -> None:
        self._path = path
        self.task = dict(task)
        self.files: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self.kept: list[str] = []
        self._lock = threading.Lock()

    @classmethod
    def resumed(cls, path: Path, task: Mapping[str, Any]) -> Journal:
        """The journal that a killed run left.

        Raises:
            CheckpointError: that run was asked for something else, or its source has changed.
        """
        values = read_json(path)
        before = values.get("task")
        if before != task:
            known = before if isinstance(before, dict) else {}
            changed = [key for key, value in task.items() if known.get(key) != value]
            raise CheckpointError(
                f"the run that {path} describes differs from this one in "
                f"{', '.join(changed) or 'its task'}; start anew, without resume (--resume)"
            )
        journal = cls(path, task)
        journal.files = dict(values.get("files", {}))
        journal.notes = dict(values.get("notes", {}))
        return journal

    def finished(self, path: Path) -> str | None:
        """The XXH3 of a file that is whole, None for one that must be written."""
        expected = self.files.get(path.name)
        if expected is None or not path.is_file() or file_xxh3(path) != expected:
            return None
        self.kept.append(path.name)
        return expected

    def size(self, folder: Path) -> int:
        """Bytes of the files in this folder that a killed run finished."""
        found = [folder / name for name in self.files if (folder / name).is_file()]
        return sum(path.stat().st_size for path in found)

    def record(self, path: Path, xxh3: str) -> None:
        """This file is whole and on the disk."""
        with self._lock:  # several files are written at a time
            self.files[path.name] = xxh3
            self.save()

    def save(self) -> None:
        """Write everything, so that a crash leaves the old journal or the new one."""
        # Copied as they are now: others go on taking notes.
        notes = {name: dict(note) for name, note in self.notes.items()}
        values = {"task": self.task, "files": self.files, "notes": notes}
        draft = self._path.with_name(f"{self._path.name}.new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
