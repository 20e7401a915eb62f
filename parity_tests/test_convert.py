"""Checkpoints on disk: their formats, bit for bit, and what `verify` sees."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert import (
    CheckpointError,
    MismatchError,
    convert,
    open_checkpoint,
)
from alibi_convert.comparison import relation, require_same
from alibi_convert.formats import FORMATS
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_convert.values import round_once
from alibi_convert.writing.layout import sidecar
from alibi_spec import ALiBiConfig, parameter_table
from alibi_spec.budgets import BUDGETS
from alibi_verify import verify, verify_steps
from parity_tests.cases import CONFIGS, draw_parameters, each_config
from parity_tests.checkpoints import CONFIG, OURS, assert_holds, make_folder, write
from parity_tests.compare import assert_bitwise


@each_config
def test_both_backends_read_what_either_wrote(tmp_path: Path, config_name: str) -> None:
    """torch writes, Flax reads and writes, torch reads: the same bits, the same configuration."""
    config = CONFIGS[config_name]
    bare = config.vocab_size is None
    model_class = alibi_torch.ALiBiTransformer if bare else alibi_torch.ALiBiLM
    model = model_class(config)
    model.load_state_dict({name: as_torch(a) for name, a in draw_parameters(config).items()})
    model.save_pretrained(tmp_path / "from_torch")
    assert_holds(tmp_path / "from_torch", config)

    flax_model, params = alibi_flax.from_pretrained(tmp_path / "from_torch")
    assert type(flax_model).__name__ == model_class.__name__
    assert flax_model.config == config
    alibi_flax.save_pretrained(tmp_path / "from_flax", flax_model, params)
    assert_holds(tmp_path / "from_flax", config)

    back = model_class.from_pretrained(tmp_path / "from_flax")
    assert not back.training
    for name, tensor in model.state_dict().items():
        assert_bitwise(as_numpy(back.state_dict()[name]), as_numpy(tensor), name)


def test_files_hold_no_slopes_and_torch_layout(tmp_path: Path) -> None:
    """What is on disk is what any safetensors reader would expect of a torch model."""
    from safetensors.torch import load_file

    write(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert set(state) == {row.name for row in parameter_table(CONFIG)}
    alibi_torch.ALiBiLM(CONFIG).load_state_dict(state)
    files = [tmp_path / "model" / name for name in ("model.safetensors", "config.json")]
    assert len({file.stat().st_mode for file in files}) == 1  # whoever reads one reads the other
    config = json.loads(files[1].read_text())
    head = [config.pop(key) for key in ("format", "format_version", "model_type")]
    assert head == ["alibi-duo", 1, "alibi-duo"]
    assert ALiBiConfig.from_dict(config) == CONFIG


def test_shards(tmp_path: Path) -> None:
    """A sharded folder opens like a whole one; the index accounts for every byte."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_folder(folder, CONFIG, Tensors.of(draw_parameters(CONFIG)), max_shard_bytes=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = sum(array.nbytes for array in draw_parameters(CONFIG).values())
    assert index["metadata"]["total_size"] == total
    assert_holds(folder, CONFIG)
    alibi_torch.ALiBiLM.from_pretrained(folder)
    alibi_flax.from_pretrained(folder)

    index["weight_map"]["lm_head.weight"] = shards[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index disagree about lm_head\.weight"):
        read_tensors(folder)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere\.safetensors', outside"):
        read_tensors(folder)


def test_strided_arrays_reach_the_disk_intact(tmp_path: Path) -> None:
    """safetensors 0.8.0 writes the buffer of a transposed array as if it were contiguous."""
    parameters = {
        name: np.asfortranarray(array) if array.ndim == 2 else np.repeat(array, 2)[::2]
        for name, array in draw_parameters(CONFIG).items()
    }
    assert not any(array.flags.c_contiguous for array in parameters.values())
    for kind in OURS:
        path = (tmp_path / kind).with_suffix(FORMATS[kind].suffix)
        FORMATS[kind].write(path, CONFIG, Tensors.of(parameters))
        assert_holds(path, CONFIG)


def test_casts_report_their_rounding(tmp_path: Path) -> None:
    write(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "narrow", dtype="bfloat16")
    assert report.rounding is not None
    assert 0.5 * 2**-9 < report.rounding <= 2**-8  # half a unit in the last of 8 bits
    assert_holds(tmp_path / "narrow", CONFIG, ml_dtypes.bfloat16)
    report = convert(tmp_path / "narrow", tmp_path / "wide", dtype="float32")
    assert report.rounding == 0.0
    parameters = dict(draw_parameters(CONFIG)) | {"lm_head.weight": np.full((101, 48), 7e4)}
    write_folder(make_folder(tmp_path / "large"), CONFIG, Tensors.of(parameters))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds 70000\.0, beyond the range"):
        convert(tmp_path / "large", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_casts_round_once() -> None:
    """Float64 next to the middle of two bfloat16s, where a stop at float32 goes the wrong way."""
    rng = np.random.default_rng(0)
    middles = (2 * rng.integers(128, 256, 512) + 1) * 2.0 ** rng.integers(-140, 110, 512)
    exact = np.concatenate([middles, *(middles * (1 + sign * 2.0**-40) for sign in (1, -1))])
    exact = np.concatenate([exact, -exact, rng.standard_normal(512), [0.0, -0.0, np.inf, np.nan]])
    guess = exact.astype(ml_dtypes.bfloat16).view(np.uint16)
    near = (guess[:, None] + np.array([-1, 0, 1])).astype(np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        errors = np.abs(near.astype(np.float64) - exact[:, None])
    best = np.lexsort((near.view(np.uint16) % 2, errors), axis=1)[:, :1]
    expected = np.take_along_axis(near, best, axis=1)[:, 0]
    expected[-4:] = exact[-4:].astype(ml_dtypes.bfloat16)
    assert_bitwise(round_once(exact, expected.dtype), expected, "rounded")
    beyond = np.full(1, 3.4e38)
    assert_bitwise(round_once(beyond, expected.dtype), beyond.astype(expected.dtype), "infinity")


def test_dtypes_of_loaded_models(tmp_path: Path) -> None:
    """The checkpoint's dtype by default, another on request, float64 never cut in silence."""
    write(tmp_path / "narrow", dtype=ml_dtypes.bfloat16)
    model = alibi_torch.ALiBiLM.from_pretrained(tmp_path / "narrow")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = alibi_torch.ALiBiLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _, params = alibi_flax.from_pretrained(tmp_path / "narrow")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, params = alibi_flax.from_pretrained(tmp_path / "narrow", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    write(tmp_path / "double", dtype=np.float64)
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="would be cut to float32; set jax_enable"):
            alibi_flax.from_pretrained(tmp_path / "double")
    finally:
        jax.config.update("jax_enable_x64", True)


def test_user_files_with_a_configuration_beside_them(tmp_path: Path) -> None:
    """A state dict saved by hand: the configuration is given, or lies beside the file."""
    from flax import serialization
    from safetensors.torch import save_file as save_torch_file

    model = alibi_torch.ALiBiLM(CONFIG)
    save_torch_file(model.state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"carries no configuration; pass config=ALiBiConfig"):
        open_checkpoint(tmp_path / "mine.safetensors")
    assert open_checkpoint(tmp_path / "mine.safetensors", config=CONFIG).config == CONFIG

    _, params = alibi_flax.from_pretrained(tmp_path / "mine.safetensors", config=CONFIG)
    for name, tree in (("bare", params), ("variables", {"params": params})):
        (tmp_path / f"{name}.msgpack").write_bytes(serialization.to_bytes(tree))
        found = open_checkpoint(tmp_path / f"{name}.msgpack", config=CONFIG)
        for key, tensor in model.state_dict().items():
            assert_bitwise(found.tensors[key], as_numpy(tensor), key)
    with pytest.raises(CheckpointError, match=r"bare\.msgpack carries no configuration"):
        open_checkpoint(tmp_path / "bare.msgpack")
    with pytest.raises(CheckpointError, match=r"0 tensors missing, 0 unexpected, \d+ of the wrong"):
        open_checkpoint(tmp_path / "bare.msgpack", config=ALiBiConfig(**_doubled(CONFIG)))


def test_user_orbax_params(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tree = alibi_flax.ALiBiLM(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), int))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    with pytest.raises(CheckpointError, match="carries no configuration; pass config="):
        open_checkpoint(tmp_path / "orbax")
    found = open_checkpoint(tmp_path / "orbax", config=CONFIG)
    kernel = np.asarray(tree["params"]["lm_head"]["kernel"])
    assert_bitwise(found.tensors["lm_head.weight"], np.ascontiguousarray(kernel.T), "lm_head")


def test_pickles_of_old_torch(tmp_path: Path) -> None:
    """Files from before torch 1.6 cannot be mapped, and are read all the same."""
    path = write(tmp_path / "model", "pt")
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_holds(path, CONFIG)


def test_a_file_knows_its_own_configuration_best(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "safetensors")
    other = write(tmp_path / "other", config=CONFIGS["decoder"])
    sidecar(path).write_text((other / "config.json").read_text())
    assert open_checkpoint(path).config == CONFIG


@pytest.mark.parametrize("kind", OURS)
def test_a_contradicting_configuration_is_refused(tmp_path: Path, kind: str) -> None:
    """Another head count fits every shape of a torch checkpoint, and is another model."""
    path = write(tmp_path / "model", kind)
    wrong = dataclasses.replace(CONFIG, num_heads=6)
    with pytest.raises(CheckpointError, match=r"not that of .*: they differ in num_heads"):
        open_checkpoint(path, config=wrong, allow_pt=True)
    given = dataclasses.replace(CONFIG, dropout=0.4)
    assert open_checkpoint(path, config=given, allow_pt=True).config == given


def test_orbax_from_other_devices(tmp_path: Path) -> None:
    """Params that were sharded over four devices open on one."""
    write(tmp_path / "plain")
    code = f"""
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import alibi_flax
assert len(jax.devices()) == 4
_, params = alibi_flax.from_pretrained({str(tmp_path / "plain")!r})
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
def place(leaf):
    return jax.device_put(leaf, sharding) if leaf.shape[0] % 4 == 0 else leaf
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save({str(tmp_path / "orbax")!r}, jax.tree.map(place, params))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    found = open_checkpoint(tmp_path / "orbax", config=CONFIG)
    for name, array in draw_parameters(CONFIG).items():
        assert_bitwise(found.tensors[name], array, name)


def test_differences_are_found(tmp_path: Path) -> None:
    ours = open_checkpoint(write(tmp_path / "a"))
    require_same(ours, ours)
    with pytest.raises(MismatchError, match="configuration num_heads is 4, expected 3"):
        require_same(ours, open_checkpoint(write(tmp_path / "b", config=CONFIGS["decoder"])))
    wide = open_checkpoint(write(tmp_path / "c", dtype=np.float64))
    with pytest.raises(MismatchError, match=r"token_embedding\.weight has dtype float64"):
        require_same(ours, wide)


def test_verify_sees_a_model_that_differs(tmp_path: Path) -> None:
    """One weight in a later layer, moved by one part in a thousand."""
    small = ALiBiConfig(num_layers=2, d_model=24, num_heads=3, vocab_size=29, max_len=32)
    ours = write(tmp_path / "ours", config=small)
    result = verify(ours, new_tokens=20)
    assert result.passed
    assert len(result.checks) == 6
    parameters = {name: array.copy() for name, array in draw_parameters(small).items()}
    parameters["transformer.layers.1.attn.value.weight"][3, 4] *= 1.001
    write_folder(make_folder(tmp_path / "theirs"), small, Tensors.of(parameters))
    result = verify(ours, tmp_path / "theirs", new_tokens=20)
    assert not result.passed
    failed = {
        check.name.split(":")[0]: check.measured for check in result.checks if not check.passed
    }
    assert set(failed) >= {"both checkpoints hold the same model", "flax cpu"}
    assert failed["flax cpu"].startswith("first outside: layers.1.attn at ")
    result = verify(ours, write(tmp_path / "smaller", config=CONFIG), new_tokens=20)
    assert [check.passed for check in result.checks] == [False]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verify_knows_a_cast(tmp_path: Path, dtype: str) -> None:
    """A copy rounded by `convert` is proven as such, in either order; a wrong element is not."""
    small = ALiBiConfig(num_layers=1, d_model=24, num_heads=3, vocab_size=29, max_len=16)
    wide, narrow, again = write(tmp_path / "wide", config=small), tmp_path / "cast", tmp_path / "up"
    convert(wide, narrow, dtype=dtype)
    convert(narrow, again, dtype="float32")
    limit = BUDGETS[dtype, "cpu"].forward
    for ours, theirs, statement, when in (
        (wide, narrow, "the second checkpoint is the first, cast to", "after"),
        (narrow, wide, "the first checkpoint is the second, cast to", "before"),
    ):
        checks = list(itertools.islice(verify_steps(ours, theirs), 5))
        assert all(check.passed for check in checks), checks
        names = [check.name for check in checks]
        assert names[0] == f"{statement} {dtype}"
        assert names[-1].startswith(f"flax cpu, {when} rounding to {dtype}: every layer within ")
        assert f"within {limit:.0e} of" in names[-1]
    for ours, theirs, target in ((narrow, again, "float32"), (again, narrow, dtype)):
        found = relation(open_checkpoint(ours), open_checkpoint(theirs))
        assert found.statement == f"the second checkpoint is the first, cast to {target}"
        assert (found.difference, found.rounded) == (None, None)  # nothing is lost on the way up

    arrays = {name: array.copy() for name, array in read_tensors(narrow).items()}
    arrays["token_embedding.weight"][3, 5] *= 1.01
    write_folder(make_folder(tmp_path / "odd"), small, Tensors.of(arrays))
    for ours, theirs in ((wide, tmp_path / "odd"), (tmp_path / "odd", wide)):
        checks = verify_steps(ours, theirs)
        first = next(checks)
        assert (first.passed, first.name) == (False, "both checkpoints hold the same model")
        assert first.measured.startswith(f"even after a cast to {dtype}, token_embedding.w")
        failed = [check.name for check in itertools.islice(checks, 4) if not check.passed]
        assert failed == ["flax cpu: every layer within 1e-05 of float64"]


def _doubled(config: ALiBiConfig) -> dict[str, Any]:
    return config.to_dict() | {"expansion_factor": 2 * config.expansion_factor}
