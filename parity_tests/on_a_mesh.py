"""A program: one model on a mesh of emulated devices and on one, side by side.

`python -m parity_tests.on_a_mesh data=2,tensor=4` raises AssertionError where they differ, and
prints which collectives the compiled programs hold, as JSON. test_sharding.py runs it: the number
of devices is settled when JAX starts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh

import alibi_flax
from alibi_convert import torch_to_flax
from alibi_flax.dispatch import attention_within
from alibi_spec import ALiBiConfig, Recipe, parameter_table, slopes
from alibi_spec.bounds import model_windows
from alibi_spec.budgets import AGREEMENTS, BUDGETS, gradient_floor
from alibi_spec.parameters import initial_parameters
from alibi_spec.sharding import parameter_axes
from parity_tests.compare import assert_bitwise, assert_within

BATCH, STEPS = 8, 20
SEQ, TRAINED_SEQ = 1280, 128  # several blocks of the kernel; one, in dense attention
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Of each head there is one for every device of "tensor", or one of keys for two devices.
CONFIGS = {
    "heads of their own": ALiBiConfig(
        **{"num_layers": 2, "d_model": 64, "num_heads": 8, "vocab_size": 104, "max_len": SEQ},
        **{
            "expansion_factor": 3,
            "slopes": "learned",
            "attention_bias": False,
            "dropout": 0.0,
            "tie_embeddings": False,
        },
    ),
    "shared heads of keys": ALiBiConfig(
        **{"num_layers": 2, "d_model": 64, "num_heads": 8, "num_kv_heads": 2, "vocab_size": 104},
        **{
            "max_len": SEQ,
            "gated_ffn": True,
            "norm": "rms",
            "norm_bias": False,
            "dropout": 0.0,
            "qk_norm": True,
        },
    ),
}
RULES: dict[str, Any] = {"heads of their own": None, "shared heads of keys": {"kv_heads": None}}


def tokens_of(seed: int, seq: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 104, (BATCH, seq), np.int32)


def batch_of(seed: int, seq: int) -> dict[str, np.ndarray]:
    tokens = tokens_of(seed, seq + 1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def params_of(config: ALiBiConfig, dtype: str) -> Any:
    arrays = initial_parameters(config, 0)
    return torch_to_flax({name: array.astype(dtype) for name, array in arrays.items()}, config)


def check_outputs(config: ALiBiConfig, mesh: Mesh, rules: Any) -> dict[str, Any]:
    """Logits and gradients in float64; the arrays and the collectives of the programs."""
    model = alibi_flax.ALiBiLM(
        config, dtype=jnp.float64, param_dtype=jnp.float64, implementation="blockwise"
    )
    params, batch = params_of(config, "float64"), batch_of(0, SEQ)

    def logits(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, batch["tokens"])

    def mean(params: Any, batch: Any) -> Any:
        return alibi_flax.loss(model, params, batch)[0] / batch["targets"].size

    functions = {"logits": logits, "gradients": jax.grad(mean)}
    one = {name: jax.jit(function)(params, batch) for name, function in functions.items()}
    placed = jax.device_put(params, alibi_flax.shardings(config, mesh, rules))
    parts = jax.device_put(batch, alibi_flax.batch_sharding((BATCH, SEQ), mesh))
    found = {}
    budget = BUDGETS["float64", "cpu"]
    with jax.set_mesh(mesh):
        for name, function in functions.items():
            program = jax.jit(function).lower(placed, parts).compile()
            several = program(placed, parts)
            for path, exact in jax.tree_util.tree_leaves_with_path(one[name]):
                actual: Any = several
                for key in path:
                    actual = actual[key.key]
                limit = budget.forward if name == "logits" else budget.gradient
                floor = 0.0 if name == "logits" else gradient_floor(flatten_dict(one[name]))
                what = f"{name} {jax.tree_util.keystr(path)}"
                assert_within(np.asarray(actual), np.asarray(exact), limit, what, floor=floor)
            text = program.as_text()
            check_arrays(config, mesh, rules, text)
            found[name] = collectives(text)
    return found


def check_arrays(config: ALiBiConfig, mesh: Mesh, rules: Any, text: str) -> None:
    """No device holds a matrix of positions, or the whole of a weight that is divided by heads."""
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"f64\[([\d,]+)\]", text)}
    for shape in shapes:
        assert math.prod(shape) < SEQ * SEQ, f"an array of {shape}"
    if "fsdp" in mesh.shape:  # along which weights are gathered when they are used
        return
    for row in parameter_table(config):
        if any(parameter_axes(row, mesh.shape, rules)) and len(row.flax_shape) > 1:
            assert row.flax_shape not in shapes, f"the whole of {row.name}"


def collectives(text: str) -> dict[str, Any]:
    """How many of each kind a program holds, and the bytes of their results."""
    counts: Counter[str] = Counter()
    nbytes = 0
    text = re.sub(r"/\*.*?\*/", "", text)  # numbers of the results in a tuple
    for result, kind in re.findall(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(?:-start)?\(", text):
        counts[kind] += 1
        for width, sizes in re.findall(r"[a-z](\d+)\[([\d,]*)\]", result):
            nbytes += int(width) // 8 * math.prod(map(int, filter(None, sizes.split(","))))
    return {**counts, "bytes": nbytes}


def check_training(config: ALiBiConfig, mesh: Mesh, rules: Any) -> None:
    """Twenty steps, scanned on the mesh; params and moments stay where they were."""
    model = alibi_flax.ALiBiLM(config, param_dtype=jnp.float64, dtype=jnp.float64)
    params = params_of(config, "float64")
    recipe = Recipe(steps=STEPS, batch_size=BATCH, learning_rate=1e-2)
    goal = alibi_flax.shardings(config, mesh, rules, scan_layers=True)
    one = alibi_flax.Trainer(model, params, recipe)
    placed = jax.device_put(alibi_flax.stacked(params), goal)
    several = alibi_flax.Trainer(model.clone(scan_layers=True), placed, recipe)
    places = jax.tree.map(lambda x: x.sharding, several.optimizer_state)
    for step in range(STEPS):
        one.step(batch_of(step, TRAINED_SEQ))
        with jax.set_mesh(mesh):
            several.step(batch_of(step, TRAINED_SEQ))
    limit = AGREEMENTS["float64 training"].relative
    # Else the second step would be compiled anew.
    assert jax.tree.map(lambda x: x.sharding, several.optimizer_state) == places
    adam = several.optimizer_state[0]
    for tree in (several.params, adam.mu, adam.nu):
        is_there = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, goal)
        assert all(jax.tree.leaves(is_there)), is_there
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(alibi_flax.unstacked(several.params)),
        jax.tree.leaves(one.params),
        strict=True,
    )
    for (path, actual), exact in pairs:
        what = f"after {STEPS} steps {jax.tree_util.keystr(path)}"
        assert_within(np.asarray(actual), np.asarray(exact), limit, what)


def check_generation(config: ALiBiConfig, mesh: Mesh, rules: Any) -> None:
    """The same tokens, of unequal prompts, from a cache that is divided, too."""
    model, params = alibi_flax.ALiBiLM(config), params_of(config, "float32")
    prompts = jnp.asarray(tokens_of(1, 40))
    mask = jnp.arange(40)[None] >= jnp.arange(0, 5 * BATCH, 5)[:, None]
    options: Any = {"attention_mask": mask, "do_sample": True, "top_p": 0.9, "seed": 3}
    one = alibi_flax.generate(model, params, prompts, 24, **options)
    placed = jax.device_put(params, alibi_flax.shardings(config, mesh, rules))
    with jax.set_mesh(mesh):
        several = alibi_flax.generate(model, placed, prompts, 24, **options)
        read = jax.jit(lambda *a: model.apply({"params": a[0]}, a[1], cache=a[2]))
        empty = alibi_flax.KVCache.empty(config, BATCH, 64)
        _, cache = read(placed, prompts, empty)
        step = read.lower(placed, prompts[:, :1], cache).compile().as_text()
    assert_bitwise(np.asarray(several.tokens), np.asarray(one.tokens), "tokens")
    of_heads = mesh.shape.get("tensor", 1) if rules is None else 1
    of_batch = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    if "fsdp" not in mesh.shape:  # along which weights are gathered
        assert collectives(step)["bytes"] < cache.keys[0][0].nbytes, collectives(step)
    for key in (*empty.keys, *cache.keys, *cache.values):
        local = key[0].addressable_shards[0].data
        assert local.size * of_heads * of_batch <= key[0].size, (local.shape, key[0].shape)


def check_neighbours(mesh: Mesh) -> dict[str, Any]:
    """Attention of positions over devices, of every kind; and a model that sends only windows."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, SEQ, heads, 8))) for heads in (4, 2, 2)]
    arrays.append(jnp.asarray(slopes(4), jnp.float64))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, SEQ)), axis=1))
    masks = {"attention_mask": jnp.asarray(rng.random((2, SEQ)) < 0.8), "segment_ids": segments}
    for causal, rate, some in itertools.product((True, False), (0.0, 0.2), ({}, masks)):
        options: Any = {"causal": causal, "implementation": "blockwise", "dropout": rate, **some}

        def total(*arrays: Any, options: Any = options) -> Any:
            attended = alibi_flax.attention(*arrays, dropout_rng=jax.random.key(1), **options)
            return (attended**2).sum(), attended

        both = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        one = jax.tree.leaves(both(*arrays))
        with jax.set_mesh(mesh):
            several = jax.tree.leaves(both(*arrays))
        for number, (actual, exact) in enumerate(zip(several, one, strict=True)):
            what = f"{'gradient' if number < 4 else 'values'} {number}, {causal=}, {rate=}"
            limit = BUDGETS["float64", "cpu"].gradient
            assert_within(np.asarray(actual), np.asarray(exact), limit, what)
    check_a_far_key(mesh)
    return check_windows(mesh)


