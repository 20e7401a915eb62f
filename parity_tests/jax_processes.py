"""A program: one of the processes of JAX that open and save models together, on emulated devices.

`python -m parity_tests.jax_processes FOLDER DEVICES [COUNT NUMBER PORT]` raises AssertionError
where something is wrong. test_jax_processes.py runs it: how many processes and devices there are
is settled when JAX starts.
"""

from __future__ import annotations

import os
import sys
import traceback
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import alibi_flax
import alibi_flax.checkpoint
from alibi_convert import CheckpointError
from alibi_convert.checkpoint import open_checkpoint
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.optimizers import OptimizerState
from alibi_convert.optimizers.file import as_file, from_file
from alibi_convert.rules import flax_view, unread_tensors
from alibi_convert.tensors import Tensors
from alibi_convert.writing.layout import OPTIMIZER_FILE
from alibi_flax import stacked
from alibi_flax.checkpoint import on_host, with_gathered
from alibi_flax.sharding import device_mesh
from alibi_spec import ALiBiConfig, Recipe, parameter_table
from alibi_train.backends import trainer
from parity_tests.compare import assert_bitwise

CONFIGS = {
    "plain": ALiBiConfig(
        **{"num_layers": 4, "d_model": 256, "num_heads": 8, "vocab_size": 512, "max_len": 16},
        expansion_factor=4,
    ),
    "rounded": ALiBiConfig(
        **{"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 64, "max_len": 16},
        **{"slopes": "learned", "gated_ffn": True, "tie_embeddings": False},
    ),
}
MESHES: Mapping[int, tuple[dict[str, int], ...]] = {
    2: ({"tensor": 2},),
    4: ({"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 4}, {"tensor": 2, "fsdp": 2}),
}


def check_opening(folder: Path, mesh: Any) -> tuple[Any, Any]:
    """Each process reads the parts of its own devices, bit by bit, and no others."""
    read: dict[str, int] = {}
    view = flax_view

    class Watched:
        def __init__(self, row: Any, tensor: np.ndarray) -> None:
            self.row, self.view, self.shape = row, view(row, tensor), row.flax_shape

        def __getitem__(self, index: Any) -> np.ndarray:
            part = self.view[index]
            read[self.row.name] = read.get(self.row.name, 0) + part.size
            return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alibi_flax.checkpoint, "flax_view", Watched)
        model, params = alibi_flax.from_pretrained(folder, sharding=mesh)
    tensors = open_checkpoint(folder).tensors
    for row in parameter_table(model.config):
        leaf = params
        for key in row.flax_path:
            leaf = leaf[key]
        for shard in leaf.addressable_shards:
            exact = np.array(flax_view(row, tensors[row.name])[shard.index])
            assert_bitwise(np.asarray(shard.data), exact, f"{row.name} {shard.index}")
        size = sum(shard.data.size for shard in leaf.addressable_shards)
        assert read[row.name] <= size, f"{row.name}: read {read[row.name]} of {size}"
    return model, params


def check_saving(folder: Path, model: Any, params: Any) -> None:
    """In memory for one tensor, besides pieces; layers apart and stacked."""
    largest = max(4 * int(np.prod(row.shape)) for row in parameter_table(model.config))
    tracemalloc.start()
    alibi_flax.save_pretrained(folder, model, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Besides a tensor: pieces of it, and what compiling the gathering leaves.
    assert peak < 4 * largest + 2**22, f"{peak:,} bytes for tensors of at most {largest:,}"
    alibi_flax.save_pretrained(
        folder.with_name(f"{folder.name}, stacked"), model.clone(scan_layers=True), stacked(params)
    )


def check_resuming(folder: Path, saved: Path, mesh: Any) -> None:
    """A trainer holds its part of parameters and moments, and what it saves is what it began with.

    In one process and in several, where nothing is written before all have read.
    """
    config, tensors = open_checkpoint(folder).config, open_checkpoint(folder).tensors
    state, recipe = from_file(folder / OPTIMIZER_FILE, config), Recipe(steps=9, batch_size=4)
    resumed: Any = trainer("flax", config, recipe, tensors, state, mesh=mesh)

    def write(tensors: Tensors, state: OptimizerState) -> None:
        write_folder(saved, config, tensors, as_file(state))

    resumed.save(write, write_later=lambda *_: pytest.fail("copied to the host"))
    inner = resumed._trainer
    for tree in (inner.params, inner.optimizer_state[0].mu, inner.optimizer_state[0].nu):
        is_there = jax.tree.map(
            lambda x, goal: x.sharding.is_equivalent_to(goal, x.ndim),
            tree,
            alibi_flax.shardings(config, mesh),
        )
        assert all(jax.tree.leaves(is_there)), is_there
    assert inner.step_count == state.step
    assert all(
        isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(inner.optimizer_state)
    )


def check_several_files(folder: Path, model: Any, params: Any) -> None:
    """Which are written at the same time, so that tensors are asked for in any order."""

    def use(tensors: Tensors) -> None:
        write_folder(folder, model.config, tensors, max_shard_bytes=10_000)

    with_gathered(lambda: unread_tensors(on_host(params), model.config), use)


def check_errors(folder: Path, model: Any, params: Any) -> None:
    """What one process raises, all raise; nothing is written."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        alibi_flax.save_pretrained(folder, model, params)

    def use(tensors: Tensors) -> None:
        tensors[next(iter(tensors))]
        raise OSError("the disk is on fire")

    kind = OSError if jax.process_index() == 0 else CheckpointError
    with pytest.raises(kind, match="the disk is on fire"):
        with_gathered(lambda: unread_tensors(on_host(params), model.config), use)
    is_first = jax.process_index() == 0
    plain = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    wider = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), params)
    for wrong, message, of_the_first in (
        (plain | {"more": np.ones(3)}, "1 unexpected", "process 1 has failed"),
        (wider, "process 0 has tensors of other", "process 1 has tensors of other names"),
    ):
        with pytest.raises(CheckpointError, match=of_the_first if is_first else message):
            alibi_flax.save_pretrained(folder / "new", model, plain if is_first else wrong)
    assert sorted(folder.parent.rglob("*")) == before


def main(folder: Path) -> None:
    for sizes in MESHES[jax.device_count()]:
        mesh = device_mesh(sizes)
        for name in CONFIGS if jax.process_count() > 1 else ("plain",):
            model, params = check_opening(folder / name, mesh)
            saved = folder / f"{name} on {sizes}"
            check_saving(saved, model, params)
            if name == "plain":
                check_resuming(folder / name, folder / f"{name} resumed on {sizes}", mesh)
            if jax.process_count() > 1 and name == "rounded":
                check_several_files(folder / f"{name} in files of {sizes}", model, params)
                check_errors(saved, model, params)


if __name__ == "__main__":
    given, devices, *group = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if group:
        count, number, port = group
        jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    try:
        main(Path(given))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # JAX would wait for the others, which wait for this one
