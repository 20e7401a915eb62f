"""Runs of training: the same in both backends, across backends, after a kill, and what is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, BloomForCausalLM

import alibi_train.checkpoints
import alibi_train.running
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.carrying import open_optimizer
from alibi_convert.writing.origin import origin_of
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from alibi_torch import ALiBiLM
from alibi_train import Settings, read_settings, train
from alibi_train.records import read_log
from parity_tests.compare import assert_bitwise, assert_within

TRAINING = AGREEMENTS["float64 training"].relative
FLOOR = 1e-3  # the bias of keys changes nothing: its gradient is only rounding
MODEL = {"num_layers": 1, "d_model": 12, "num_heads": 3, "dropout": 0.0, "slopes": "learned"}
WEIGHTS = ("model.safetensors", "optimizer.safetensors")
TEXT = "\n".join(f"{number} times {number} is {number * number}." for number in range(150))


def _settings(folder: Path, **sections: dict[str, Any]) -> Settings:
    """Of a small run on a text, which is written to the folder."""
    folder.mkdir(exist_ok=True)
    for name, part in (("a", TEXT[:2000]), ("b", TEXT[2000:])):
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    defaults: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"train": ["*.txt"], "validation": ["b.txt"], "length": 16},
        "training": {"steps": 8, "batch_size": 4, "accumulation_steps": 2, "warmup_steps": 2},
        "run": {"save_every": 3, "evaluate_every": 4, "evaluation_batches": 3, "log_every": 1},
    }
    return Settings.from_dict(
        {name: section | sections.get(name, {}) for name, section in defaults.items()}, folder
    )


def _weights(folder: Path) -> dict[str, np.ndarray]:
    """Parameters and moments of a checkpoint."""
    optimizer = open_optimizer(folder)
    found = dict(open_checkpoint(folder).tensors)
    for word, tensors in optimizer.moments.items():
        found |= {f"{word}.{name}": tensors[name] for name in tensors}
    return found


def _assert_same_bits(one: Path, other: Path) -> None:
    expected = _weights(other)
    assert _weights(one).keys() == expected.keys()
    for name, array in _weights(one).items():
        assert_bitwise(array, expected[name], name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight steps in float64 without a stop, in each backend."""
    folder = tmp_path_factory.mktemp("whole")
    settings = _settings(folder, run={"dtype": "float64"})
    return {
        backend: train(settings, folder / backend, backend).folder for backend in ("torch", "flax")
    }


def test_both_backends_train_the_same_model(whole: dict[str, Path]) -> None:
    """From the same fresh weights, on the same batches."""
    exact = _weights(whole["torch"])
    for name, array in _weights(whole["flax"]).items():
        assert_within(array, exact[name], TRAINING, name, dtype="float64", floor=FLOOR)
    logs = [read_log(path.parent) for path in whole.values()]
    for torch_line, flax_line in zip(*logs, strict=True):
        assert torch_line.keys() == flax_line.keys()
        for name in torch_line.keys() - {"tokens_per_second"}:
            ours, theirs = (np.float64(line[name]) for line in (flax_line, torch_line))
            assert_within(ours, theirs, TRAINING, name, dtype="float64")


