"""Hostile settings for the whole run, and a summary that names what this machine lacks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import torch

from parity_tests.compilation import shared_by_environment
from parity_tests.device_report import DeviceReport
from parity_tests.implementations import IMPLEMENTATIONS, absences

# 64-bit numbers are on, so that a float32 model which drifts to float64 is caught by its dtype.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)  # the tests run in parallel processes

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # before -m and -k leave any out


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Thousands of small JAX programs would otherwise stay in memory for the whole run."""
    yield
    jax.clear_caches()


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes of one run share what JAX compiles, in a folder that goes with the run.

    `make test` compiles quickly; `make test-all` and `make test-gpu` compile as users do.
    """
    if config.option.report is not None:
        config.pluginmanager.register(DeviceReport(config.option.report))
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # in a worker, or with a fault planted
        return
    folder = tempfile.TemporaryDirectory(prefix="alibi-compiled-")
    config.add_cleanup(folder.cleanup)
    is_short_run = config.option.markexpr == "not slow" and not config.option.keyword
    for option, value in shared_by_environment(folder.name, is_short_run).items():
        jax.config.update(option, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        choices=[each.name for each in IMPLEMENTATIONS],
        help="fail unless this implementation can run here",
    )
    parser.addoption(
        "--report",
        type=Path,
        metavar="FILE",
        help="write what became of every test, and on which devices, as JSON",
    )
    parser.addoption(
        "--implementation",
        metavar="module:factory",
        help="run only the conformance kit, against this implementation",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --implementation no other file is read."""
    if config.getoption("--implementation") is None or collection_path.is_dir():
        return None
    return True if collection_path.name != "test_conformance.py" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [*items]
    if config.getoption("--implementation") is not None:
        items[:] = [item for item in items if item.name == "test_the_given_implementation"]


def pytest_sessionstart(session: pytest.Session) -> None:
    for name in session.config.getoption("--require"):
        if name in absences():
            raise pytest.UsageError(f"{name} was required and is absent: {absences()[name]}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [each.name for each in IMPLEMENTATIONS if each.name not in absences()]
    terminalreporter.write_sep("-", "implementations")
    terminalreporter.write_line(f"ran on: {', '.join(ran)}")
    for name, reason in absences().items():
        terminalreporter.write_line(f"absent: {name} ({reason})")
