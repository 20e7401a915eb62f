"""Models over a mesh of devices: which axes are divided, and that nothing else changes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

import alibi_flax
from alibi_spec import ALiBiConfig, Recipe, parameter_table
from alibi_spec.sharding import (
    batch_axes,
    check_sharding,
    devices_of,
    neighbours_needed,
    parameter_axes,
    resolved_rules,
    torch_axes,
)
from parity_tests.on_a_mesh import BATCH, CONFIGS, SEQ

CONFIG = ALiBiConfig(
    **{"num_layers": 1, "d_model": 48, "num_heads": 12, "num_kv_heads": 2, "vocab_size": 96},
    **{"tie_embeddings": False, "slopes": "learned", "gated_ffn": True, "max_len": 16},
)
ROWS = {row.name: row for row in parameter_table(CONFIG)}
LAYER = "transformer.layers.0"


def test_parameters_on_a_mesh() -> None:
    mesh = {"data": 2, "fsdp": 3, "tensor": 2}
    data, fsdp, tensor = (), ("fsdp",), ("tensor",)
    whole = data
    for name, flax, torch in (
        ("token_embedding.weight", (tensor, fsdp), (tensor, fsdp)),
        (f"{LAYER}.attn_norm.weight", (whole,), (whole,)),
        (f"{LAYER}.attn.slopes", (tensor,), (tensor,)),
        (f"{LAYER}.attn.query.weight", (fsdp, tensor, whole), (tensor, fsdp)),
        (f"{LAYER}.attn.key.bias", (tensor, whole), (tensor,)),
        (f"{LAYER}.attn.output.weight", (tensor, whole, fsdp), (fsdp, tensor)),
        (f"{LAYER}.attn.output.bias", (whole,), (whole,)),
        (f"{LAYER}.ffn.gate.weight", (fsdp, tensor), (tensor, fsdp)),
        (f"{LAYER}.ffn.fc1.bias", (tensor,), (tensor,)),
        (f"{LAYER}.ffn.fc2.weight", (tensor, fsdp), (fsdp, tensor)),
        ("lm_head.weight", (fsdp, tensor), (tensor, fsdp)),
    ):
        assert parameter_axes(ROWS[name], mesh) == flax, name
        assert torch_axes(ROWS[name], mesh) == torch, name
    check_sharding(CONFIG, mesh)
    assert batch_axes((12, 10), mesh) == (("data", "fsdp"), ())
    assert batch_axes((4, 6), {"sequence": 3}) == ((), ("sequence",))
    assert devices_of(("data", "fsdp"), mesh) == 6
    kept = {"vocab": None, "mlp": ["tensor", "fsdp"], "embed": None}
    assert parameter_axes(ROWS["lm_head.weight"], mesh, kept) == (whole, whole)
    fc1 = ROWS[f"{LAYER}.ffn.fc1.weight"]
    assert parameter_axes(fc1, mesh, kept) == (whole, ("tensor", "fsdp"))
    assert resolved_rules({"data": 2}, {"seq": "data"})["seq"] == ("data",)


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ({"tensor": 2}, {"head": "tensor"}, "for 'head', which is no axis that can be divided"),
        ({"tensor": 2}, {"mlp": "model"}, "over 'model', and the mesh has tensor; name one"),
        ({"tensor": 5}, None, "vocab of token_embedding.weight, 96, is not a multiple of the 5"),
        ({"tensor": 4}, None, r"kv_heads of .*key.weight, 2, is fewer than the 4 devices"),
        ({"fsdp": 5}, None, r"with rules=\{'embed': None\}"),
        ({"tensor": 2}, {"embed": "tensor"}, "tensor divides both vocab and embed of token_em"),
    ],
)
def test_what_cannot_be_divided(mesh: Any, rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sharding(CONFIG, mesh, rules)


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="batch of a batch, 6, is not a multiple of the 4 devices"):
        batch_axes((6, 8), {"data": 2, "fsdp": 2})
    with pytest.raises(ValueError, match="seq of a batch, 3, is fewer than the 4 devices of seq"):
        batch_axes((6, 3), {"sequence": 4})


def test_meshes_in_jax() -> None:
    """The trees that JAX gets; what several devices compute with them is below."""
    devices = np.array(jax.devices("cpu")[:1])
    mesh = Mesh(devices[:, None], ("data", "tensor"))
    tree = alibi_flax.shardings(CONFIG, mesh)
    kernel = tree["transformer"]["layers_0"]["attn"]["query"]["kernel"]
    assert kernel.spec == PartitionSpec(None, "tensor", None)
    row = ROWS[f"{LAYER}.ffn.fc2.weight"]
    sharding = alibi_flax.parameter_sharding(row, mesh, {"mlp": ["tensor", "data"]})
    assert sharding.spec == PartitionSpec(("tensor", "data"), None)
    assert alibi_flax.batch_sharding((4, 8), mesh).spec == PartitionSpec("data", None)
    explicit = Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"make it with axis_types=\(AxisType.Auto,\) \* 1"):
        alibi_flax.shardings(CONFIG, explicit)


# The collectives that compute logits: a sum behind each of the two branches of two layers and
# behind the embedding; a gathering of each matrix; keys and values of each layer, and once what
# hides them, sent to the next device.
SUMS, MATRICES, OF_KEYS = {"all-reduce": 5}, {"all-gather": 14}, {"collective-permute": 5}
COLLECTIVES: dict[str, dict[str, int]] = {
    "data=8": {},
    "data=2,tensor=4": SUMS,
    "fsdp=2,tensor=4": SUMS | MATRICES,
    "data=2,tensor=2,sequence=2": SUMS | OF_KEYS,
}
each_mesh = pytest.mark.parametrize("mesh", COLLECTIVES, ids=["data", "tensor", "fsdp", "sequence"])


def size_of(name: str) -> int:
    return sum(math.prod(row.shape) for row in parameter_table(CONFIGS[name]))


def found_on(mesh: str) -> Any:
    """What the program prints that computes on eight devices."""
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.on_a_mesh", mesh],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # XLA's word for moving an array by way of one device.
    assert "rematerialization" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@each_mesh
def test_a_mesh_computes_what_one_device_does(mesh: str) -> None:
    """Logits, gradients, twenty steps, generation; what is sent, and that nothing whole is kept."""
    name = "heads of their own"
    found = found_on(mesh)[name]
    nbytes = found["logits"].pop("bytes")
    assert found["logits"] == COLLECTIVES[mesh]
    sizes = dict(each.split("=") for each in mesh.split(","))
    if mesh == "data=8":  # only the mean of the gradients, once
        assert found["gradients"] == {"all-reduce": 1, "bytes": 8 * size_of(name)}
    if mesh == "data=2,tensor=4":  # each sum is of a device's own activations
        assert nbytes == 5 * 8 * BATCH // int(sizes["data"]) * SEQ * CONFIGS[name].d_model


@pytest.mark.slow
def test_positions_over_eight_devices() -> None:
    """The same values and gradients; with a model's windows only the keys in them are sent."""
    found = found_on("sequence=8")
    of_masks_and_norms = 1024
    assert 0 <= found["windows"]["bytes"] - found["sent, by the windows"] < of_masks_and_norms
    assert found["windows"]["bytes"] < 0.7 * found["all"]["bytes"]
    assert "all-gather" not in found["all"] | found["windows"]