@pytest.mark.parametrize(("first", "second"), [("torch", "flax"), ("flax", "torch")])
def test_a_run_goes_on_in_the_other_backend(
    first: str, second: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    settings = _settings(whole["torch"].parent.parent, run={"dtype": "float64"})
    assert train(settings, tmp_path, first, until=4).step == 4
    finished = train(settings, tmp_path, second)
    assert finished.step == 8
    exact = _weights(whole["torch"])
    for name, array in _weights(finished.folder).items():
        assert_within(array, exact[name], TRAINING, name, dtype="float64", floor=FLOOR)


@pytest.mark.slow
def test_a_hundred_steps_here_and_a_hundred_there(tmp_path: Path) -> None:
    """Both orders, and two hundred in either backend: four times the same model."""
    training = {"steps": 200, "warmup_steps": 20}
    settings = _settings(tmp_path, training=training, run={"dtype": "float64"})
    ends = {}
    for first, second in itertools.product(["torch", "flax"], repeat=2):
        folder = tmp_path / f"{first}-{second}"
        train(settings, folder, first, until=100)
        ends[first, second] = _weights(train(settings, folder, second).folder)
    exact = ends.pop(("torch", "torch"))
    for which, weights in ends.items():
        for name, array in weights.items():
            what = f"{which}: {name}"
            assert_within(array, exact[name], TRAINING, what, dtype="float64", floor=FLOOR)


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_run_that_stops_comes_to_the_same_bits(
    backend: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Also from a checkpoint before the stop, and with lines of the log behind it."""
    settings = _settings(whole["torch"].parent.parent, run={"dtype": "float64"})

    class Killed(Exception): ...

    stop = 5

    def step(run: Any, is_last: bool) -> None:
        if run.step == stop:
            raise Killed
        one_step(run, is_last)

    one_step = alibi_train.running._Run.one_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alibi_train.running._Run, "one_step", step)
        with pytest.raises(Killed):
            train(settings, tmp_path, backend)
    assert [line["step"] for line in read_log(tmp_path)][-1] == stop
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    finished = train(settings, tmp_path, backend)
    _assert_same_bits(finished.folder, whole[backend])
    untimed = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_log(path)]
        for path in (tmp_path, whole[backend].parent)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_killed_at_twenty_random_moments(backend: str, tmp_path: Path) -> None:
    """By SIGKILL, on one thread; the weights are those of the run that nobody killed."""
    _settings(tmp_path)
    file = tmp_path / "settings.toml"
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in MODEL.items())
    file.write_text(
        f'[model]\n{model}\n[data]\ntrain = ["*.txt"]\nlength = 16\n'
        "[training]\nsteps = 1000\nbatch_size = 4\n[run]\nsave_every = 10\nkeep_best = false\n"
    )
    command = [sys.executable, "-m", "alibi_cli", "train", str(file), f"--backend={backend}"]

    def started(folder: str) -> subprocess.Popen[bytes]:
        """A process, once it has begun to train."""
        arguments = [*command, f"--output={tmp_path / folder}", "--json", "--no-plot"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        log = tmp_path / folder / "log.jsonl"
        before = _size(log)
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=environment)
        while process.poll() is None and _size(log) <= before:
            time.sleep(0.02)
        return process

    process, began = started("whole"), time.monotonic()
    assert process.wait() == 0
    seconds, rng = time.monotonic() - began, np.random.default_rng(0)
    for _ in range(20):
        process = started("killed")
        time.sleep(rng.uniform(0, seconds / 15))
        assert process.poll() is None, "it was over before it was killed twenty times"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert started("killed").wait() == 0
    _assert_same_bits(tmp_path / "killed/step-00001000", tmp_path / "whole/step-00001000")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    """The newest, every so many, and the best; each opens and generates."""
    settings = _settings(
        tmp_path,
        training={"steps": 9, "learning_rate": 1.0, "schedule": "constant"},
        run={"save_every": 1, "evaluate_every": 1, "keep_last": 2, "keep_every": 4},
    )
    train(settings, tmp_path / "run")
    log = read_log(tmp_path / "run")
    losses = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best not in (4, 8, 9), "nothing is seen of the best"
    there = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert there == sorted({f"step-{step:08}" for step in (4, 8, 9, best)})
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    for name in there:
        files = {path.name for path in (tmp_path / "run" / name).iterdir()}
        assert files == {"config.json", "training.json", *WEIGHTS}


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_checkpoint_is_written_while_it_trains(
    backend: str, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the weights of its step, not those of the steps that were taken meanwhile."""
    options = {"dtype": "float64", "save_every": 2, "keep_every": 2}
    settings = _settings(whole["torch"].parent.parent, run=options)
    write, steps = alibi_train.checkpoints.write_folder, []

    def slow(draft: Path, *rest: Any) -> Any:
        time.sleep(0.5)
        steps.append(read_log(tmp_path / "slow")[-1]["step"])
        return write(draft, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(alibi_train.checkpoints, "write_folder", slow)
        train(settings, tmp_path / "slow", backend, until=4)
    assert steps[0] > 2, "nothing was trained while the checkpoint was written"
    finished = train(settings, tmp_path / "stopped", backend, until=2)
    _assert_same_bits(tmp_path / "slow/step-00000002", finished.folder)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The step is named, and the checkpoint before it stays."""
    settings = _settings(tmp_path, run={"save_every": 2})
    train(settings, tmp_path / "run", until=4)

    with pytest.MonkeyPatch.context() as patch:
        trainer = alibi_train.running.trainer

        def broken(*arguments: Any) -> Any:
            built, taken = trainer(*arguments), 0
            step = built.step

            def diverging(batch: Any) -> Any:
                nonlocal taken
                taken += 1
                metrics = step(batch)
                return metrics._replace(loss=float("nan")) if taken == 2 else metrics

            built.step = diverging
            return built

        patch.setattr(alibi_train.running, "trainer", broken)
        with pytest.raises(ValueError, match=r"step 6: loss nan.*checkpoint of step 4 stays"):
            train(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("step-*")].count("step-00000004") == 1
    assert train(settings, tmp_path / "run").step == 8


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(tmp_path)
    train(settings, tmp_path / "run", until=3)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(alibi_train.checkpoints, "write_folder", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*step*")] == ["step-00000003"]
    assert train(settings, tmp_path / "run").step == 8


def test_two_runs_at_once_in_a_folder(tmp_path: Path) -> None:
    settings, one_step = _settings(tmp_path), alibi_train.running._Run.one_step

    def step(run: Any, is_last: bool) -> None:
        if run.step == 1:
            with pytest.raises(CheckpointError, match=r"another run is training in .*run; wait"):
                train(settings, tmp_path / "run")
        one_step(run, is_last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alibi_train.running._Run, "one_step", step)
        assert train(settings, tmp_path / "run", until=2).step == 2
    assert train(settings, tmp_path / "run").step == 8


def test_another_run_in_the_folder(tmp_path: Path) -> None:
    """Every difference is named; what a run keeps and tells may change."""
    train(_settings(tmp_path), tmp_path / "run", until=1)
    other = _settings(tmp_path, training={"seed": 3}, model={"d_model": 24}, run={"keep_last": 5})
    with pytest.raises(ValueError, match="was told otherwise") as raised:
        train(other, tmp_path / "run")
    lines = str(raised.value).splitlines()
    assert lines[1:-1] == [
        "  model.d_model is 24, was 12",
        "  training.seed is 3, was 0",
    ]
    (tmp_path / "c.txt").write_text("more")
    with pytest.raises(ValueError, match="tokens to learn from, were"):
        train(_settings(tmp_path, run={"keep_last": 5}), tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modell": {}}, "unknown section 'modell'; expected model, data, training, run"),
        ({"training": {"lr": 1}}, "unknown option 'lr' in the recipe; did you mean learning_rate"),
        ({"data": {"lenght": 1}}, r"unknown option 'lenght' in the section \[data\]; .* length"),
        ({"run": {"save_every": 0}}, "save_every=0 is not valid; expected an integer of at least"),
        ({"model": {"checkpoint": "x", "d_model": 3}}, "has a checkpoint and d_model"),
        ({"model": {"checkpoint": "x"}, "data": {"tokenizer": "y"}}, "which has its own; leave"),
        ({"model": {"n_head": 3}}, "unknown option 'n_head' .* did you mean num_heads"),
    ],
)
def test_settings_that_are_refused(sections: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(sections, tmp_path)


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    """Nothing is trained by another backend, tokenizer or number of steps than was meant."""
    (tmp_path / "other.json").write_text("{}")
    other = _settings(tmp_path, data={"tokenizer": "other.json"})
    for settings, arguments, message in (
        (_settings(tmp_path), {"backend": "jax"}, "backend='jax' is not known; expected one of"),
        (_settings(tmp_path), {"until": 0}, "until=0"),
        (other, {}, "data.tokenizer='other.json' is not called tokenizer.json; rename it"),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings, tmp_path / "run", **arguments)


def test_speed_is_that_of_the_steps_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of those before a run went on."""
    times = iter([2.0, 2.5])
    monkeypatch.setattr(alibi_train.running, "monotonic", lambda: next(times))
    clock = alibi_train.running._Clock(size=10, step=500, time=0.0)
    assert clock.speed(502) == 10.0
    assert clock.speed(504) == 40.0


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings from a file, changes from the command line, a tokenizer trained on the text."""
    _settings(tmp_path)
    file = tmp_path / "settings.toml"
    file.write_text(
        '[model]\nnum_layers = 1\nd_model = 12\nnum_heads = 3\n[data]\ntrain = ["*.txt"]\n'
        "length = 16\n[training]\nsteps = 3\nbatch_size = 2\n"
    )
    arguments = ["train", str(file), f"--output={tmp_path / 'run'}", "--train-tokenizer=300"]
    changes = ["--set=training.steps=2", "--set=run.tensorboard=true", "--json"]
    assert main([*arguments, *changes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2
    assert Path(found["picture"]).stat().st_size > 0
    assert list((tmp_path / "run/tensorboard").iterdir())
    checkpoint = open_checkpoint(found["folder"])
    assert checkpoint.config.vocab_size == 300
    assert checkpoint.config.max_len == 16
    assert main(["generate", found["folder"], "--prompt=3 times", "--max-new-tokens=3"]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")  # and goes on there, without the flag
    arguments = ["train", str(file), f"--output={tmp_path / 'moved'}"]
    assert main([*arguments, "--set=training.steps=2", "--json"]) == 0
    arguments.append("--train-tokenizer=300")
    other = ["train", str(file), f"--output={tmp_path / 'other'}"]
    for until, message in ((None, "nothing saved"), (1, "the same command goes on from step 1")):
        if until is not None:
            assert main([*other, f"--until={until}"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alibi_train.running._Run, "one_step", _interrupted)
            assert main(other) == 130
        assert f"interrupted; {message}" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 2
    assert "training.steps is 3, was 2" in capsys.readouterr().err
    for change, message in (
        ("training", "is no change"),
        ("a.b=1", "unknown section 'a'"),
        ("data.tokenizer='bytes'", "name a tokenizer already: that of bytes"),
    ):
        assert main([*arguments, f"--set={change}"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not TOML"):
        read_settings(tmp_path / "a.txt")


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_training_begins_from_a_bloom_and_goes_back(backend: str, tmp_path: Path) -> None:
    """Its tokenizer and its family's record go along; transformers opens what was trained."""
    source = tmp_path / "bloom"
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=256, hidden_size=24, n_layer=1, n_head=3)
    BloomForCausalLM(config).save_pretrained(source)
    tokenizer = Tokenizer(models.WordLevel({"times": 5, "is": 6, "?": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    settings = _settings(tmp_path, training={"steps": 3})
    settings = dataclasses.replace(settings, model={}, checkpoint="bloom")
    finished = train(settings, tmp_path / "run", backend)
    assert (finished.folder / "tokenizer.json").is_file()
    opened = open_checkpoint(source)
    data = alibi_train.running._Data.of(settings, opened.config, origin_of(opened))
    assert set(np.unique(data.train.rows.documents.tokens)) == {5, 6, 7}
    convert(finished.folder, tmp_path / "back", to="bloom")
    tokens = np.array([[5, 7, 6, 7, 7, 5, 6]])
    with torch.no_grad():
        theirs = BloomForCausalLM.from_pretrained(tmp_path / "back")(torch.tensor(tokens)).logits
        ours = ALiBiLM.from_pretrained(finished.folder)(torch.tensor(tokens))
        before = ALiBiLM.from_pretrained(source)(torch.tensor(tokens))
    limit = BUDGETS["float32", "cpu"].forward
    assert_within(ours.numpy(), theirs.double().numpy(), limit, "logits", dtype="float32")
    assert (ours - before).abs().max() > 1e-4
