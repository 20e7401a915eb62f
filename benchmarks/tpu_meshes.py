"""What steps of large models need on meshes of TPU chips, by the compiler's own figures.

`python -m benchmarks.tpu_meshes` compiles each case with libtpu, ahead of time: no TPU runs, and
nothing of the size of a model is made. `python -m benchmarks.tpu_meshes CASE` compiles one of them
and prints what was found; test_tpu.py does.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import alibi_flax
from alibi_flax.generation import BLOCK, _block, _State
from alibi_flax.training import compiled_step
from alibi_spec.sampling import Sampling
from benchmarks.compare import write
from parity_tests.on_a_mesh import collectives

RESULTS = Path(__file__).parent / "results" / "tpu_meshes.json"
MODELS: dict[str, dict[str, Any]] = {
    "BLOOM-7b1": {
        **{"num_layers": 30, "d_model": 4096, "num_heads": 32, "vocab_size": 250_880},
        **{"embedding_norm": True, "activation": "gelu_tanh"},
    },
    "MPT-30B": {
        **{"num_layers": 48, "d_model": 7168, "num_heads": 64, "vocab_size": 50_432},
        **{"attention_bias": False, "ffn_bias": False, "norm_bias": False},
    },
}
SHARED = {"expansion_factor": 4, "dropout": 0.0}
# A step of training scans its layers, computes in bfloat16, and computes blocks again; 16 steps of
# generation have a bfloat16 cache.
BATCH, TRAINED_SEQ, CAPACITY = 16, 2048, 4096


@dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        model: a key of `MODELS`.
        part: "training" or "generation".
        topology: of libtpu.
        mesh: sizes of its axes.
        gigabytes: memory of one chip.
    """

    model: str
    part: str
    topology: str
    mesh: dict[str, int]
    gigabytes: int


CASES = {
    "bloom-training-v5e": Case("BLOOM-7b1", "training", "v5e:4x4", {"fsdp": 4, "tensor": 4}, 16),
    "bloom-generation-v5e": Case(
        "BLOOM-7b1", "generation", "v5e:4x4", {"data": 4, "tensor": 4}, 16
    ),
    "mpt-training-v5p": Case("MPT-30B", "training", "v5p:2x2x4", {"fsdp": 8, "tensor": 2}, 95),
    "mpt-generation-v5p": Case("MPT-30B", "generation", "v5p:2x2x4", {"data": 4, "tensor": 4}, 95),
    "mpt-generation-v5e": Case("MPT-30B", "generation", "v5e:4x4", {"data": 1, "tensor": 16}, 16),
}


def compiled(case: Case) -> dict[str, Any]:
    """The seconds, bytes, kernels and collectives of one program."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
    devices = np.array(topology.devices).reshape(*case.mesh.values())
    mesh = Mesh(devices, tuple(case.mesh), axis_types=(AxisType.Auto,) * devices.ndim)
    lower = {"training": _training, "generation": _generation}[case.part]
    with jax.set_mesh(mesh), jax.default_device(topology.devices[0]):
        lowered = lower(MODELS[case.model] | SHARED, mesh)
        started = time.perf_counter()
        program = lowered.compile()
    memory, text = program.memory_analysis(), program.as_text()
    return {
        **asdict(case),
        "seconds": time.perf_counter() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": collectives(text),
    }


def _training(values: dict[str, Any], mesh: Any) -> Any:
    config = alibi_flax.ALiBiConfig(**values)
    model = alibi_flax.ALiBiLM(config, scan_layers=True, recompute=True)
    recipe = alibi_flax.Recipe(steps=100, batch_size=BATCH, compute_dtype="bfloat16")
    places = alibi_flax.shardings(config, mesh, scan_layers=True)
    params = jax.tree.map(_placed, _abstract_params(model), places)
    optimizer = alibi_flax.adamw(config, recipe)
    adam, *others = jax.eval_shape(optimizer.init, params)
    whole = _whole(mesh)
    adam = adam._replace(
        count=_placed(adam.count, whole),
        mu=jax.tree.map(_placed, adam.mu, places),
        nu=jax.tree.map(_placed, adam.nu, places),
    )
    state = (adam, *jax.tree.map(lambda x: _placed(x, whole), others))
    tokens = jax.ShapeDtypeStruct((BATCH, TRAINED_SEQ), jnp.int32)
    tokens = _placed(tokens, alibi_flax.batch_sharding(tokens.shape, mesh))
    batch = {"tokens": tokens, "targets": tokens}
    step = compiled_step(params, state)
    return step.lower(model, optimizer, recipe, params, state, batch)


def _generation(values: dict[str, Any], mesh: Any) -> Any:
    config = alibi_flax.ALiBiConfig(**values)
    model = alibi_flax.ALiBiLM(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    places = alibi_flax.shardings(config, mesh)
    params = jax.tree.map(_placed, _abstract_params(model), places)
    whole, divided = _whole(mesh), NamedSharding(mesh, PartitionSpec("data", "tensor"))
    empty = jax.eval_shape(
        lambda: alibi_flax.KVCache.empty(config, BATCH, CAPACITY, dtype=jnp.bfloat16)
    )
    cache = jax.tree.map(lambda x: _placed(x, divided if x.ndim == 4 else whole), empty)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return _placed(jax.ShapeDtypeStruct(shape, dtype), whole)

    scores, ended = array((BATCH,), jnp.float32), array((BATCH,), jnp.bool_)
    state = _State(array((BATCH,)), scores, ended, None, array(()), cache)
    arguments = (model, params, state, array(()), None, array((1,)), BLOCK, Sampling())
    return _block.lower(*arguments)


def _abstract_params(model: Any) -> Any:
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), int)))
    return made["params"]


def _placed(x: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _whole(mesh: Any) -> Any:
    return NamedSharding(mesh, PartitionSpec())


def case_in_its_process(name: str) -> dict[str, Any]:
    """`compiled` of one case, by a process that looks for no TPU."""
    alone = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_meshes", name],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compile every case and write the results, or one and print them."""
    if len(sys.argv) > 1:
        print(json.dumps(compiled(CASES[sys.argv[1]])))
        return
    rows = []
    for name in CASES:
        rows.append(case_in_its_process(name))
        print(json.dumps(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "libtpu")}
    write(RESULTS, {"versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
