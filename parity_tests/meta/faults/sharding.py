"""Plausible mistakes in dividing models among devices, and in stacking their layers."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

_RULES = "test_sharding.py -k"
_STACKING = "test_stacking.py -k"

FAULTS = (
    Mutant(
        "norms divided like the weights",
        "alibi_spec/sharding.py",
        'is_whole = [axis for axis in row.logical_axes if axis != "layers"] == ["embed"]',
        "is_whole = False",
        f"{_RULES} parameters_on_a_mesh",
    ),
    Mutant(
        "axes divided into parts of unequal size",
        "alibi_spec/sharding.py",
        "    if size % count == 0:\n        return",
        "    if size >= count:\n        return",
        f"{_RULES} cannot_be_divided",
    ),
    Mutant(
        "one axis of a mesh divides two of a weight",
        "alibi_spec/sharding.py",
        "            if name in users:",
        "            if not users:",
        f"{_RULES} cannot_be_divided",
    ),
    Mutant(
        "parts of heads in torch's layout",
        "alibi_spec/sharding.py",
        "by_axis[group[0]]",
        "by_axis[group[-1]]",
        f"{_RULES} parameters_on_a_mesh",
    ),
    Mutant(
        "devices with keys of other heads",
        "alibi_flax/kernels/windowed/operator.py",
        "jnp.repeat(arrays[name], devices // kv_heads, 2)",
        "jnp.tile(arrays[name], (1, 1, devices // kv_heads, 1))",
        f"{_RULES} 'one_device and tensor'",
    ),
    Mutant(
        "params that move to other devices in training",
        "alibi_flax/training.py",
        "out_shardings=(*goals, None)",
        "out_shardings=None",
        f"{_RULES} 'one_device and sequence'",
    ),
    Mutant(
        "embeddings gathered by way of one device",
        "alibi_flax/model.py",
        'constrained(embedding, "vocab", "features")',
        "embedding",
        f"{_RULES} 'one_device and fsdp'",
    ),
    Mutant(
        "a cache that every device keeps whole",
        "alibi_flax/cache.py",
        "return constrained(x, *_AXES)",
        "return x",
        f"{_RULES} 'one_device and tensor'",
    ),
    Mutant(
        "steps that gather the whole cache",
        "alibi_flax/cache.py",
        "return on_each_device(",
        "return (lambda function, x, *_: function(x))(",
        f"{_RULES} 'one_device and tensor'",
    ),
    Mutant(
        "one neighbour too few",
        "alibi_spec/sharding.py",
        "min(devices - 1, -(-(window - 1) // own))",
        "min(devices - 1, (window - 1) // own)",
        f"{_RULES} neighbours_needed",
    ),
    Mutant(
        "keys that were not sent not missed",
        "alibi_flax/kernels/neighbours.py",
        "return is_enough | ",
        "return True | is_enough | ",
        f"{_RULES} positions_over",
    ),
    Mutant(
        "heads left in the order of their neighbours",
        "alibi_flax/kernels/neighbours.py",
        "place = sorted(range(len(order)), key=order.__getitem__)",
        "place = list(range(len(order)))",
        f"{_RULES} positions_over",
    ),
    Mutant(
        "neighbours in the wrong order",
        "alibi_flax/kernels/neighbours.py",
        "range(count, -1, -1)",
        "[*range(1, count + 1), 0]",
        f"{_RULES} positions_over",
    ),
    Mutant(
        "keys of other devices taken for small",
        "alibi_flax/kernels/neighbours.py",
        "jax.lax.pmax(norms.max(axis=-1), axes)",
        "norms.max(axis=-1)",
        f"{_RULES} positions_over",
    ),
    Mutant(
        "layers of a scan that drop the same",
        "alibi_flax/model.py",
        '"dropout": True}',
        '"dropout": False}',
        f"{_STACKING} own_dropout",
    ),
    Mutant(
        "layers stacked in the order of their names",
        "alibi_flax/stacking.py",
        "[node[layers[number]] for number in range(len(layers))]",
        "[node[key] for key in sorted(layers.values())]",
        f"{_STACKING} trees",
    ),
    Mutant(
        "stacked weights that do not decay",
        "alibi_flax/training.py",
        'decays[row.name.replace("*", "0")]',
        "decays.get(row.name, False)",
        f"{_STACKING} state_of_its_optimizer",
    ),
    Mutant(
        "every layer of a stacked checkpoint the first",
        "alibi_convert/rules.py",
        "yield apart, leaf[layer] if",
        "yield apart, leaf[0] if",
        f"{_STACKING} 'checkpoints or optimizer'",
    ),
)
