"""PyTorch models on several devices compute what they compute on one (SPEC.md §19).

The devices are processes on the CPU. What the JAX wing does is in `test_sharding`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import alibi_torch
from alibi_spec import ALiBiConfig, Recipe, parameter_table
from alibi_spec.budgets import AGREEMENTS, BUDGETS, relative_error
from alibi_spec.sharding import devices_of, torch_axes
from alibi_torch import ALiBiLM, KVCache
from alibi_torch.divided import own
from alibi_torch.sharding import device_mesh, parallelize
from alibi_torch.training import _dropout_of_step
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.mesh_processes import (
    CONFIGS,
    RECIPE,
    Results,
    computed,
    drawn_model,
    on_a_mesh,
    run,
    trained,
    weights,
)
from parity_tests.mesh_runs import ENVIRONMENT, assert_same_run, command
from parity_tests.position_processes import SMALL, check_positions, on_meshes

BUDGET = BUDGETS["float64", "cpu"]
TRAINING = AGREEMENTS["float32 training"].relative
MESHES = {
    "tensor": {"tensor": 4},
    "fsdp": {"fsdp": 4},
    "fsdp and tensor": {"fsdp": 2, "tensor": 2},
    "data and fsdp": {"data": 2, "fsdp": 2},
    "data and tensor": {"data": 2, "tensor": 2},
    "sequence": {"sequence": 4},
    "sequence and tensor": {"sequence": 2, "tensor": 2},
    "fsdp and sequence": {"fsdp": 2, "sequence": 2},
}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the processes of a mesh wrote."""

    @cache
    def of_mesh(name: str) -> Path:
        folder = tmp_path_factory.mktemp("mesh")
        for config in CONFIGS:
            drawn_model(config).save_pretrained(folder / f"plain {config}")
        run(on_a_mesh, 4, MESHES[name], folder, tuple(CONFIGS))
        return folder

    return of_mesh


@cache
def alone(name: str) -> Results:
    return computed(drawn_model(name))


def read(file: Path) -> Results:
    with np.load(file) as arrays:
        return dict(arrays)


def assert_alike(actual: Results, exact: Results, what: str) -> None:
    gradients, others = (
        [{key: each[key] for key in each if key.startswith("gradient ") == is_gradient}
         for each in (actual, exact)]
        for is_gradient in (True, False)
    )  # fmt: skip
    assert_gradients_within(*gradients, BUDGET.gradient, what)
    assert others[0].keys() == others[1].keys()
    for key in others[1].keys() - {"tokens"}:
        assert_within(others[0][key], others[1][key], BUDGET.forward, f"{what} {key}")
    if "tokens" in exact:
        assert_bitwise(actual["tokens"], exact["tokens"], what)


@SLOW
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_logits_gradients_and_tokens(mesh: str, config: str, found: Any) -> None:
    assert_alike(read(found(mesh) / f"{config}.npz"), alone(config), f"{config} on {mesh}")


@SLOW
@pytest.mark.parametrize("mesh", MESHES)
def test_training(mesh: str, found: Any) -> None:
    """Twenty steps in float32, in two parts each, recomputed, with gradients that are clipped."""
    expected = trained(drawn_model("gated", torch.float32))
    assert (expected["norms"] > 0.5).any()
    actual = read(found(mesh) / "trained.npz")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_within(actual[name], array, TRAINING, f"{name} on {mesh}")


@SLOW
@pytest.mark.parametrize("mesh", MESHES)
def test_training_in_bfloat16(mesh: str, found: Any) -> None:
    """Losses are those of one device in bfloat16; in float32 they would be others."""
    expected = trained(drawn_model("decoder", torch.float32), "bfloat16")["losses"]
    actual = read(found(mesh) / "rounded.npz")["losses"]
    assert_within(actual, expected, BUDGETS["bfloat16", "cpu"].forward, f"losses on {mesh}")
    unrounded = trained(drawn_model("decoder", torch.float32))["losses"]
    assert relative_error(actual, unrounded) > AGREEMENTS["float32 sums"].relative