def check_a_far_key(mesh: Mesh) -> None:
    """A key outweighs its distance, and its device is not asked for it: no number is right."""
    own = SEQ // mesh.size
    query, key = np.ones((1, SEQ, 1, 4)), np.full((1, SEQ, 1, 4), 0.1)
    key[0, own // 2] = 500
    arrays = (jnp.asarray(query), jnp.asarray(key), jnp.asarray(key), jnp.asarray([0.5]))
    options: dict[str, Any] = dict.fromkeys(("scale", "attention_mask", "segment_ids"))
    options |= {"causal": True, "implementation": "blockwise", "distance": "absolute"}
    options |= {"dropout": 0.0, "dropout_rng": None}
    with jax.set_mesh(mesh):
        found = np.asarray(attention_within((60,), *arrays, **options))
    assert np.isfinite(found[:, : 2 * own]).all()  # which have it, or its device's neighbour
    assert np.isnan(found[:, 2 * own :]).all()


def check_windows(mesh: Mesh) -> dict[str, Any]:
    config = ALiBiConfig(
        **{"num_layers": 2, "d_model": 64, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 104},
        # The heads that need the most keys are the first.
        **{"max_len": SEQ, "dropout": 0.0, "slopes": tuple(map(float, slopes(8)[::-1]))},
    )
    params, tokens = params_of(config, "float32"), tokens_of(0, SEQ)
    proved = model_windows(config, initial_parameters(config, 0))
    windows = tuple(map(tuple, proved.tolist()))
    model = alibi_flax.ALiBiLM(config, implementation="blockwise")
    one = jax.jit(model.apply)({"params": params}, tokens)
    placed = jax.device_put(params, alibi_flax.shardings(config, mesh))
    budget, found = BUDGETS["float32", "cpu"].forward, {}
    with jax.set_mesh(mesh):
        parts = jax.device_put(tokens, alibi_flax.batch_sharding(tokens.shape, mesh))
        for name, each in (("all", None), ("windows", windows), ("few", ((20,) * 8,) * 2)):
            apply = jax.jit(model.clone(windows=each).apply)
            program = apply.lower({"params": placed}, parts).compile()
            found[name] = collectives(program.as_text())
            several = np.asarray(program({"params": placed}, parts))
            if name == "few":  # the first device lacks no key
                own = SEQ // mesh.size
                assert np.isnan(several[:, 2 * own :]).all()
                assert np.isfinite(several[:, :own]).all()
            else:
                assert_within(several, np.asarray(one), budget, f"logits with {name}")
    own = SEQ // mesh.size
    pairs = proved.reshape(2, 4, 2).max(axis=2)  # of each head of keys
    hops = np.minimum(-(-(pairs - 1) // own), mesh.size - 1).sum()
    numbers = BATCH * own * config.head_dim * 2  # of keys and values of one head and one hop
    # Masks are sent, too: a byte for each position.
    found["sent, by the windows"] = int(hops * numbers * 4)
    return found


def main() -> None:
    sizes = dict(each.split("=") for each in sys.argv[1].split(","))
    axes = tuple(map(int, sizes.values()))
    mesh = jax.make_mesh(axes, tuple(sizes), axis_types=(AxisType.Auto,) * len(axes))
    found = {}
    if set(sizes) == {"sequence"}:
        print(json.dumps(check_neighbours(mesh)))
        return
    for name, config in CONFIGS.items():
        rules = RULES[name]
        found[name] = check_outputs(config, mesh, rules)
        check_training(config, mesh, rules)
        check_generation(config, mesh, rules)
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    main()
