"""Runs that are killed, meet a full disk, or each other: the destination is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.tensors import Tensors
from alibi_convert.writing.atomic import building, replacing
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.checkpoints import CONFIG, assert_holds, make_folder, write
from parity_tests.compare import assert_bitwise

SHARDS = "--max-shard-size=40000"
FIRST, SECOND, THIRD = (f"model-{index:05d}-of-00005.safetensors" for index in (1, 2, 3))

# Finishes two shards and writes half of another, says so, and reads on until it is stopped.
# SIGINT may be ignored where the tests run in the background.
STOPPING = """
import json, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from alibi_cli.main import main
from alibi_convert.formats import shards
write, turn = shards.write_safetensors, threading.Lock()

def stopping(path, tensors, metadata=None):
    if path.name < "model-00003":
        return write(path, tensors, metadata)
    with turn:
        while len(json.loads((path.parents[2] / "journal.json").read_bytes())["files"]) < 2:
            time.sleep(0.01)
        path.write_bytes(b"half")
        print("ready", flush=True)
        while True:
            for header in tensors.headers.values():
                for _ in header.chunks():
                    time.sleep(0.01)

shards.write_safetensors = stopping
sys.exit(main(sys.argv[1:]))
"""

# Is killed between two renames: the old checkpoint is aside, the new one not in place.
KILLED_WHILE_SWAPPING = """
import os, signal, sys
from alibi_cli.main import main
rename = os.replace

def deadly(origin, destination):
    if str(destination) == sys.argv[3] and "new" in str(origin):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(origin, destination)

