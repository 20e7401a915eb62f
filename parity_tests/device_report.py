"""What the tests found on the devices of a machine, in one file: `pytest --report FILE`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import pytest
import torch

from parity_tests.implementations import absences


class DeviceReport:
    """A plugin that writes every outcome, and where it was, when the run ends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test when it was called, or did not come to it."""
        if report.when == "call" or report.outcome != "passed":
            self.tests.append(
                {
                    "test": report.nodeid.partition("parity_tests/")[2] or report.nodeid,
                    "outcome": report.outcome,
                    "seconds": report.duration,
                    **dict(report.user_properties),
                }
            )

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**described(), "tests": self.tests}, indent=1)
        self.file.write_text(text + "\n", encoding="utf-8")


def described() -> dict[str, Any]:
    """The machine: its devices as both frameworks name them, versions, date and commit."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "jax", "jaxlib", "flax", "numpy")
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or None,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "devices": {
            "torch": cuda or [f"cpu ({torch.backends.cpu.get_cpu_capability()})"],
            "jax": sorted({device.device_kind for device in jax.devices()}),
        },
        "absent": absences(),  # and so skipped
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