@SLOW
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_checkpoints(mesh: str, config: str, found: Any) -> None:
    """Written on any mesh: the bytes of the whole model. Opened on any: its bits."""
    folder = found(mesh)
    for name in ("config.json", "model.safetensors"):
        saved, plain = (folder / f"{each} {config}" / name for each in ("saved", "plain"))
        assert saved.read_bytes() == plain.read_bytes()
    opened = read(folder / f"opened {config}.npz")
    for name, array in weights(drawn_model(config)).items():
        assert_bitwise(opened[name], array, f"{name} opened on {mesh}")


def test_two_devices(tmp_path: Path) -> None:
    """The cheapest of the proofs above, and positions over both."""
    names = ("decoder", "gated")
    meshes = {tmp_path / axis: {axis: 2} for axis in ("tensor", "sequence")}
    for folder, name in itertools.product(meshes, names):
        drawn_model(name).save_pretrained(folder / f"plain {name}")
    run(on_meshes, 2, meshes, names)
    for folder, name in itertools.product(meshes, names):
        what = f"{name} on two devices of {folder.name}"
        assert_alike(read(folder / f"{name}.npz"), alone(name), what)


@SLOW
def test_positions_over_four_devices() -> None:
    """Attention of every kind, what is sent with windows, and that what needs more is NaN."""
    run(check_positions, 4)


# One process that stands for the first of several: what is divided, and what is refused


@pytest.fixture
def eight_devices() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def empty_model(**options: Any) -> ALiBiLM:
    with torch.device("meta"):
        return ALiBiLM(ALiBiConfig(num_layers=1, d_model=48, vocab_size=64, **options))


