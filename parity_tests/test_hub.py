"""Checkpoints and tokenizers by name: what is asked of the hub, and every way in which it fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import (
    CheckpointError,
    convert,
    inspect,
    load_tokenizer,
    open_checkpoint,
    plan,
    resolve,
)
from alibi_verify import verify_steps
from parity_tests.checkpoints import make_folder, write


class Hub:
    """Stands in for `snapshot_download`: a repository with some files, of which some are asked."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files = folder, files
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision))
        for file in self.files:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (self.folder / file).write_text("")
        return str(self.folder)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "snapshot")


def install(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)


@pytest.mark.parametrize("allow_pt", [False, True])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_fetched(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, weights: str, allow_pt: bool
) -> None:
    """Never code; pickles only with consent, and only where there is nothing better."""
    others = ("config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat.jinja")
    hub = Hub(snapshot, *others, weights, "modeling.py", "model.onnx", "also_a_pickle.bin")
    install(monkeypatch, hub)
    assert resolve("org/name-1.0", allow_pt, "v2") == snapshot
    pickles = allow_pt and weights.endswith(".bin")
    assert hub.asked == [("org/name-1.0", "v2")] * (2 if pickles else 1)
    expected = {*others, weights} if weights.endswith(".safetensors") else {*others}
    expected |= {weights, "also_a_pickle.bin"} if pickles else set()
    assert {path.name for path in snapshot.iterdir()} == expected


def test_pickles_alone(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to do about them is said before anything says that there are no weights."""
    install(monkeypatch, Hub(snapshot, "config.json", "pytorch_model.bin"))
    with pytest.raises(
        CheckpointError, match=r"org/name on the hub has no .*pass allow_pt=True \(--"
    ):
        open_checkpoint("org/name")
    assert not (snapshot / "pytorch_model.bin").exists()
    install(monkeypatch, Hub(snapshot, "model-f16.gguf"))
    with pytest.raises(CheckpointError, match=r"\(\.gguf\) download one and give its path"):
        open_checkpoint("org/name")


def test_revisions_everywhere(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever takes the id of a model takes its revision; a path has none."""
    write(snapshot / "inner")
    hub = Hub(snapshot / "inner")
    install(monkeypatch, hub)
    alibi_torch.ALiBiLM.from_pretrained("org/name", revision="a")
    alibi_flax.from_pretrained("org/name", revision="b")
    inspect("org/name", revision="c")
    assert plan("org/name", revision="d").source == "org/name@d"
    assert convert("org/name", tmp_path / "out", revision="e").source == "org/name@e"
    next(verify_steps("org/name", revision="f"))
    assert main(["inspect", "org/name", "--revision=g"]) == 0
    assert [revision for _, revision in hub.asked] == list("abcdefg")
    with pytest.raises(CheckpointError, match=r"out is a path, and only models .* omit revision"):
        open_checkpoint(tmp_path / "out", revision="main")


@pytest.mark.parametrize(
    "path", ["name", "/org/name", "./name", "a/b/c", "out/x.safetensors", "org/x.pt", "a b/c", ""]
)
def test_paths_are_not_looked_up(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    install(monkeypatch, None)
    assert resolve(path) == Path(path)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    write(make_folder(tmp_path / "org") / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(Path("org/name")) == Path("org/name")


def response(status: int) -> Any:
    httpx = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("403", response=response(403)),
            "gives org/name only to those who accepted its terms; accept them on its page",
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "has none of that name; mind the spelling",
        ),
        (errors.RevisionNotFoundError("404", response=response(404)), ""),
        (errors.HFValidationError("too long"), "takes no such name: too long"),
        (errors.LocalEntryNotFoundError("not in the cache\nat all"), "be asked: not in the cache;"),
        (errors.OfflineModeIsEnabled("offline"), r"offline; connect \(and unset HF_HUB_OFFLINE\)"),
        (errors.HfHubHTTPError("500 oops", response=response(500)), "cannot be asked: 500 oops"),
        (ConnectionError("no route"), "cannot be asked: no route"),
        (errors.HTTPError("timed out"), "cannot be asked: timed out"),
        (TimeoutError(), "cannot be asked: TimeoutError; connect"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    install(monkeypatch, refuse)
    start = "there is no path org/name, and the hub .*"
    if isinstance(error, errors.RevisionNotFoundError):
        start = "^the hub has no revision 'v9' of org/name; give a branch, a tag or a commit"
    with pytest.raises(CheckpointError, match=start + message):
        resolve("org/name", revision="v9")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"no path org/name; .*'alibi-duo\[hub\]'"):
        resolve("org/name")
    assert resolve("name") == Path("name")
    with pytest.raises(ValueError, match=r"tokenizers, which is not installed; .*\[hub\]'"):
        load_tokenizer("name")


def test_offline_for_real(tmp_path: Path) -> None:
    """The library itself, cut off, with an empty cache and with the model in it."""
    code = "import sys; from alibi_convert import resolve; print(resolve(sys.argv[1]))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "org/name"]
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    found = run()
    assert found.returncode == 1
    assert (
        "CheckpointError: there is no path org/name, and the hub cannot be asked: " in found.stderr
    )
    cached = tmp_path / "models--org--name"
    snapshot = cached / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    write(make_folder_with_parents(snapshot.parent) / snapshot.name)
    make_folder_with_parents(cached / "refs")
    (cached / "refs" / "main").write_text(snapshot.name)
    found = run()
    assert found.stdout == f"{snapshot}\n"


def make_folder_with_parents(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_tokenizers(tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist; convert the token"):
        load_tokenizer(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 7, "?": 0}, "?"))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a").ids == [7]  # neither cut nor filled
    assert load_tokenizer(tmp_path).encode(["a"] * 5, is_pretokenized=True).ids == [7] * 5
    (snapshot / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    install(monkeypatch, Hub(snapshot))
    assert load_tokenizer("org/name").encode("a").ids == [7]
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer: "):
        load_tokenizer(tmp_path)