os.replace = deadly
sys.exit(main(sys.argv[1:]))
"""

# May not write files of more than 50 kB: a real error of the kernel, like that of a full disk.
SMALL_FILES = """
import resource, signal, sys
from alibi_cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a NaN in its first tensor, which is in the first shard."""
    parameters = dict(draw_parameters(CONFIG))
    first = next(iter(parameters))
    parameters[first] = parameters[first].copy()
    parameters[first][0, 0] = np.nan
    write_folder(make_folder(tmp_path / "model"), CONFIG, Tensors.of(parameters))
    return tmp_path / "model"


@pytest.fixture
def killed(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder that a conversion left when it was killed, or interrupted, in its third shard."""
    number = getattr(request, "param", signal.SIGKILL)
    before = contents(source)
    command = [
        sys.executable,
        "-c",
        STOPPING,
        "convert",
        str(source),
        str(tmp_path / "out"),
        SHARDS,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        _, errors = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert (process.returncode, errors) == (130, b"interrupted; `--resume` goes on\n")
        left = {path.name for path in (tmp_path / ".out.partial").rglob("*") if path.is_file()}
        assert left == {"journal.json", FIRST, SECOND}  # nothing half-written
    assert contents(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.partial"}
    yield tmp_path / ".out.partial"
    assert not (tmp_path / ".out.partial").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identity(path: Path) -> tuple[int, int]:
    """Changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def assert_same_model(path: Path, source: Path) -> None:
    expected = open_checkpoint(source).tensors
    found = open_checkpoint(path).tensors
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert_bitwise(found[name], array, name)


@pytest.mark.parametrize(
    ("killed", "damaged"),
    [
        (signal.SIGKILL, False),
        (signal.SIGKILL, True),
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
    ],
    indirect=["killed"],
)
def test_a_killed_run_resumes(killed: Path, source: Path, tmp_path: Path, damaged: bool) -> None:
    """Whole shards are kept, the same files on the disk; a damaged one is written again."""
    shards = {name: killed / "new" / "out" / name for name in (FIRST, SECOND)}
    assert json.loads((killed / "journal.json").read_text())["files"].keys() == shards.keys()
    if damaged:
        with shards[SECOND].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    before = {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in shards.items()}
    report = convert(source, tmp_path / "out", max_shard_size=40_000, resume=True)
    after = {name: (tmp_path / "out" / name).stat() for name in shards}
    kept = [
        name for name in shards if (after[name].st_ino, after[name].st_mtime_ns) == before[name]
    ]
    assert report.kept == kept == ([FIRST] if damaged else [FIRST, SECOND])
    assert report.nonfinite == {next(iter(draw_parameters(CONFIG))): 1}  # seen by the killed run
    assert_same_model(tmp_path / "out", source)
    whole = convert(source, tmp_path / "whole", max_shard_size=40_000)
    assert report.destination_xxh3 == whole.destination_xxh3
    assert whole.kept == []


@pytest.mark.parametrize(
    ("arguments", "where", "number"),
    [
        ("convert SOURCE OUT/x", "alibi_convert.formats.shards.write_safetensors", signal.SIGINT),
        (
            "convert SOURCE OUT/x.safetensors --strict-values",
            "alibi_convert.values.Watched.require_finite",
            signal.SIGTERM,
        ),
        ("inspect SOURCE", "alibi_convert.inspect", signal.SIGINT),
        ("verify SOURCE", "alibi_verify.backends.TorchBackend.exact_logits", signal.SIGTERM),
        ("plot-windows SOURCE --output=OUT.png", "matplotlib.figure.Figure.savefig", signal.SIGINT),
    ],
)
def test_an_interruption_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    where: str,
    number: signal.Signals,
) -> None:
    """One quiet line; and the signals mean to the caller what they meant before."""
    places = {"SOURCE": str(write(tmp_path / "sound")), "OUT": str(tmp_path / "deep")}
    for name, place in places.items():
        arguments = arguments.replace(name, place)
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
    before = signal.signal(number, usual)  # which may be to ignore it, in the background

    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.1)  # a thread of its own goes on for a moment
        raise CancelledError

    monkeypatch.setattr(where, interrupted)
    try:
        code = main(arguments.split())
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)
    assert code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert {path.name for path in tmp_path.iterdir()} == {"sound"}


def test_a_killed_run_is_forgotten(killed: Path, source: Path, tmp_path: Path) -> None:
    """Without --resume the next run starts anew, and may be another one."""
    old = (killed / "new" / "out" / FIRST).stat().st_ino
    blocker = make_folder(tmp_path / "blocker") / "file"  # keeps the number of the old file in use
    os.link(killed / "new" / "out" / FIRST, blocker)
    assert main(["convert", str(source), str(tmp_path / "out"), SHARDS]) == 0
    assert (tmp_path / "out" / FIRST).stat().st_ino != old
    assert_same_model(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"max_shard_size": 50_000}, "max_shard_bytes"),
        ({"to": "orbax"}, "to"),
        ({"config": CONFIG.__class__(**CONFIG.to_dict() | {"dropout": 0.3})}, "config"),
    ],
)
def test_only_the_same_run_resumes(
    killed: Path, source: Path, tmp_path: Path, options: dict[str, Any], differs: str
) -> None:
    """Refused, and what the killed run left stays for whoever gets the options right."""
    options = {"max_shard_size": 40_000, **options}
    message = f"differs from this one in {differs}; start anew, without resume"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", resume=True, **options)
    assert (killed / "new" / "out" / FIRST).exists()
    convert(source, tmp_path / "out", **options)


def test_a_changed_source_does_not_resume(killed: Path, source: Path, tmp_path: Path) -> None:
    """By size and time, and by the hash where those are as before."""
    weights = source / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="differs from this one in source; start anew"):
        convert(source, tmp_path / "out", max_shard_size=40_000, resume=True)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    journal = json.loads((killed / "journal.json").read_text())
    journal["notes"]["source_sha256"]["model.safetensors"] = "0" * 64
    (killed / "journal.json").write_text(json.dumps(journal))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors has changed since the killed run"
    ):
        convert(source, tmp_path / "out", max_shard_size=40_000, resume=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.msgpack"])
def test_resuming_nothing_starts(source: Path, tmp_path: Path, target: str) -> None:
    """A script may always say --resume."""
    assert convert(source, tmp_path / target, resume=True).kept == []
    assert {path.name for path in tmp_path.iterdir()} >= {"model", target}
    assert_same_model(tmp_path / target, source)


@pytest.mark.parametrize("target", ["out.safetensors", "out.msgpack", "out.pt"])
def test_single_files_start_again(source: Path, tmp_path: Path, target: str) -> None:
    """A half-written file of a killed run is no obstacle."""
    half = tmp_path / f".{target}.partial" / "new" / target
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    convert(source, tmp_path / target, resume=True)
    assert not half.parent.parent.exists()
    assert open_checkpoint(tmp_path / target, allow_pt=True).config == CONFIG


def test_killed_while_swapping(source: Path, tmp_path: Path) -> None:
    """The old checkpoint comes back with the next run, which is then asked to overwrite it."""
    old = write(tmp_path / "old", config=CONFIGS["decoder"])
    arguments = ["convert", str(source), str(old), "--overwrite"]
    command = [sys.executable, "-c", KILLED_WHILE_SWAPPING, *arguments]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not old.exists()
    with pytest.raises(CheckpointError, match="old exists; choose another name"):
        convert(source, old)
    assert_holds(old, CONFIGS["decoder"])
    convert(source, old, overwrite=True)
    assert_same_model(old, source)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "old"}


def test_two_runs_do_not_mix(source: Path, tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as path:
        shutil.copytree(source, path)
        with pytest.raises(CheckpointError, match=r"another run is writing .*out; wait for it or"):
            convert(source, tmp_path / "out")
    assert_same_model(tmp_path / "out", source)


def test_folders_of_other_people(source: Path, tmp_path: Path) -> None:
    """A folder that happens to have the name of ours is not emptied."""
    thesis = make_folder(tmp_path / ".out.partial") / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(CheckpointError, match=r"\.out\.partial holds other files \(thesis\.txt\)"):
        convert(source, tmp_path / "out")
    assert thesis.read_text() == "years of work"


def test_a_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    """The kernel refuses to write on: one line that says what is needed, and nothing stays."""
    arguments = ["convert", str(source), str(tmp_path / "deep" / "out")]
    command = [sys.executable, "-c", SMALL_FILES, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {tmp_path / 'deep' / 'out'} cannot be written: File too")
    assert "; 190,848 bytes are needed, " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("free", [190_847, 190_848])
def test_space_is_counted_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if free == 190_848:
        convert(source, tmp_path / "out")
        return
    with pytest.raises(
        CheckpointError, match="too full; 190,848 bytes are needed, 190,847 are free"
    ):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_space_for_the_rest(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run needs what is missing, not all of it; without that, what is there stays."""
    done = sum(path.stat().st_size for path in killed.rglob("*") if path.is_file())
    task = json.loads((killed / "journal.json").read_text())["task"]
    usage = shutil.disk_usage(killed)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    out = killed.with_name("out")
    message = "1,001 bytes are needed, 1,000 are free"
    with (
        pytest.raises(CheckpointError, match=message),
        building(out, False, done + 1001, task, resume=True),
    ):
        pass
    with building(out, False, done + 1000, task, resume=True) as (path, journal):
        assert sorted(file.name for file in path.iterdir()) == [FIRST, SECOND]
        assert journal.files.keys() == {FIRST, SECOND}


def test_destinations_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"^/proc/1 cannot be written: .*; choose a folder"):
        convert(source, "/proc/1/out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file cannot be written: .*; choose a folder that"):
        convert(source, tmp_path / "file" / "out")

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr("alibi_convert.formats.shards.write_safetensors", forbidden)
    message = r"out cannot be written: Permission denied \(out\); choose a folder"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}
