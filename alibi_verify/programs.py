"""An implementation that is a program: it answers lines of JSON, arrays are in files.

The README of `alibi_spec.conformance` shows an exchange.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from alibi_spec.conformance import LEVELS

PATIENCE = 5.0  # seconds that a program has to end after its input has ended


class ProgramError(RuntimeError):
    """A program answered with an error, with something else than it should, or not at all."""


class Program:
    """A running program as an implementation; use it in a `with` block, which ends it.

    It has those functions of the protocol that the program says it has.

    Args:
        command: the program and its arguments, as in a shell.

    Raises:
        ValueError: the program cannot be started, or does not describe itself.
    """

    def __init__(self, command: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="alibi-conformance-")
        self._calls = 0
        try:
            self._process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        except (OSError, IndexError) as error:
            self._folder.cleanup()
            raise ValueError(f"the program {command!r} cannot be started: {error}") from None
        try:
            told = self._answer({"call": "describe"})
            self.name = str(told["name"])
            self.dtype, self.device = told.get("dtype", "float32"), told.get("device", "cpu")
            functions = set(told["functions"]) & {level.function for level in LEVELS.values()}
        except (ProgramError, KeyError, TypeError) as error:
            self._end()
            raise ValueError(
                f"the program {command!r} does not describe itself ({error}); expected a line "
                '{"name": …, "functions": […]} to {"call": "describe"}'
            ) from None
        for function in functions:
            setattr(self, function, partial(self._call, function))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _call(self, function: str, **arguments: Any) -> Any:
        """One call: the array that the function returns, or several by name."""
        self._calls += 1
        folder = Path(self._folder.name)
        inputs, outputs = (
            folder / f"{self._calls}-{name}.safetensors" for name in ("inputs", "outputs")
        )
        arrays, options = _divided(arguments)
        save_file(arrays, inputs)
        request = {"call": function, "options": options}
        answer = self._answer(request | {"inputs": str(inputs), "outputs": str(outputs)})
        if "refused" in answer:
            raise NotImplementedError(answer["refused"])
        if answer.get("ok") is not True:
            raise ProgramError(answer.get("error", f"it answered {answer}, expected an ok"))
        try:
            found = load_file(outputs)
        except (OSError, SafetensorError) as error:
            raise ProgramError(f"it wrote no safetensors to {outputs}: {error}") from None
        for file in (inputs, outputs):
            file.unlink()
        result = next(level.result for level in LEVELS.values() if level.function == function)
        if result is None:
            return found
        if list(found) != [result]:
            raise ProgramError(f"it wrote {list(found)}, expected only {result}")
        return found[result]

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise ProgramError(f"the program ended with exit code {code} and gave no answer")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise ProgramError(f"it answered {line.strip()!r}, expected one line of a JSON object")
        return answer

    def _end(self) -> None:
        """Its input ends, and so should the program; one that does not is killed."""
        try:
            self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()


def _divided(arguments: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, those of a mapping as "mapping/name", and all else."""
    arrays: dict[str, np.ndarray] = {}
    options = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif name in ("parameters", "mean", "mean_square"):
            arrays |= {f"{name}/{entry}": array for entry, array in value.items()}
        else:
            options[name] = value
    return arrays, options
