"""Weights in what training runs save: orbax's CheckpointManager, wrapped and nested state dicts."""

from __future__ import annotations

from collections.abc import Callable
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
from safetensors.torch import save_file

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import CheckpointError, convert, inspect, open_checkpoint
from alibi_convert.checkpoint import Checkpoint
from alibi_convert.rules import flax_tree
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import ALiBiConfig
from parity_tests.cases import draw_parameters
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise

CONFIG = ALiBiConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_len=16)
PARAMETERS = draw_parameters(CONFIG)


def train_state(step: int) -> TrainState:
    params = jax.tree.map(jnp.asarray, flax_tree(Tensors.of(PARAMETERS), CONFIG))
    params = jax.tree.map(lambda leaf: leaf * step, params)
    return TrainState.create(apply_fn=len, params=params, tx=optax.adam(1e-3))


def assert_step(checkpoint: Checkpoint, step: int) -> None:
    for name, array in PARAMETERS.items():
        assert_bitwise(checkpoint.tensors[name], array * np.float32(step), name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that orbax 0.12's CheckpointManager wrote: three ways to save, one of them twice."""
    root = tmp_path_factory.mktemp("runs")
    with ocp.CheckpointManager(root / "state") as manager:
        manager.save(9, args=ocp.args.StandardSave(train_state(9)))
        manager.save(10, args=ocp.args.StandardSave(train_state(10)))
    params, other = train_state(2).params, {"count": np.ones(3)}
    items = {"params": ocp.args.StandardSave(params), "optimizer": ocp.args.StandardSave(other)}
    with ocp.CheckpointManager(root / "items") as manager:
        manager.save(2, args=ocp.args.Composite(**items, data=ocp.args.JsonSave({"seen": 3})))
    options = ocp.CheckpointManagerOptions(step_prefix="run", step_format_fixed_length=4)
    with ocp.CheckpointManager(root / "prefixed", options=options) as manager:
        manager.save(3, args=ocp.args.PyTreeSave({"params": {"params": train_state(3).params}}))
    return root


@pytest.mark.parametrize(
    ("place", "wanted", "step"),
    [
        ("state", None, 10),
        ("state", 9, 9),
        ("state/9", None, 9),
        ("state/9/default", None, 9),
        ("items", None, 2),
        ("items/2/params", None, 2),
        ("prefixed", None, 3),
        ("prefixed", 3, 3),
    ],
)
def test_orbax_checkpoint_managers(runs: Path, place: str, wanted: int | None, step: int) -> None:
    found = open_checkpoint(runs / place, config=CONFIG, step=wanted)
    assert_step(found, step)
    beside = {"state": {"opt_state", "step"}}.get(place.split("/")[0], set())
    assert set(found.derived) == beside
    assert_step(open_checkpoint(found.path, config=CONFIG), step)


def test_both_backends_load_a_step(runs: Path) -> None:
    name = "transformer.final_norm.weight"
    expected = PARAMETERS[name] * np.float32(9)
    options: Any = {"config": CONFIG, "step": 9}
    model = alibi_torch.ALiBiLM.from_pretrained(runs / "state", **options)
    assert_bitwise(as_numpy(model.get_parameter(name)), expected, "torch")
    _, params = alibi_flax.from_pretrained(runs / "state", **options)
    assert_bitwise(np.asarray(params["transformer"]["final_norm"]["scale"]), expected, "flax")


def test_steps_that_are_not_there(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="state has no step 3; it has 9, 10"):
        open_checkpoint(runs / "state", config=CONFIG, step=3)
    for path in (runs / "state" / "9", runs / "state" / "9" / "default", write(tmp_path / "ours")):
        with pytest.raises(CheckpointError, match=r"has no steps; leave out step=9 \(--step\)"):
            open_checkpoint(path, config=CONFIG, step=9)


def test_the_step_of_a_command(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    places = str(runs / "state"), str(tmp_path / "out")
    assert main(["convert", *places, "--step=9", f"--config={tmp_path / 'config.json'}"]) == 0
    assert str(Path("state", "9", "default")) in capsys.readouterr().out
    assert_step(open_checkpoint(tmp_path / "out"), 9)


def test_training_states_in_msgpack(tmp_path: Path) -> None:
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(train_state(2)))
    found = open_checkpoint(tmp_path / "state.msgpack", config=CONFIG)
    assert_step(found, 2)
    assert set(found.derived) == {"opt_state", "step"}


State = dict[str, torch.Tensor]


def prefixed(*prefixes: str) -> State:
    return {"".join(prefixes) + name: as_torch(array) for name, array in PARAMETERS.items()}


def inside(word: str) -> State:
    return {name.replace("layers.0.", f"layers.0.{word}"): t for name, t in prefixed().items()}


@pytest.mark.parametrize(
    ("state", "wrappers"),
    [
        (prefixed("module."), ["module."]),
        (prefixed("model.", "module."), ["model.", "module."]),
        (prefixed("_orig_mod.", "module."), ["_orig_mod.", "module."]),
        (prefixed("module.", "_orig_mod."), ["_orig_mod.", "module."]),
        (inside("_fsdp_wrapped_module._checkpoint_wrapped_module."), None),
        (inside("_orig_mod."), ["_orig_mod."]),
    ],
)
def test_wrapped_state_dicts(tmp_path: Path, state: State, wrappers: list[str] | None) -> None:
    save_file(state, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path / "model.safetensors", config=CONFIG)
    assert_step(found, 1)
    expected = ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
    assert found.wrappers == (wrappers or expected)


@pytest.mark.parametrize(
    ("save", "keys"),
    [
        (lambda state: {"state_dict": state, "epoch": 3, "callbacks": {}}, ["state_dict"]),
        (lambda state: {"state": {"model": state, "timestamp": 1}, "rng": 2}, ["state", "model"]),
        (lambda state: {"model_state_dict": state, "loss": 0.1}, ["model_state_dict"]),
        (lambda state: {"model": state, "optimizer": {"state": {}}, "step": 3}, ["model"]),
        (lambda state: {"state": state, "epoch": 3}, ["state"]),
    ],
)
def test_files_of_training_runs(
    tmp_path: Path,
    save: Callable[[State], Any],
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of Lightning, of Composer, of the tutorials; what is beside the weights is named."""
    source = tmp_path / "last.ckpt"
    torch.save(save(prefixed("model.")), source)
    report = convert(source, tmp_path / "out", config=CONFIG, allow_pt=True)
    assert_step(open_checkpoint(tmp_path / "out"), 1)
    assert report.wrappers == inspect(source, config=CONFIG, allow_pt=True)["wrappers"]
    assert report.wrappers == [*keys, "model."]
    assert report.dropped
    assert not set(report.dropped) & set(keys)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    assert main(["inspect", str(source), "--allow-pt", f"--config={tmp_path / 'config.json'}"]) == 0
    assert f"removed from the names: {', '.join(report.wrappers)}" in capsys.readouterr().out


def test_prefixes_are_of_all_or_of_none(tmp_path: Path) -> None:
    """A prefix of some is another tensor's name; and two of one name are one too many."""
    name = next(iter(PARAMETERS))
    state = prefixed("module.")
    state[name] = state.pop(f"module.{name}")
    save_file(state, tmp_path / "some.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected +module\."):
        open_checkpoint(tmp_path / "some.safetensors", config=CONFIG)
    twice = prefixed() | {f"_orig_mod.{name}": as_torch(PARAMETERS[name])}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="is there with a wrapper's prefix and without"):
        open_checkpoint(tmp_path / "twice.safetensors", config=CONFIG)
