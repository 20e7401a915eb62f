"""How fast a large checkpoint converts, and in how much memory: `python -m benchmarks.conversion`.

A synthetic bfloat16 checkpoint in shards is converted by the command in a process of its own, which
may allocate 2 GB at most, with and without the comparison at the end. Between the conversions
`cp -r` copies the same files and flushes them: that is the speed of the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from alibi_convert.families import Source, bloom
from alibi_convert.formats import FORMATS
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_convert.writing.provenance import library_versions
from alibi_spec import ALiBiConfig, parameter_table

RESULTS = Path(__file__).parent / "results" / "conversion.json"
WIDTH, HEADS, VOCABULARY = 4096, 32, 50_000
MEMORY_LIMIT = 2 * 10**9
_POLL_SECONDS = 0.01


def synthetic(config: ALiBiConfig, seed: int = 0) -> Tensors:
    """Random bfloat16 tensors of a configuration, each drawn when it is read."""
    block = np.random.default_rng(seed).standard_normal(2**24, np.float32)
    block = (block * 0.02).astype(ml_dtypes.bfloat16)

    def header(index: int, shape: tuple[int, ...]) -> LazyTensor:
        def read() -> np.ndarray:
            size = int(np.prod(shape))
            start = index * 7919 % 2**20  # no two tensors alike
            return np.resize(block[start:], size).reshape(shape)

        return LazyTensor(shape, block.dtype, read)

    rows = enumerate(parameter_table(config))
    return Tensors({row.name: header(index, row.shape) for index, row in rows})


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and the peak of anonymous memory of a command that may allocate 2 GB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))

    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=limit)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"seconds": seconds, "peak_anonymous_bytes": peak}


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def copied(source: Path, destination: Path) -> dict[str, float]:
    """Seconds of `cp -r` and of flushing every file of the copy."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, destination], check=True)
    for path in destination.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return {"seconds": time.monotonic() - started}


def alternated(source: Path, folder: Path, rounds: int, options: list[str]) -> dict[str, Any]:
    """Raw figures of every way, in turns, under the same conditions of the disk."""
    converted = folder / "converted"
    alibi = [sys.executable, "-m", "alibi_cli", "convert", str(source), str(converted)]
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "cp": lambda: copied(source, converted),
        "convert": lambda: measured([*alibi, *options]),
        "convert, not verified": lambda: measured([*alibi, *options, "--verify=none"]),
    }
    figures: dict[str, Any] = {way: [] for way in ways}
    # The first round does not count: a virtual machine gets its memory when it first uses it.
    for number in range(rounds + 1):
        for way, run in ways.items():
            measurement = run()
            if number > 0:
                figures[way].append(measurement)
            shutil.rmtree(converted)
            subprocess.run(["sync", "-f", folder], check=True)
    return figures


def machine() -> dict[str, Any]:
    """The machine of the measurement."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0],
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system() + " " + platform.release(),
    }


def main() -> int:
    """Make the checkpoint, measure, write the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=list(CONFIGURATIONS), default="bloom")
    parser.add_argument("--to", default="alibi", help="format of the destination (default: alibi)")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="at least (default: 8)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements per median (default: 3)"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": library_versions(),
        "source": options.family,
        "destination": options.to,
        **conversion(options),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{results['nbytes']:,} bytes, largest tensor {results['largest_tensor_bytes']:,}")
    for way, seconds in results["median_seconds"].items():
        rate, relative = results["nbytes"] / seconds / 1e9, results["speed_relative_to_cp"][way]
        print(f"{way:24} {seconds:6.1f} s  {rate:5.2f} GB/s  {relative:4.2f} of cp")
    print(f"peak anonymous memory {results['peak_anonymous_bytes']:,} bytes")
    return 0


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one synthetic checkpoint, which is deleted afterwards."""
    config = configuration(options.family, options.gigabytes)
    sizes = [2 * int(np.prod(row.shape)) for row in parameter_table(config)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        form = FORMATS[options.family]
        form.write(source, config, synthetic(config), max_shard_bytes=2 * 10**9)
        arguments = ["--to", options.to, "--max-shard-size", "2GB"]
        figures = alternated(source, Path(folder), options.rounds, arguments)
    medians = {
        way: statistics.median(each["seconds"] for each in runs) for way, runs in figures.items()
    }
    return {
        "nbytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "memory_limit_bytes": MEMORY_LIMIT,
        "peak_anonymous_bytes": max(each["peak_anonymous_bytes"] for each in figures["convert"]),
        "median_seconds": medians,
        "speed_relative_to_cp": {way: medians["cp"] / seconds for way, seconds in medians.items()},
        "raw": figures,
    }


def configuration(family: str, gigabytes: float) -> ALiBiConfig:
    """A model of this family with at least this size in bfloat16."""

    def nbytes(num_layers: int) -> int:
        table = parameter_table(CONFIGURATIONS[family](num_layers))
        return sum(2 * int(np.prod(row.shape)) for row in table)

    per_layer = nbytes(2) - nbytes(1)
    missing = max(0.0, gigabytes * 1e9 - nbytes(1))
    return CONFIGURATIONS[family](1 + math.ceil(missing / per_layer))


def _alibi(num_layers: int) -> ALiBiConfig:
    return ALiBiConfig(num_layers=num_layers, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCABULARY)


def _bloom(num_layers: int) -> ALiBiConfig:
    sizes = {"hidden_size": WIDTH, "n_head": HEADS, "vocab_size": VOCABULARY, "n_layer": num_layers}
    return bloom.FAMILY.read_config(Source({"model_type": "bloom", **sizes}, Tensors({})))


CONFIGURATIONS: dict[str, Callable[[int], ALiBiConfig]] = {"alibi": _alibi, "bloom": _bloom}


if __name__ == "__main__":
    sys.exit(main())
