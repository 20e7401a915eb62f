"""The resources of this machine: optional packages, memory, and room on its disks."""

from __future__ import annotations

import importlib.util
import re
import resource
import shutil
from pathlib import Path


def is_installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError, with the command that installs it, unless `module` is installed."""
    if not is_installed(module):
        raise ValueError(
            f"{purpose} needs {module}, which is not installed; pip install 'alibi-duo[{extra}]'"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    free = []
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - _kilobytes(Path("/proc/self/status"), used))
    cgroup = Path("/sys/fs/cgroup")
    for names in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = (cgroup / name for name in names)
        if limit.exists() and used.exists() and limit.read_text(encoding="ascii").strip().isdigit():
            free.append(int(limit.read_text(encoding="ascii")) - int(used.read_text("ascii")))
    if Path("/proc/meminfo").exists():
        free.append(_kilobytes(Path("/proc/meminfo"), "MemAvailable"))
    return min(free, default=None)


def _kilobytes(path: Path, name: str) -> int:
    """A line like "VmData:  12 kB" of a file of the kernel's, in bytes; 0 where there is none."""
    if not path.exists():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def existing_parent(destination: Path) -> Path:
    """The nearest folder above a destination that exists already."""
    path = destination.resolve()
    return next((parent for parent in path.parents if parent.exists()), path)


def free_bytes(destination: Path) -> int | None:
    """Free bytes on the disk of a destination; None where the file system does not say."""
    usage = shutil.disk_usage(existing_parent(destination))
    return usage.free if usage.total else None
