"""The memory that one call adds at its peak, in a process of its own (Linux)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Lets the allocator return every large block to the system. Otherwise a later call could reuse the
# blocks that an earlier one freed, and its need would not be seen.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_of_process(module: str, *arguments: str) -> int:
    """The output of `python -m MODULE --peak-of ARGUMENTS`, which calls `print_peak`."""
    command = [sys.executable, "-m", module, "--peak-of", *arguments]
    environment = os.environ | _ALLOCATOR
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout)


def print_peak(prepare: Callable[[], Callable[[], Any]]) -> None:
    """Print the bytes that a call holds once it is prepared, and adds at its peak.

    The second call is measured, so that compilation and start-up do not count.
    """
    at_first = _resident_bytes()
    run = prepare()
    held = max(0, _resident_bytes() - at_first)
    run()
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    run()
    print(held + _status_bytes("VmHWM") - before)


def _resident_bytes() -> int:
    gc.collect()
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
