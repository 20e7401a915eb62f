"""Real TPU programs, compiled ahead of time on a machine without a TPU, and what memory they need.

libtpu compiles for a described topology. test_kernel_numbers.py interprets the kernels, and
shows that they are right; here they must compile, and not grow with the square of the sequence.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from typing import Any

import pytest

from benchmarks.tpu_meshes import CASES, MODELS, case_in_its_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed; pip install 'alibi-duo[tpu-aot]'",
    ),
]
each_topology = pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])

# A call traced under a default device is one for that device.
PRELUDE = """
    import json, sys
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    import alibi_flax

    topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def abstract(tree):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(place, tree)

    def compiled(function, *arguments):
        with jax.default_device(device):
            program = jax.jit(function).lower(*abstract(arguments)).compile()
        return {
            "temporary": program.memory_analysis().temp_size_in_bytes,
            "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        }
"""
ATTENTION = """
    def measured(length):
        x = jax.ShapeDtypeStruct((1, length, 16, 128), jnp.bfloat16)
        arguments = (x, x, x, jax.ShapeDtypeStruct((16,), jnp.float32))
        total = lambda *arrays: alibi_flax.attention(*arrays).astype(jnp.float32).sum()
        return {
            "forward": compiled(alibi_flax.attention, *arguments),
            "backward": compiled(jax.grad(total, argnums=(0, 1, 2, 3)), *arguments),
        }

    print(json.dumps([measured(length) for length in (2**16, 2**17)]))
"""
MODEL = """
    import optax

    config = alibi_flax.ALiBiConfig(num_layers=2, d_model=512, num_heads=4, vocab_size=256)
    model = alibi_flax.ALiBiLM(config, dtype=jnp.bfloat16)
    optimizer = optax.adamw(1e-3)

    def forward(params, tokens, **options):
        return model.apply({"params": params}, tokens, **options)

    def train_step(params, state, tokens):
        training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}

        def loss(params):
            logits = forward(params, tokens[:, :-1], **training).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    tokens = jax.ShapeDtypeStruct((1, 2**16), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), int)))
    params = params["params"]
    state = jax.eval_shape(optimizer.init, params)
    measured = {
        "forward": compiled(forward, params, tokens),
        "backward": compiled(train_step, params, state, tokens),
    }
    print(json.dumps(measured))
"""

DIVIDED = """
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(topology.devices), ("chips",))
    specs = (*[PartitionSpec(None, None, "chips")] * 3, PartitionSpec("chips"))
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(
            [*[(1, 4096, 16, 128)] * 3, (16,)], [*[jnp.bfloat16] * 3, jnp.float32], specs
        )
    ]
    attend = alibi_flax.attention
    if sys.argv[2] == "shard_map":
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0])
    with jax.default_device(device):
        text = jax.jit(attend).lower(*arrays).compile().as_text()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    print(json.dumps({
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": sum(text.count(name) for name in collectives),
    }))
"""
# A chunk of a prompt or a step of BLOOM-7b1, with abstract parameters: nothing of its size is made.
GENERATION = """
    import flax.linen as nn
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from alibi_flax.cache import KVCache
    from alibi_flax.generation import BLOCK, _block, _read, _State
    from alibi_spec.sampling import Sampling

    part, (layers, batch, chips) = sys.argv[2], map(int, sys.argv[3:])
    chunk, capacity = 2048, 4096
    config = alibi_flax.ALiBiConfig(
        num_layers=layers, d_model=4096, num_heads=32, vocab_size=250_880, embedding_norm=True,
        activation="gelu_tanh",
    )
    model = alibi_flax.ALiBiLM(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    mesh = Mesh(np.array(topology.devices[:chips]), ("chips",))
    rules = [(axis, "chips") for axis in ("heads", "kv_heads", "mlp", "vocab")]
    whole, by_head = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "chips")))

    def placed(x, sharding=whole):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def array(shape, dtype=jnp.int32):
        return placed(jax.ShapeDtypeStruct(shape, dtype))

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), int)))
    specs = nn.logical_to_mesh_sharding(alibi_flax.partition_specs(config), mesh, rules)
    params = jax.tree.map(placed, params["params"], specs)
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, capacity, dtype=jnp.bfloat16))
    kept = jax.tree.leaves((cache.keys, cache.values))
    cache = jax.tree.map(lambda x: placed(x, by_head if x.ndim == 4 else whole), cache)
    with jax.default_device(device):
        if part == "chunk":
            tokens, visible = array((batch, chunk)), array((batch, chunk), jnp.bool_)
            lowered = _read.lower(model, params, tokens, visible, array(()), cache)
        else:
            scores, ended = array((batch,), jnp.float32), array((batch,), jnp.bool_)
            state = _State(array((batch,)), scores, ended, None, array(()), cache)
            eos = array((1,))
            steps = array(())
            lowered = _block.lower(model, params, state, steps, None, eos, BLOCK, Sampling())
        program = lowered.compile()
    memory = program.memory_analysis()
    print(json.dumps({
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": sum(x.size * x.dtype.itemsize for x in kept) // chips,
        "keys of a layer": kept[0].size * kept[0].dtype.itemsize // chips,
        "matrix of all heads": batch * config.num_heads * chunk * capacity * 2,
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
    }))
