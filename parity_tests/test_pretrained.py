"""Loading onto devices: one tensor at a time, each device's part alone, nothing drawn first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.rules import canonical_tensors
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import ALiBiConfig, model_slopes, parameter_table
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.checkpoints import make_folder, write
from parity_tests.compare import assert_bitwise
from parity_tests.small_models import attention_slopes
from parity_tests.test_family_conversion import IDS, published


def test_torch_device_and_slopes(tmp_path: Path) -> None:
    """Slopes, which no file holds, are where the parameters are and stay float32."""
    folder, config = write(tmp_path / "model"), CONFIGS["lm-untied"]
    before = torch.get_rng_state()
    model = alibi_torch.ALiBiLM.from_pretrained(folder, dtype=torch.bfloat16)
    after = torch.get_rng_state()
    assert_bitwise(as_numpy(after), as_numpy(before), "no weights were drawn to be thrown away")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    found = attention_slopes(model)
    assert_bitwise(as_numpy(found), model_slopes(config), "slopes")
    empty = alibi_torch.ALiBiLM.from_pretrained(folder, device="meta")
    assert {each.device.type for each in (*empty.parameters(), *empty.buffers())} == {"meta"}


def test_implementation_of_what_is_loaded(tmp_path: Path) -> None:
    """It reaches attention: this one refuses the rounded bias of the checkpoint."""
    folder, tokens = published(tmp_path / "model", "falcon"), np.zeros((1, 5), np.int64)
    dense = alibi_torch.ALiBiLM.from_pretrained(folder, implementation="dense")
    model, params = alibi_flax.from_pretrained(folder, implementation="dense")
    assert dense(as_torch(tokens)).shape == model.apply({"params": params}, tokens).shape
    fused = alibi_torch.ALiBiLM.from_pretrained(folder, implementation="blockwise")
    with pytest.raises(ValueError, match="'blockwise' cannot compute this: it has no rounded bias"):
        fused(as_torch(tokens))
    model, params = alibi_flax.from_pretrained(folder, implementation="blockwise")
    with pytest.raises(ValueError, match="'blockwise' cannot compute this: it has no rounded bias"):
        model.apply({"params": params}, tokens)
    for load in (alibi_torch.ALiBiLM.from_pretrained, alibi_flax.from_pretrained):
        with pytest.raises(ValueError, match="implementation='fast' is not known"):
            load(folder, implementation="fast")


def test_files_may_change_afterwards(tmp_path: Path) -> None:
    """Loaded models own their memory: overwriting the file in place moves nothing."""
    folder, stored = write(tmp_path / "model"), draw_parameters(CONFIGS["lm-untied"])
    model = alibi_torch.ALiBiLM.from_pretrained(folder)
    _, params = alibi_flax.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\0" * (file.stat().st_size // 2))
    for name, tensor in model.state_dict().items():
        assert_bitwise(as_numpy(tensor), stored[name], f"torch {name}")
    for name, array in canonical_tensors(params, CONFIGS["lm-untied"]).items():
        assert_bitwise(array, stored[name], f"flax {name}")


def test_flax_sharding(tmp_path: Path) -> None:
    """Heads and hidden units over four devices, by the table's axis names: the same numbers."""
    config = CONFIGS["decoder"]
    folder = write(tmp_path / "model", config=config)
    _run(
        f"""
        import jax, numpy as np
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
        import alibi_flax
        from alibi_convert.rules import canonical_tensors
        from alibi_spec.budgets import BUDGETS
        from parity_tests.compare import assert_bitwise, assert_within
        mesh = Mesh(np.array(jax.devices()), ("model",))
        assert mesh.size == 4
        def sharding(row):
            axes = ["model" if axis in ("heads", "kv_heads", "mlp") else None
                    for axis in row.logical_axes]
            return NamedSharding(mesh, PartitionSpec(*axes))
        model, params = alibi_flax.from_pretrained({str(folder)!r}, sharding=sharding)
        kernel = params["layers_0"]["attn"]["query"]["kernel"]
        assert kernel.shape == (48, 4, 12)
        assert kernel.sharding.spec == PartitionSpec(None, "model", None), kernel.sharding
        assert {{shard.data.shape for shard in kernel.addressable_shards}} == {{(48, 1, 12)}}
        x = np.random.default_rng(0).standard_normal((1, 9, 48)).astype(np.float32)
        whole, copies = alibi_flax.from_pretrained({str(folder)!r})
        same = lambda a, b: assert_bitwise(np.asarray(a), np.asarray(b), "params")
        jax.tree.map(same, params, copies)
        everywhere = NamedSharding(mesh, PartitionSpec())
        _, replicated = alibi_flax.from_pretrained({str(folder)!r}, sharding=everywhere)
        assert replicated["final_norm"]["scale"].sharding == everywhere
        sharded = jax.jit(model.apply)({{"params": params}}, x)
        plain, limit = model.apply({{"params": copies}}, x), BUDGETS["float32", "cpu"].forward
        assert_within(np.asarray(sharded), np.asarray(plain), limit, "sharded")
        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        model, params = alibi_flax.from_pretrained({str(folder)!r}, sharding=mesh)
        jax.tree.map(same, params, copies)
        kernel = params["layers_0"]["attn"]["query"]["kernel"]
        assert {{shard.data.shape for shard in kernel.addressable_shards}} == {{(24, 2, 12)}}
        with jax.set_mesh(mesh):
            sharded = jax.jit(model.apply)({{"params": params}}, x)
        assert_within(np.asarray(sharded), np.asarray(plain), limit, "on a mesh")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


def tune(backend: str, source: Path, folder: Path, overwrite: bool = False) -> None:
    """Load a checkpoint, change it, save it elsewhere or where it was."""
    if backend == "torch":
        model = alibi_torch.ALiBiLM.from_pretrained(source)
        with torch.no_grad():
            model.token_embedding.weight += 1
        model.save_pretrained(folder, overwrite=overwrite)
    else:
        flax_model, params = alibi_flax.from_pretrained(source)
        params["token_embedding"]["embedding"] += 1
        alibi_flax.save_pretrained(folder, flax_model, params, overwrite=overwrite)


each_backend = pytest.mark.parametrize("backend", ["torch", "flax"])


@each_backend
def test_what_a_model_had_comes_along(tmp_path: Path, backend: str) -> None:
    """Tokenizer and ids of a Falcon through a fine-tune, even two, and back to transformers."""
    source = published(tmp_path / "source", "falcon")
    (source / "tokenizer.json").write_text("{}")
    (make_folder(source / "additional_chat_templates") / "tool.jinja").write_text("hello")
    (source / "README.md").write_text("of the original")
    tune(backend, source, tmp_path / "tuned")
    tune(backend, tmp_path / "tuned", tmp_path / "twice")
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    ):
        assert (tmp_path / "twice" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "twice" / "README.md").exists()
    convert(tmp_path / "twice", tmp_path / "back", to="falcon", verify="none")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: back[name] for name in IDS} == IDS
    before, after = (open_checkpoint(tmp_path / each).tensors for each in ("source", "back"))
    embedding = "token_embedding.weight"
    expected = before[embedding] + before[embedding].dtype.type(1)
    assert_bitwise(after[embedding], expected + expected.dtype.type(1), embedding)


@each_backend
def test_saving_where_it_came_from(tmp_path: Path, backend: str) -> None:
    """The model is replaced; whatever else is in the folder stays, the user's own files too."""
    folder = published(tmp_path / "model", "falcon")
    others = {"tokenizer.json": "{}", "README.md": "mine", "runs/1/log.txt": "loss"}
    for name, text in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "vocab.txt").symlink_to("README.md")
    for _ in range(2):  # the second time in our own format
        tune(backend, folder, folder, overwrite=True)
    for name, text in (others | {"vocab.txt": "mine"}).items():
        assert (folder / name).read_text() == text
    record = json.loads((folder / "conversion.json").read_text())
    assert record["source_family"] == "falcon"
    assert record["source_config"]["eos_token_id"] == IDS["eos_token_id"]
    with pytest.raises(CheckpointError, match="model exists; choose another name or pass"):
        tune(backend, folder, folder)
    home = make_folder(tmp_path / "home")  # no checkpoint's
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds other files \(thesis\.txt\)"):
        tune(backend, folder, home, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home"}


@each_backend
def test_saving_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = write(tmp_path / "source")
    for overwrite in (False, True):
        tune(backend, source, Path("~/tuned"), overwrite)
        for name in ("tokenizer.json", "notes.txt"):
            (tmp_path / "tuned" / name).write_text(name)
    tune(backend, source, Path("~/tuned"), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tuned"}
    for name in ("tokenizer.json", "notes.txt"):
        assert (tmp_path / "tuned" / name).read_text() == name


@each_backend
def test_what_cannot_come_along_is_named(tmp_path: Path, backend: str) -> None:
    source = write(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "merges.txt").write_text("a b")
    if backend == "torch":
        model = alibi_torch.ALiBiLM.from_pretrained(source)
        save = model.save_pretrained
    else:
        flax_model, params = alibi_flax.from_pretrained(source)
        same = flax_model.clone(origin=None)  # a model is the same wherever it comes from
        assert (flax_model, hash(flax_model)) == (same, hash(same))

        def save(folder: Path, overwrite: bool = False) -> None:
            alibi_flax.save_pretrained(folder, flax_model, params, overwrite=overwrite)

    own = write(tmp_path / "own")
    (own / "tokenizer.json").write_text('{"with": "tokens added"}')
    with pytest.warns(UserWarning, match=r"own keeps its own tokenizer\.json, which differ"):
        save(own, overwrite=True)
    assert (own / "tokenizer.json").read_text() == '{"with": "tokens added"}'
    assert (own / "merges.txt").read_text() == "a b"
    shutil.rmtree(source)
    with pytest.warns(UserWarning, match=r"late lacks tokenizer\.json, merges\.txt, which the"):
        save(tmp_path / "late")


@each_backend
def test_no_second_copy_in_memory(tmp_path: Path, backend: str) -> None:
    """A model loads where there is room for it and for one more tensor, not for two of it."""
    config = ALiBiConfig(num_layers=24, d_model=512, num_heads=8, expansion_factor=4, vocab_size=99)
    folder = make_folder(tmp_path / "model")
    shapes = {row.name: row.shape for row in parameter_table(config)}
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    write_folder(folder, config, Tensors.of(arrays))
    load = {
        "torch": "import alibi_torch; load = alibi_torch.ALiBiLM.from_pretrained",
        "flax": "import jax, alibi_flax; jax.numpy.zeros(3); load = alibi_flax.from_pretrained",
    }[backend]
    size = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert size > 250e6
    _run(
        f"""
        import re, resource
        {load}
        def anonymous():
            status = open("/proc/self/status").read()
            return int(re.search(r"VmData:\\s+(\\d+) kB", status)[1]) * 1024
        allowed = anonymous() + int(1.5 * {size})
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        model = load({str(folder)!r})
        """
    )


def _run(code: str, **environment: str) -> None:
    """Run code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
