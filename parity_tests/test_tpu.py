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
from typing import Any

import pytest

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


def _measured(code: str, topology: str) -> Any:
    """What a program prints that compiles for a topology; libtpu looks for no TPU."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code), topology],
        env=os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
