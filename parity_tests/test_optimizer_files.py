"""Conversions carry an optimizer's state along, or say why they drop it."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import serialization
from flax.training.train_state import TrainState

import alibi_torch
from alibi_cli.main import main
from alibi_convert import (
    CheckpointError,
    Report,
    convert,
    open_optimizer,
    plan,
    save_optimizer,
    torch_to_flax,
    torch_to_optax,
)
from alibi_convert.formats.safetensors import read_safetensors, write_safetensors
from alibi_convert.formats.train_state import at
from alibi_convert.optimizers import from_torch, to_optax, to_torch
from alibi_convert.optimizers.file import as_file, from_file
from alibi_convert.optimizers.saved import from_saved
from parity_tests.compare import assert_bitwise
from parity_tests.optimizer_states import CONFIG, LABELS, assert_same_dict, assert_same_state

READING: Any = {"config": CONFIG, "allow_pt": True}


@pytest.fixture(scope="module")
def trained() -> tuple[alibi_torch.ALiBiLM, torch.optim.Optimizer]:
    model = alibi_torch.ALiBiLM(CONFIG)
    decays = [pair for pair in model.named_parameters() if pair[1].ndim > 1]
    others = [pair for pair in model.named_parameters() if pair[1].ndim < 2]
    groups = [{"params": decays, "lr": 0.25}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def train_state(tx: Any) -> TrainState:
    """As after two updates, in which no number is there twice."""
    params = torch_to_flax(alibi_torch.ALiBiLM(CONFIG).state_dict(), CONFIG)
    state = TrainState.create(apply_fn=len, params=jax.tree.map(jnp.asarray, params), tx=tx)
    rng = np.random.default_rng(0)

    def leaf(value: Any) -> Any:
        if value.dtype == jnp.int32:
            return jnp.asarray(2, jnp.int32)
        return jnp.asarray(rng.uniform(size=value.shape), value.dtype)

    return state.replace(opt_state=jax.tree.map(leaf, state.opt_state))


def converted(source: Path, destination: Path) -> Report:
    return convert(source, destination, verify="bits", **READING)


@pytest.mark.parametrize("keys", ["optimizer", "optimizer_state_dict", "optimizer_states"])
def test_torch_checkpoints(tmp_path: Path, trained: Any, keys: str) -> None:
    """Into a folder, from folder to folder, and out again: what torch saved."""
    model, optimizer = trained
    saved = optimizer.state_dict()
    contents = {"model": model.state_dict(), "step": 1}
    contents[keys] = [saved] if keys == "optimizer_states" else saved
    torch.save(contents, tmp_path / "last.pt")
    report = converted(tmp_path / "last.pt", tmp_path / "folder")
    assert report.optimizer["kind"] == "adam"
    assert report.optimizer["step"] == 1
    assert set(report.dropped) == {"step"}
    planned = plan(tmp_path / "last.pt", tmp_path / "new", **READING)
    assert planned.dropped == report.dropped
    assert planned.optimizer == report.optimizer
    report = converted(tmp_path / "folder", tmp_path / "again")
    assert report.optimizer
    assert report.dropped == {}
    assert report.left_behind == []
    assert "optimizer.safetensors" in report.destination_xxh3
    assert "optimizer.safetensors" in report.source_sha256
    state = open_optimizer(tmp_path / "again")
    assert_same_dict(to_torch(state, CONFIG, like=saved), saved)
    converted(tmp_path / "again", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    optimizer.load_state_dict(loaded["optimizer"])
    model.load_state_dict(loaded["model"])
    assert_same_dict(optimizer.state_dict(), saved)
    assert_same_dict(to_torch(open_optimizer(tmp_path / "out.pt", **READING), CONFIG), saved)


TX: dict[str, Any] = {
    "adamw": lambda: optax.adamw(lambda step: 0.5 / (1 + step)),
    "sgd": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "wrapped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "matrices": optax.inject_hyperparams(optax.scale_by_adam)(b1=0.5, b2=0.75),
                "vectors": optax.set_to_zero(),
            },
            LABELS,
        ),
    ),
}


@pytest.mark.parametrize("tx", TX)
@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_flax_training_states(tmp_path: Path, kind: str, tx: str) -> None:
    state, source = train_state(TX[tx]()), tmp_path / f"state.{kind}"
    if tx == "wrapped":  # what torch has no word for is left as it was
        inside = state.opt_state[1].inner_states["matrices"].inner_state
        inside.hyperparams["eps_root"] = jnp.zeros_like(inside.hyperparams["eps_root"])
    if kind == "msgpack":
        source.write_bytes(serialization.to_bytes(state))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(source, state)
    report = converted(source, tmp_path / "folder")
    assert set(report.dropped) == {"step"}
    assert report.optimizer["kind"] == ("sgd" if tx == "sgd" else "adam")
    found = open_optimizer(tmp_path / "folder")
    assert_same_state(to_optax(found, CONFIG, TX[tx]()), state.opt_state)
    report = converted(source, tmp_path / "state.pt")  # with torch's defaults for its options
    assert set(report.dropped) == {"step"}
    copy = tmp_path / f"copy.{kind}"
    report = convert(tmp_path / "folder", copy, tx=TX[tx](), **READING)
    assert report.dropped == {}
    assert_same_train_state(restored(copy, state), state)


def restored(path: Path, like: TrainState) -> TrainState:
    """What the libraries themselves read into a state of this structure."""
    empty = jax.tree.map(jnp.zeros_like, like)
    if path.suffix == ".msgpack":
        return serialization.from_bytes(empty, path.read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "params", empty)


def assert_same_train_state(actual: TrainState, expected: TrainState) -> None:
    steps = {int(leaf) for leaf in jax.tree.leaves(expected.opt_state) if leaf.dtype == jnp.int32}
    assert int(actual.step) == max(steps, default=0)
    for part in ("params", "opt_state"):
        found = jax.tree.map(jnp.asarray, getattr(actual, part))
        assert_same_state(found, getattr(expected, part))


@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "SGD without momentum"])
def test_from_torch_into_plain_training_states(tmp_path: Path, kind: str, name: str) -> None:
    """Without tx= it is the state of optax's own optimizer, which goes on; and back to torch."""
    model = alibi_torch.ALiBiLM(CONFIG)
    made: Any = {
        "AdamW": (lambda each: torch.optim.AdamW(each, lr=0.25), optax.adamw(0.25)),
        "SGD": (lambda each: torch.optim.SGD(each, lr=0.25, momentum=0.5), optax.sgd(0.25, 0.5)),
        "SGD without momentum": (lambda each: torch.optim.SGD(each, lr=0.25), optax.sgd(0.25)),
    }[name]
    optimizer, tx = made[0](model.parameters()), made[1]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved, source = optimizer.state_dict(), tmp_path / "last.pt"
    torch.save({"model": model.state_dict(), "optimizer": saved}, source)
    copy = tmp_path / f"copy.{kind}"
    report = convert(source, copy, **READING)
    lost = {"AdamW": "lr, betas, eps, weight_decay", "SGD": "lr, weight_decay, momentum"}
    words = lost[name.split()[0]] + " of optimizer"
    assert set(report.dropped) == {words}
    assert "set them there" in report.dropped[words]
    planned = plan(source, copy, overwrite=True, **READING)
    assert (planned.dropped, planned.optimizer) == (report.dropped, report.optimizer)
    like = TrainState.create(apply_fn=len, params=torch_to_flax(model.state_dict(), CONFIG), tx=tx)
    state = restored(copy, like)
    expected = torch_to_optax(saved, CONFIG, tx)
    assert_same_state(jax.tree.map(jnp.asarray, state.opt_state), expected)
    assert int(state.step) == (name == "AdamW")  # torch does not count the others'
    back = to_torch(open_optimizer(copy, **READING), CONFIG, like=saved)
    assert_same_dict(back, saved)