@pytest.mark.usefixtures("eight_devices")
def test_what_a_device_keeps() -> None:
    """The part that the rules say; of vectors along "embed" FSDP keeps a part too."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    options: dict[str, Any] = {"tie_embeddings": False, "gated_ffn": True, "slopes": "learned"}
    model = parallelize(empty_model(num_heads=4, num_kv_heads=2, **options), device_mesh(sizes))
    for row in parameter_table(model.config):
        axes = torch_axes(row, sizes)
        if "fsdp" not in sum(axes, ()):
            axes = (("fsdp", *axes[0]), *axes[1:])
        count = (devices_of(names, sizes) for names in axes)
        expected = tuple(n // divisor for n, divisor in zip(row.shape, count, strict=True))
        assert own(model.get_parameter(row.name)).shape == expected, row.name


@pytest.mark.usefixtures("eight_devices")
def test_axes_in_any_order() -> None:
    ranks = torch.arange(8).reshape(2, 4)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("tensor", "fsdp"))
    model = parallelize(empty_model(num_heads=4), mesh)
    assert model.mesh.mesh_dim_names == ("data", "fsdp", "sequence", "tensor")
    assert model.mesh.mesh.tolist() == [[[[0, 4]], [[1, 5]], [[2, 6]], [[3, 7]]]]


@pytest.mark.usefixtures("eight_devices")
def test_weights_on_devices_that_divide_positions() -> None:
    """They are more of the axis data, which has the whole of everything."""
    sizes = {"fsdp": 2, "sequence": 2, "tensor": 2}
    model = parallelize(empty_model(num_heads=4), device_mesh(sizes))
    weight: Any = model.transformer.layers[0].ffn.fc1.weight
    assert weight.device_mesh.mesh_dim_names == ("data", "fsdp", "tensor")
    assert weight.device_mesh.mesh.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert own(weight).shape == (24, 24)  # of (48, 48)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("sizes", "options", "rules", "message"),
    [
        ({"model": 8}, {}, None, "unknown axis 'model' of a mesh; expected some of data, fsdp,"),
        ({"tensor": 4}, {}, None, "a mesh of tensor=4 needs 4 processes, and there are 8; start 4"),
        ({"tensor": 8}, {"num_heads": 4}, None, "heads of .*, 4, is fewer than the 8 devices"),
        ({"fsdp": 8}, {}, {"embed": None}, "a rule divides embed over no axis, .* expected fsdp"),
        (
            {"fsdp": 4, "tensor": 2},
            {},
            {"mlp": ["tensor", "fsdp"]},
            "a rule divides mlp over tensor, fsdp, .* expected tensor or None",
        ),
        ({"tensor": 8}, {}, {"heads": None}, "keeps the heads whole and divides the kv_heads that"),
        (
            {"tensor": 8},
            {"num_heads": 24, "num_kv_heads": 12},
            {"kv_heads": None},
            "each of 8 devices has 3 of the heads, of which 2 share keys; expected a multiple",
        ),
    ],
)
def test_what_is_refused(sizes: Any, options: Any, rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(empty_model(**({"num_heads": 8} | options)), device_mesh(sizes, "cpu"), rules)


@pytest.mark.usefixtures("eight_devices")
def test_models_that_are_refused() -> None:
    mesh = device_mesh({"tensor": 8}, "cpu")
    model = parallelize(empty_model(num_heads=8), mesh)
    with pytest.raises(ValueError, match="divided over a mesh already; load it anew"):
        parallelize(model, mesh)
    mixed = empty_model(num_heads=8, slopes="learned").to(torch.bfloat16)
    with pytest.raises(ValueError, match="weights are bfloat16 and float32, which FSDP cannot"):
        parallelize(mixed, mesh)
    some: Any = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("tensor",))
    with pytest.raises(ValueError, match="mesh of tensor=4 has 4 of 8 processes; expected all"):
        parallelize(empty_model(num_heads=8), some)
    nameless: Any = DeviceMesh("cpu", torch.arange(8))
    with pytest.raises(ValueError, match="has no names of axes; expected some of data"):
        parallelize(empty_model(num_heads=8), nameless)
    jax_like: Any = {"tensor": 8}
    with pytest.raises(ValueError, match="mesh is a dict; expected a DeviceMesh"):
        parallelize(empty_model(num_heads=8), jax_like)
    elsewhere = DeviceMesh("cuda", torch.arange(8), mesh_dim_names=("tensor",), _init_backend=False)
    with pytest.raises(ValueError, match="is on cpu and the mesh is of cuda; move the model first"):
        parallelize(ALiBiLM(model.config), elsewhere)
    fsdp = device_mesh({"fsdp": 8}, "cpu")
    recipe = Recipe(steps=1, batch_size=8, compute_dtype="bfloat16")
    step = alibi_torch.Trainer(parallelize(ALiBiLM(model.config), fsdp), recipe).step
    tokens = torch.zeros(8, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="gathers in float32; pass parallelize"):
        step({"tokens": tokens, "targets": tokens})
    learned = empty_model(num_heads=8, slopes="learned")
    with pytest.raises(ValueError, match="'bfloat16' and learned slopes, which are never rounded"):
        parallelize(learned, fsdp, compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="'float16' is not known; expected one of float32, bfl"):
        parallelize(empty_model(num_heads=8), fsdp, compute_dtype="float16")


@pytest.mark.usefixtures("eight_devices")
def test_windows_of_divided_heads() -> None:
    config = ALiBiConfig(num_layers=1, d_model=48, vocab_size=64, num_heads=8)
    model = parallelize(ALiBiLM(config), device_mesh({"tensor": 8})).eval()
    cache_ = KVCache.empty(config, 1, 4096, windows=np.full((1, 8), 2))
    with torch.no_grad(), pytest.raises(ValueError, match="of a model whose heads are divided"):
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache_)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("axis", ["fsdp", "sequence"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model, tokens: alibi_torch.token_log_probabilities(model, tokens),
        lambda model, tokens: alibi_torch.fill_masks(model, tokens, 0),
        lambda model, tokens: alibi_torch.encode(model, tokens.tolist()),
    ],
    ids=["token_log_probabilities", "fill_masks", "encode"],
)
def test_parts_of_models_that_fsdp_has_divided(use: Any, axis: str) -> None:
    model = parallelize(empty_model(num_heads=4), device_mesh({axis: 8}, "cpu")).eval()
    with pytest.raises(ValueError, match="calls parts of the model, whose weights are divided"):
        use(model, torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("use", [alibi_torch.trace, alibi_torch.model_plans])
def test_what_shows_all_positions(use: Any) -> None:
    model = parallelize(empty_model(num_heads=4), device_mesh({"sequence": 8}, "cpu")).eval()
    with pytest.raises(ValueError, match="the attention of all positions, which are divided over"):
        use(model, torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.usefixtures("eight_devices")
def test_batches_that_are_refused() -> None:
    model = parallelize(ALiBiLM(SMALL), device_mesh({"fsdp": 4, "sequence": 2}, "cpu"))
    trainer = alibi_torch.Trainer(model, Recipe(steps=1, batch_size=4))
    for shape, message in (
        ((4, 7), "seq of a batch, 7, is not a multiple of the 2 devices of sequence=2; take a mes"),
        ((4, 1), "seq of a batch, 1, is fewer than the 2 devices of sequence=2"),
    ):
        tokens = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(ValueError, match=message):
            trainer.step({"tokens": tokens, "targets": tokens})


def test_windows_of_another_model() -> None:
    with pytest.raises(ValueError, match="windows are those of a decoder; pass windows=None"):
        ALiBiLM(replace(SMALL, causal=False), windows=((4, 4),) * 2)
    model = ALiBiLM(SMALL, windows=((4, 4),) * 2)
    with pytest.raises(ValueError, match=r"windows have shape \(1, 3\); expected \(2, 2\), layers"):
        model.windows = ((4, 5, 6),)
    assert model.windows == ((4, 4),) * 2


def test_dropout_differs_from_part_to_part() -> None:
    """And not along the axes tensor and sequence, where devices have the same sequences."""
    drawn = []
    for rank in (0, 1, 2, 4):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        model = empty_model(num_heads=4)
        model.mesh = device_mesh({"fsdp": 2, "sequence": 2, "tensor": 2}, "cpu")
        with _dropout_of_step(RECIPE, 3, torch.device("cpu"), model):
            drawn.append(float(torch.rand(())))
        dist.destroy_process_group()
    with _dropout_of_step(RECIPE, 3, torch.device("cpu"), empty_model(num_heads=4)):
        assert drawn[0] == float(torch.rand(()))
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_no_processes() -> None:
    with pytest.raises(ValueError, match="no group of processes; start them by torchrun"):
        device_mesh({"tensor": 1})


# Runs of `alibi train`


def of_torchrun(count: int, arguments: list[str]) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc-per-node={count}", "-m", "alibi_cli", *arguments]
    done = subprocess.run(start, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [json.loads(done.stdout)]  # one process prints
    assert told[0]["step"] > 0


@SLOW
def test_a_run_goes_on_with_fewer_processes(tmp_path: Path) -> None:
    from alibi_cli.main import main

    assert main(command(tmp_path, "one")) == 0
    of_torchrun(4, command(tmp_path, "mesh", "--mesh", "fsdp=2,tensor=2", "--until", "8"))
    of_torchrun(2, command(tmp_path, "mesh", "--mesh", "sequence=2"))
    assert_same_run(tmp_path / "mesh", tmp_path / "one")
    lines = (tmp_path / "mesh" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [*range(1, 13)]


KILLED = """
import os, signal, sys
import alibi_torch
step = alibi_torch.Trainer.step
def killed(self, batch):
    if os.environ["RANK"] == "1" and self.step_count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
alibi_torch.Trainer.step = killed
from alibi_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@SLOW
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    """Also without torchrun, which would end them; the run goes on with one process less."""
    from alibi_cli.main import main

    port = 20000 + os.getpid() % 10000  # below those that systems give to outgoing connections
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    given = command(tmp_path, "mesh", "--mesh", "fsdp=2")
    others = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, *given],
            env=ENVIRONMENT | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [each.communicate(timeout=300)[1] for each in others]
    assert [each.returncode for each in others] == [3, -signal.SIGKILL], told
    assert "error: another process of the run has ended or does not answer; start all" in told[0]
    assert main(command(tmp_path, "mesh")) == 0
    assert main(command(tmp_path, "one")) == 0
    assert_same_run(tmp_path / "mesh", tmp_path / "one")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mesh", "fsdp=2"], "a mesh needs processes, and this is the only one; start them by"),
        (["--processes", "auto"], "--processes are those of --backend flax with a --mesh; pass"),
        (["--mesh", "fsdp=2", "--device", "cpu"], "--mesh is of all devices, with a tokenizer"),
    ],
)
def test_commands_that_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alibi_cli.main import main

    assert main(command(tmp_path, "mesh", *more)) == 2
    assert message in capsys.readouterr().err