def test_neighbours_needed() -> None:
    """The devices on which a key of the window lies, for the first position of any device."""
    own, devices = 7, 5
    for window in range(1, 60):
        last = own * (devices - 1)  # the first position of the last device
        keys = range(max(0, last - window + 1), last + 1)
        expected = devices - 1 - min(keys) // own
        assert neighbours_needed([window], 1, own, devices) == [expected], window
    assert neighbours_needed([3, -1], 2, own, devices) == [1, 4]
    assert neighbours_needed([3, 20], 1, own, devices) == [3]  # which of the two, is not known
    assert neighbours_needed(None, 2, own, devices) == [4, 4]


def test_batches_that_a_mesh_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training does not let every device compute all of them."""
    config = replace(CONFIG, slopes="paper", dropout=0.0)
    model = alibi_flax.ALiBiLM(config)
    tokens = np.zeros((4, 8), np.int32)
    recipe = Recipe(steps=1, batch_size=4, accumulation_steps=2)
    trainer = alibi_flax.Trainer(model, model.init(jax.random.key(0), tokens)["params"], recipe)
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    monkeypatch.setattr("alibi_flax.training.automatic_mesh", lambda: mesh)
    with pytest.raises(ValueError, match="batch of a batch, 2, is fewer than the 4 devices"):
        trainer.step({"tokens": tokens, "targets": tokens})


def test_windows_of_another_model() -> None:
    with pytest.raises(ValueError, match="windows are those of a decoder; pass windows=None"):
        alibi_flax.ALiBiLM(replace(CONFIG, causal=False), windows=((4,) * 12,))
    with pytest.raises(
        ValueError, match=r"windows have shape \(1, 3\); expected \(1, 12\), layers"
    ):
        alibi_flax.ALiBiLM(CONFIG, windows=((4, 5, 6),))