def test_transformations_that_have_no_use(
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, optimizer = trained
    model.save_pretrained(tmp_path / "model")
    tx: Any = optax.adamw(0.1)
    with pytest.raises(CheckpointError, match="pt has no place for the state of tx; expected msg"):
        convert(tmp_path / "model", tmp_path / "a.pt", tx=tx)
    with pytest.raises(CheckpointError, match="tx cannot be written: the source holds none"):
        convert(tmp_path / "model", tmp_path / "a.msgpack", tx=tx)
    save_optimizer(tmp_path / "model", from_torch(optimizer.state_dict(), CONFIG))
    with pytest.raises(CheckpointError, match="tx cannot be written: tx keeps moments of the kind"):
        convert(tmp_path / "model", tmp_path / "a.msgpack", tx=optax.sgd(0.1, 0.9))
    with pytest.raises(ValueError, match=r"tx is a int, expected an optax\.GradientTransf"):
        convert(tmp_path / "model", tmp_path / "a.msgpack", tx=3)
    assert not (tmp_path / "a.msgpack").exists()
    (tmp_path / "my_training.py").write_text("import optax\ndef tx(): return optax.adamw(0.1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert main(["convert", "model", "a.msgpack", "--tx", "my_training:tx"]) == 0
    assert "optimizer: adam after 1 updates" in capsys.readouterr().out
    assert main(["convert", "model", "b.msgpack", "--tx", "my_training:other"]) == 2
    assert "my_training has no factory other; expected" in capsys.readouterr().err


def test_what_cannot_be_carried(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is converted all the same, and the reason is in the report."""
    (tmp_path / "amsgrad.msgpack").write_bytes(
        serialization.to_bytes(train_state(optax.amsgrad(0.1)))
    )
    report = converted(tmp_path / "amsgrad.msgpack", tmp_path / "model")
    assert "in no state that is known" in report.dropped["opt_state"]
    assert report.optimizer == {}
    model, optimizer = trained
    saved = optimizer.state_dict()
    contents = {"model": model.state_dict(), "optimizer": saved}
    torch.save(contents, tmp_path / "last.pt")
    report = converted(tmp_path / "last.pt", tmp_path / "model.safetensors")
    reason = "an optimizer's state is written only to alibi, pt, msgpack and orbax"
    assert report.dropped == {"optimizer": reason}
    torch.save(contents | {"other": saved}, tmp_path / "two.pt")
    report = converted(tmp_path / "two.pt", tmp_path / "two")
    assert set(report.dropped) == {"optimizer", "other"}
    saved["param_groups"][0]["amsgrad"] = True
    torch.save(contents, tmp_path / "other.pt")
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    arguments = [str(tmp_path / "other.pt"), str(tmp_path / "other"), "--allow-pt"]
    assert main(["convert", *arguments, f"--config={tmp_path / 'config.json'}"]) == 0
    assert "dropped: optimizer (amsgrad=True: torch keeps" in capsys.readouterr().out
    saved["param_groups"][0]["amsgrad"] = False


def test_the_file_beside_a_model(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="folder holds no optimizer's state"):
        open_optimizer(tmp_path / "folder")
    state = from_torch(optimizer.state_dict(), CONFIG)
    save_optimizer(tmp_path / "folder", state)
    found = open_optimizer(tmp_path / "folder")
    assert found.groups == state.groups
    for word, tensors in state.moments.items():
        for name, array in tensors.items():
            assert_bitwise(found.moments[word][name], array, f"{word} of {name}")
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "out")]) == 0
    assert "adam after 1 updates; exp_avg and exp_avg_sq of 21" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "folder", overwrite=True)  # other weights, perhaps
    assert not (tmp_path / "folder" / "optimizer.safetensors").exists()


def test_damaged_files(tmp_path: Path, trained: Any) -> None:
    model, optimizer = trained
    model.save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" / "optimizer.safetensors"
    save_optimizer(tmp_path / "folder", from_torch(optimizer.state_dict(), CONFIG))
    tensors, metadata = read_safetensors(path)
    whole, text = (
        {name: np.array(array) for name, array in tensors.items()},
        metadata["alibi_optimizer"],
    )
    for arrays, contents, message in (
        (whole, "{}", "no optimizer's state of version 1"),
        (whole, text.replace('"adam"', '"sgd"'), "has exp_avg"),
        (whole, text.replace('"step": 1', '"step": -1'), "step -1, expected a whole number"),
        (whole, text.replace('"token_embedding.weight", ', ""), "is in no group of the optimizer"),
        (whole, text.replace('"token_embedding.weight"', '"other"'), "groups are not those of"),
        (whole, text.replace('"options"', '"others"'), "must list parameters and options"),
        (dict(list(whole.items())[1:]), text, "does not have all of exp_avg, exp_avg_sq"),
        ({name: array[:1] for name, array in whole.items()}, text, "of the wrong shape"),
    ):
        write_safetensors(path, arrays, {"alibi_optimizer": contents})
        with pytest.raises(CheckpointError, match=message):
            converted(tmp_path / "folder", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="truncated"):
        converted(tmp_path / "folder", tmp_path / "out")


def test_a_wrong_write_is_seen(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained
    model.save_pretrained(tmp_path / "folder")
    state = from_torch(optimizer.state_dict(), CONFIG)
    save_optimizer(tmp_path / "folder", state)

    def without_a_bit(*_: Any) -> Any:
        wrong = optimizer.state_dict()
        wrong["state"] = wrong["state"] | {0: wrong["state"][0] | {"exp_avg": torch.zeros(7, 6)}}
        return wrong

    monkeypatch.setattr("alibi_convert.carrying._WRITTEN", {"pt": without_a_bit})
    with pytest.raises(CheckpointError, match=r"exp_avg differs: token_embedding\.weight\[0, 0\]"):
        converted(tmp_path / "folder", tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"0": {"count": np.ones(2), "mu": {}, "nu": {}}},
            "count is a ndarray, expected one number",
        ),
        ({"0": {"count": {}, "mu": {}, "nu": {}}}, "count is a dict, expected one"),
        ({"0": {"count": np.ones(()), "mu": {"a": 1 + 2j}, "nu": {}}}, "a is a complex, expected"),
        ({"0": {"trace": np.ones(3)}}, "trace is one array, expected a tree"),
        ({"0": {"trace": {"a": np.ones(3)}}}, "trace: 0 tensors missing, 1 unexpected"),
        ({"0": np.ones(3)}, "ndarray in no state that is known"),
        ({"count": np.ones(()), "hyperparams": 3, "inner_state": {}}, "is no mapping; expected"),
        (
            {"count": np.ones(()), "hyperparams": {"b1": {}}, "inner_state": {}},
            r"hyperparams\['b1'\] is a dict, expected one number",
        ),
    ],
)
def test_trees_that_are_no_states(change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_saved(change, CONFIG)


ODD = (None, -1, 1.5, np.nan, np.inf, "x", [], {}, [1], {"0": {}}, True, np.ones(3), torch.ones(2))


def places(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value in nested dicts and lists."""
    if isinstance(tree, dict | list):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*keys, key)
            yield from places(child, (*keys, key))


def damaged(tree: Any, rng: random.Random) -> Any:
    """A copy in which one value is gone, or another, or under another key."""
    tree = copy.deepcopy(tree)
    *keys, last = rng.choice(list(places(tree)))
    node = at(tree, keys)
    if isinstance(node, dict) and rng.random() < 0.3:
        value = node.pop(last)
        if rng.random() < 0.5:
            node[rng.choice(["count", "trace", 7])] = value
    else:
        node[last] = copy.deepcopy(rng.choice(ODD))
    return tree


@pytest.mark.parametrize("kind", ["torch", "optax", "file"])
def test_no_damage_ends_in_a_traceback(tmp_path: Path, trained: Any, kind: str) -> None:
    saved = trained[1].state_dict()
    tensors, metadata = as_file(from_torch(saved, CONFIG))
    whole = {
        "torch": saved,
        "optax": serialization.to_state_dict(train_state(TX["wrapped"]()).opt_state),
        "file": json.loads(metadata["alibi_optimizer"]),
    }[kind]
    rng, refused = random.Random(0), 0
    for _ in range(100):
        wrong = damaged(whole, rng)
        try:
            if kind == "torch":
                from_torch(wrong, CONFIG)
            elif kind == "optax":
                from_saved(wrong, CONFIG)
            else:
                text = json.dumps(wrong, default=lambda array: array.tolist())
                write_safetensors(tmp_path / "file", tensors, {"alibi_optimizer": text})
                from_file(tmp_path / "file", CONFIG)
        except CheckpointError:
            refused += 1
    assert refused > 50
