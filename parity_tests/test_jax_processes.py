"""Models over the devices of several processes of JAX: opened, saved, and trained (SPEC.md §19)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import alibi_flax
from alibi_convert import torch_to_flax
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.optimizers.file import as_file
from alibi_convert.optimizers.state import Group, OptimizerState
from alibi_convert.tensors import Tensors, as_numpy
from alibi_convert.writing.layout import OPTIMIZER_FILE, WEIGHTS_FILE
from alibi_flax.kernels.partition import automatic_mesh
from alibi_spec.parameters import initial_parameters, parameter_names
from alibi_torch import ALiBiLM
from parity_tests.compare import assert_bitwise
from parity_tests.jax_processes import CONFIGS, MESHES
from parity_tests.mesh_runs import ENVIRONMENT, assert_same_run, command

PORT = 21000 + os.getpid() % 9000  # below those that systems give to outgoing connections


def together(commands: list[list[str]], **environment: str) -> list[str]:
    """Run processes that wait for one another; what each printed.

    When one fails, the others are ended: they would wait for minutes.
    """
    given = ENVIRONMENT | {"JAX_PLATFORMS": "cpu"} | environment
    with ExitStack() as opened:
        files = [opened.enter_context(TemporaryFile("w+")) for _ in range(2 * len(commands))]
        printed, errors = files[::2], files[1::2]
        started = [
            subprocess.Popen([sys.executable, *words], env=given, stdout=out, stderr=error)
            for words, out, error in zip(commands, printed, errors, strict=True)
        ]
        end = monotonic() + 300
        while None in (codes := [each.poll() for each in started]) and not any(codes):
            if monotonic() > end:
                break
            sleep(0.05)
        for each in started:
            each.kill()
            each.wait()
        told = [file.seek(0) or file.read() for file in files]
    assert codes == [0] * len(commands), (codes, "".join(told)[-8000:])
    return told[::2]


def write_plain(folder: Path) -> None:
    """The models of the program, on one device, and the state of an optimizer."""
    for name, config in CONFIGS.items():
        dtype = jnp.bfloat16 if name == "rounded" else jnp.float32
        params = torch_to_flax(initial_parameters(config, 0), config)
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), params)
        alibi_flax.save_pretrained(folder / name, alibi_flax.ALiBiLM(config), params)
    config = CONFIGS["plain"]
    moments = {
        word: Tensors.of(initial_parameters(config, seed))
        for seed, word in enumerate(("exp_avg", "exp_avg_sq"), start=1)
    }
    state = OptimizerState("adam", 3, moments, (Group(parameter_names(config), {}),))
    write_safetensors(folder / "plain" / OPTIMIZER_FILE, *as_file(state))


def assert_same_files(folder: Path, name: str, sizes: Any) -> None:
    """Bit by bit what one device writes."""
    resumed = f"{name} resumed on {sizes}"
    for saved in (f"{name} on {sizes}", f"{name} on {sizes}, stacked", resumed):
        if saved == resumed and name != "plain":
            continue
        for file in (WEIGHTS_FILE, *([OPTIMIZER_FILE] if saved == resumed else [])):
            assert (folder / saved / file).read_bytes() == (folder / name / file).read_bytes()


def program(folder: Path, devices: int, *group: Any) -> list[str]:
    return ["-m", "parity_tests.jax_processes", str(folder), str(devices), *map(str, group)]


def test_one_process_of_two_devices(tmp_path: Path) -> None:
    write_plain(tmp_path)
    together([program(tmp_path, 2)])
    assert_same_files(tmp_path, "plain", MESHES[2][0])


@pytest.mark.slow
def test_two_processes_of_two_devices(tmp_path: Path) -> None:
    write_plain(tmp_path)
    together([program(tmp_path, 2, 2, number, PORT) for number in range(2)])
    for sizes in MESHES[4]:
        for name in CONFIGS:
            assert_same_files(tmp_path, name, sizes)
        expected = ALiBiLM.from_pretrained(tmp_path / "rounded").state_dict()
        files = tmp_path / f"rounded in files of {sizes}"
        assert len([*files.glob("model-*.safetensors")]) > 2
        for key, array in ALiBiLM.from_pretrained(files).state_dict().items():
            assert_bitwise(as_numpy(array), as_numpy(expected[key]), f"{key} on {sizes}")


def trained(folder: Path, devices: int, *groups: list[str], options: list[str]) -> None:
    given = ["-m", "alibi_cli", *command(folder, "mesh", "--backend", "flax", *options)]
    printed = together([[*given, *group] for group in groups], JAX_NUM_CPU_DEVICES=str(devices))
    told = ['"step"' in each for each in printed]  # gloo prints, too
    assert told == [True, *[False] * (len(groups) - 1)]


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(tmp_path: Path) -> None:
    """Two processes, then one of two devices, then PyTorch: the run of one device."""
    from alibi_cli.main import main

    assert main(command(tmp_path, "one", "--backend", "flax")) == 0
    groups = [["--processes", f"localhost:{PORT + 1},2,{number}"] for number in range(2)]
    trained(tmp_path, 2, *groups, options=["--mesh", "fsdp=2,tensor=2", "--until", "4"])
    trained(tmp_path, 2, [], options=["--mesh", "sequence=2", "--until", "8"])
    assert main(command(tmp_path, "mesh")) == 0
    assert_same_run(tmp_path / "mesh", tmp_path / "one")
    lines = (tmp_path / "mesh" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [*range(1, 13)]


def generation(folder: Path) -> list[str]:
    """A command, by a model whose tokens are bytes."""
    config = replace(CONFIGS["rounded"], vocab_size=256)
    params = torch_to_flax(initial_parameters(config, 0), config)
    alibi_flax.save_pretrained(folder / "model", alibi_flax.ALiBiLM(config), params)
    return ["generate", str(folder / "model"), "--prompt", "To be", "--max-new-tokens", "9"]


def test_generation_is_divided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alibi_cli.main import main

    generate, seen = alibi_flax.generate, []

    def watched(model: Any, params: Any, *given: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves(params)
        seen.append({leaf.sharding.mesh.axis_names for leaf in leaves})
        seen.append(automatic_mesh())
        return generate(model, params, *given, **options)

    monkeypatch.setattr(alibi_flax, "generate", watched)
    given = generation(tmp_path)
    assert main([*given, "--backend", "flax", "--mesh", "tensor=1"]) == 0
    axes, mesh = seen
    assert axes == {("tensor",)}
    assert mesh is not None
    assert main([*given[:2], "--mesh", "tensor=1"]) == 2
    assert "the standard input is not that of every process" in capsys.readouterr().err


@pytest.mark.slow
def test_generation_over_two_devices(tmp_path: Path) -> None:
    """By either backend, at once and as a stream, the text of one device; one process prints."""
    given = ["alibi_cli", *generation(tmp_path)]
    flax, torchrun = ["--backend", "flax"], ["torch.distributed.run", "--standalone"]
    for more in ([], ["--stream"]):
        (one,) = together([["-m", *given, *more]])
        for words in (
            [*given, *more, *flax, "--mesh", "tensor=2"],
            [*given, *more, *flax, "--mesh", "fsdp=2"],
            [*torchrun, "--nproc-per-node=2", "-m", *given, *more, "--mesh", "tensor=2"],
        ):
            (several,) = together([["-m", *words]], JAX_NUM_CPU_DEVICES="2")
            assert several == one, words


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mesh", "fsdp=2"], "a mesh of fsdp=2 is of 2, and the number of JAX's devices is 1"),
        (["--mesh", "model=1"], "unknown axis 'model' of a mesh; expected some of data, fsdp, seq"),
        (["--mesh", "fsdp"], "'fsdp' in 'fsdp'; expected AXIS=SIZE, each axis once"),
        (["--mesh", "fsdp=1,fsdp=2"], "'fsdp=2' in 'fsdp=1,fsdp=2'; expected AXIS=SIZE, each"),
        (["--mesh", "fsdp=1", "--processes", "a,b"], "'a,b' is no group of processes; expected"),
    ],
)
def test_commands_that_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alibi_cli.main import main

    try:
        code = main(command(tmp_path, "mesh", "--backend", "flax", *more))
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mesh").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "training.batch_size=3"], "batch of a batch, 3, is not a multiple of the 2 dev"),
        (["--mesh", "data=1"], "a mesh of data=1 is of 1, and the number of JAX's devices is 2"),
        (["--processes", "auto"], "JAX cannot tell the processes of 'auto' (coordinator_address"),
        (["--processes", "localhost:1,2,2"], "JAX cannot tell the processes of 'localhost:1,2,2'"),
    ],
)
def test_commands_that_jax_refuses(more: list[str], message: str, tmp_path: Path) -> None:
    """In a process of its own, since the tests have started JAX."""
    given = command(tmp_path, "mesh", "--backend", "flax", "--mesh", "data=2", *more)
    done = subprocess.run(
        [sys.executable, "-m", "alibi_cli", *given],
        env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