"""


@each_topology
def test_attention_of_131072_positions(topology: str) -> None:
    shorter, longer = _measured(ATTENTION, topology)
    for name, kernels in (("forward", 1), ("backward", 3)):
        assert longer[name]["kernels"] == kernels
        assert longer[name]["temporary"] <= 2.1 * shorter[name]["temporary"]
        # A matrix of all pairs would be 16 heads times 2^34 elements.
        assert longer[name]["temporary"] < 2**34


@each_topology
def test_models_of_65536_positions(topology: str) -> None:
    measured = _measured(MODEL, topology)
    for name, kernels in (("forward", 1), ("backward", 3)):
        assert measured[name]["kernels"] == 2 * kernels
        assert measured[name]["temporary"] < 2**32  # less than a byte for every pair of positions


def test_heads_over_several_chips() -> None:
    assert _measured(DIVIDED, "v5e:2x2", "shard_map") == {"kernels": 1, "collectives": 0}


def test_libtpu_does_not_divide_a_plain_jit() -> None:
    """As docs/attention.md says; JAX's issue 38196. When it does, that page can promise more."""
    with pytest.raises(AssertionError, match="emitter for CustomSPMDPartitioning not found"):
        _measured(DIVIDED, "v5e:2x2", "jit")


@pytest.mark.parametrize(("batch", "chips", "layers_copied"), [(1, 1, 1), (8, 4, 15)])
def test_steps_of_bloom_7b1(batch: int, chips: int, layers_copied: int) -> None:
    """All 30 layers and a cache of 4,096 positions fit one v5e of 16 GB; of eight sequences, four.

    The loop of steps uses the cache in place: temporaries are smaller than the keys of one layer.
    For eight sequences XLA also moves the weights of query, key and value into another layout, once
    before the loop: about as much as the keys of twelve layers, where a cache is those of 60.
    """
    found = _measured(GENERATION, "v5e:2x2", "step", 30, batch, chips)
    assert found["aliased"] >= found["cache"]
    assert found["temporary"] < layers_copied * found["keys of a layer"]


@pytest.mark.parametrize("batch", [1, 8])
def test_a_chunk_of_a_prompt_of_bloom_7b1(batch: int) -> None:
    """2,048 positions need the activations of one layer, and no matrix of queries and keys.

    Of 4 layers: all 30 leave too little of one chip's memory, and need minutes.
    """
    found = _chunk(4, batch)
    assert found["kernels"] == 4
    assert found["aliased"] >= found["cache"]
    assert found["temporary"] < found["matrix of all heads"]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(
            1, marks=pytest.mark.xfail(reason="XLA still copies the keys of one sequence")
        ),
        8,
    ],
)
def test_a_further_layer_needs_no_copy_of_its_keys(batch: int) -> None:
    few, more = _chunk(2, batch), _chunk(4, batch)
    assert (more["temporary"] - few["temporary"]) / 2 < more["keys of a layer"]


@pytest.mark.parametrize("name", CASES)
def test_large_models_on_meshes(name: str) -> None:
    """They fit the memory of each chip, with kernels inside, and no step gathers a cache."""
    found, case = case_in_its_process(name), CASES[name]
    needed = found["argument_bytes"] + found["temporary_bytes"]
    assert needed <= case.gigabytes * 1e9, needed
    if case.part == "training":  # forward, computed again, and two passes backward, in one scan
        assert found["kernels"] == 4
    else:
        model = MODELS[case.model]
        of_a_layer = 2 * 16 * 4096 * model["d_model"]
        assert found["collectives"]["bytes"] < of_a_layer, found["collectives"]


@cache
def _chunk(layers: int, batch: int) -> Any:
    return _measured(GENERATION, "v5e:2x2", "chunk", layers, batch, 1)


def _measured(code: str, topology: str, *arguments: object) -> Any:
    """What a program prints that compiles for a topology; libtpu looks for no TPU."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    # libtpu guards a TPU against a second process; there is none to guard.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, topology, *map(str, arguments)],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
