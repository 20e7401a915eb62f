"""A checkpoint onto eight emulated devices: time, and memory beyond what the devices hold.

`python -m benchmarks.sharded_loading`: ours, orbax's own restore, and a load of all before it is
divided, each in a process of its own. Emulated devices hold their parts in the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh

import alibi_flax
from alibi_convert import convert, open_checkpoint
from alibi_convert.tensors import Tensors
from alibi_convert.writing.origin import save_folder
from alibi_spec import ALiBiConfig, parameter_table
from benchmarks.compare import write
from benchmarks.conversion import library_versions

RESULTS = Path(__file__).parent / "results" / "sharded_loading.json"
GIB = 2**30


def of_size(nbytes: float) -> ALiBiConfig:
    """A model with float32 parameters of about that many bytes."""
    layer = 12 * 2048**2 * 4
    layers = max(1, round((nbytes - 50_000 * 2048 * 4) / layer))
    return ALiBiConfig(
        num_layers=layers, d_model=2048, num_heads=16, vocab_size=50_000, expansion_factor=4
    )


def ours(folder: Path, mesh: Mesh) -> Any:
    """`from_pretrained` with the mesh."""
    return alibi_flax.from_pretrained(folder / "model", sharding=mesh)[1]


def whole_first(folder: Path, mesh: Mesh) -> Any:
    """All on one device, then divided."""
    model, params = alibi_flax.from_pretrained(folder / "model")
    return jax.device_put(params, alibi_flax.shardings(model.config, mesh))


def orbax(folder: Path, mesh: Mesh) -> Any:
    """orbax's own restore, into abstract arrays with shardings."""
    config = open_checkpoint(folder / "model").config
    wanted = alibi_flax.sharding.parameter_tree(
        config,
        lambda row: jax.ShapeDtypeStruct(
            row.flax_shape, np.float32, sharding=alibi_flax.parameter_sharding(row, mesh)
        ),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "model.orbax" / "params", wanted)


WAYS: dict[str, Callable[[Path, Mesh], Any]] = {
    "from_pretrained(sharding=mesh)": ours,
    "orbax": orbax,
    "all of it, then divided": whole_first,
}


def measured(way: str, folder: Path) -> dict[str, Any]:
    """Seconds, and the peak of this process beyond its start and what the devices hold."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    # The devices are there before the clock starts.
    jax.block_until_ready(jax.device_put(np.ones((8, 1)), alibi_flax.batch_sharding((8, 1), mesh)))
    before = _anonymous_bytes()
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: jax.block_until_ready(WAYS[way](folder, mesh)))
        peak = 0
        while not loading.done():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.002)
    params, seconds = loading.result(), time.perf_counter() - started
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    return {"way": way, "seconds": seconds, "held_bytes": held, "extra_bytes": peak - before - held}


def _anonymous_bytes() -> int:
    """Of this process's memory, without pages of files, which the system can drop."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Make the checkpoint, measure each way, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="(default: 8)")
    parser.add_argument("--way", choices=list(WAYS), help="measure one, in --folder")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measured(options.way, options.folder)))
        return
    config = of_size(options.gigabytes * 1e9)
    folder = Path(tempfile.mkdtemp(prefix="alibi-loading-"))
    try:
        _write(folder, config)
        rows = [_in_its_process(way, folder) for way in WAYS]
    finally:
        shutil.rmtree(folder)
    results = {
        "versions": library_versions(),
        "nbytes": sum(4 * int(np.prod(row.shape)) for row in parameter_table(config)),
        "largest_tensor_bytes": max(4 * int(np.prod(r.shape)) for r in parameter_table(config)),
        "rows": rows,
    }
    write(RESULTS, results)
    print(json.dumps(results, indent=1))


def _write(folder: Path, config: ALiBiConfig) -> None:
    """The model as a folder, and for orbax."""
    rng = np.random.default_rng(0)
    tensors = {
        row.name: rng.standard_normal(row.shape, np.float32) for row in parameter_table(config)
    }
    save_folder(folder / "model", config, Tensors.of(tensors), None, False)
    del tensors
    convert(folder / "model", folder / "model.orbax", verify="none")


def _in_its_process(way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sharded_loading", "--way", way]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--folder", str(folder)],
        env=os.environ | flags,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
