"""Plant faults one by one in a copy of the code and see the tests catch each: `make mutants`.

A row is one plausible mistake: where, what stands there, what is put instead, and the tests that
must then fail and that pass without it. A fault that survives, or whose text is gone, is a failure.
A run of all is recorded for `python -m benchmarks.render`, which writes the table in the documents.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from parity_tests.compilation import shared_by_environment
from parity_tests.meta.faults import FAULTS
from parity_tests.meta.mutant import Mutant

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PACKAGES = (
    *("alibi_spec", "alibi_convert", "alibi_torch", "alibi_flax", "alibi_verify", "alibi_train"),
    *("alibi_cli", "benchmarks", "parity_tests"),
)
# Importing them takes longer than many of the tests: every process is forked from one that has.
LIBRARIES = ("jax", "torch", "flax", "optax", "orbax.checkpoint", "transformers", "pytest")
_FORKS = multiprocessing.get_context("forkserver")
DID_NOT_RUN = 70
TESTS_FAILED = 1  # pytest's exit code; a mutant that does not even import proves nothing


def run_tests(tests: str, mutant: Mutant | None = None) -> tuple[int, str]:
    """Run some tests in a copy of the code, with or without a fault in it: exit code and output."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package)
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            file = copy / mutant.file
            code = file.read_text(encoding="utf-8")
            file.write_text(code.replace(mutant.before, mutant.after), encoding="utf-8")
        process = _FORKS.Process(target=_test, args=(copy, tests))
        process.start()
        process.join()
        return process.exitcode or 0, (copy / "output").read_text(encoding="utf-8")


def _test(copy: Path, tests: str) -> None:
    """The body of a process, which has imported the libraries, but of our packages only this."""
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(each for each in sys.path if Path(each).resolve() != ROOT)]
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    path, *options = shlex.split(tests)
    ours = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    exit_code = DID_NOT_RUN
    try:
        exit_code = pytest.main(["-x", "-q", "-W", ours, f"parity_tests/{path}", *options])
    finally:  # an error of pytest's own would end a process with 1, as failing tests do
        os._exit(exit_code)


def healthy(tests: str) -> str | None:
    """None when these tests pass without any fault, else what happened instead."""
    exit_code, output = run_tests(tests)
    return output[-2000:] if exit_code else None


def survival(mutant: Mutant) -> str | None:
    """None when the tests caught the fault, else what happened instead."""
    if mutant.before not in (ROOT / mutant.file).read_text(encoding="utf-8"):
        return f"{mutant.file} no longer holds {mutant.before!r}"
    exit_code, output = run_tests(mutant.tests, mutant)
    return None if exit_code == TESTS_FAILED else f"{exit_code}: {output[-2000:]}"


def commit() -> str:
    """That of the code as it is, if nothing was changed since."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def record(chosen: Sequence[Mutant], troubles: Sequence[str | None]) -> dict[str, Any]:
    """What became of each fault, when, and in which code."""
    rows = [
        {
            "fault": mutant.fault,
            "file": mutant.file,
            "tests": mutant.tests,
            "outcome": "caught" if trouble is None else "survived",
        }
        for mutant, trouble in zip(chosen, troubles, strict=True)
    ]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "commit": commit(), "faults": rows}


def main() -> int:
    """Try every mutant (or those whose fault holds the words given) and report the survivors."""
    words = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in FAULTS if words in mutant.fault]
    selections = sorted({mutant.tests for mutant in chosen})
    failures, troubles = 0, []
    _FORKS.set_forkserver_preload([*LIBRARIES])
    with tempfile.TemporaryDirectory() as compiled, ThreadPoolExecutor(max_workers=2) as pool:
        shared_by_environment(compiled, is_quick=True)
        for tests, trouble in zip(selections, pool.map(healthy, selections), strict=True):
            failures += trouble is not None
            print(f"{'passes  ' if trouble is None else 'FAILS   '}  {tests}, nothing planted")
            print(trouble or "", end="", flush=True)
        for mutant, trouble in zip(chosen, pool.map(survival, chosen), strict=True):
            failures += trouble is not None
            troubles.append(trouble)
            print(f"{'caught  ' if trouble is None else 'SURVIVED'}  {mutant.fault}")
            print(trouble or "", end="", flush=True)
    print(f"{len(chosen)} faults planted, {failures or 'no'} failures")
    if not words:
        RESULTS.write_text(json.dumps(record(chosen, troubles), indent=1) + "\n", encoding="utf-8")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
