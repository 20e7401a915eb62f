"""Models that scan over stacked layers are those of layers apart, in all that is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, PartitionSpec

import alibi_flax
from alibi_convert import convert, optax_to_torch, torch_to_flax, torch_to_optax
from alibi_flax import stacked, unstacked
from alibi_spec import ALiBiConfig, Recipe
from alibi_spec.budgets import AGREEMENTS, BUDGETS, gradient_floor
from alibi_spec.parameters import initial_parameters, stacked_table
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.optimizer_states import assert_same_state

CONFIG = ALiBiConfig(
    **{"num_layers": 3, "d_model": 12, "num_heads": 3, "vocab_size": 17, "max_len": 16},
    **{"slopes": "learned", "dropout": 0.0},
)
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 11), np.int32)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def models(**options: Any) -> tuple[alibi_flax.ALiBiLM, alibi_flax.ALiBiLM, Any]:
    """Layers apart, scanned, and params of the former."""
    apart = alibi_flax.ALiBiLM(CONFIG, dtype=jnp.float64, param_dtype=jnp.float64)
    arrays = {name: x.astype(np.float64) for name, x in initial_parameters(CONFIG, 0).items()}
    return apart, apart.clone(scan_layers=True, **options), torch_to_flax(arrays, CONFIG)


def assert_same(actual: Any, expected: Any, what: str) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        found = actual
        for key in path:
            found = found[key.key]
        assert_bitwise(np.asarray(found), np.asarray(x), f"{what} {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_outputs_and_gradients(recompute: bool) -> None:
    apart, scanned, params = models(recompute=recompute)
    budget = BUDGETS["float64", "cpu"]
    exact, found = (
        model.apply({"params": each}, TOKENS)
        for model, each in ((apart, params), (scanned, stacked(params)))
    )
    assert_within(np.asarray(found), np.asarray(exact), budget.forward, "logits")

    def gradients(model: Any, params: Any) -> Any:
        return jax.jit(jax.grad(lambda params: alibi_flax.loss(model, params, BATCH)[0]))(params)

    every = flatten_dict(gradients(apart, params), sep="/")
    others = flatten_dict(unstacked(gradients(scanned, stacked(params))), sep="/")
    floor = gradient_floor(every)
    assert set(every) == set(others)
    for name, exact in every.items():
        assert_within(
            np.asarray(others[name]), np.asarray(exact), budget.gradient, name, floor=floor
        )


def test_trees() -> None:
    """The table's; fresh params have it, too, and stacking is undone bit for bit."""
    _, scanned, params = models()
    rows = {row.flax_path: row.flax_shape for row in stacked_table(CONFIG)}
    fresh = scanned.init(jax.random.key(0), TOKENS)["params"]
    for tree in (fresh, stacked(params)):
        assert {path: leaf.shape for path, leaf in flatten_dict(tree).items()} == rows
    layers = fresh["transformer"]["layers"]["ffn"]["fc1"]["kernel"]
    assert len({float(layer[0, 0]) for layer in layers}) == CONFIG.num_layers
    assert_same(unstacked(stacked(params)), params, "params")
    assert unstacked(params).keys() == params.keys()
    many = stacked({f"layers_{number}": {"a": np.array(number)} for number in range(12)})
    assert many["layers"]["a"].tolist() == list(range(12))  # not in the order of the names
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("tensor",), axis_types=(AxisType.Auto,))
    for tree in (
        alibi_flax.partition_specs(CONFIG, scan_layers=True),
        alibi_flax.shardings(CONFIG, mesh, scan_layers=True),
    ):
        assert flatten_dict(tree).keys() == rows.keys()
    kernel = tree["transformer"]["layers"]["ffn"]["fc2"]["kernel"]
    assert kernel.spec == PartitionSpec(None, "tensor", None)


def test_training_and_the_state_of_its_optimizer() -> None:
    apart, scanned, params = models()
    recipe = Recipe(steps=3, batch_size=2, learning_rate=1e-2, weight_decay=0.5)
    one = alibi_flax.Trainer(apart, params, recipe)
    other = alibi_flax.Trainer(scanned, stacked(params), recipe)
    for _ in range(3):
        one.step(BATCH)
        other.step(BATCH)
    every = flatten_dict(unstacked(other.params), sep="/")
    for name, exact in flatten_dict(one.params, sep="/").items():
        if not name.endswith("key/bias"):  # softmax does not see it: rounding decides its way
            limit = AGREEMENTS["float64 training"].relative
            assert_within(np.asarray(every[name]), np.asarray(exact), limit, name)
    assert_same_state(stacked(one.optimizer.init(one.params)), other.optimizer.init(other.params))
    saved = optax_to_torch(other.optimizer_state, CONFIG)
    assert_same_state(stacked(torch_to_optax(saved, CONFIG, one.optimizer)), other.optimizer_state)


def test_checkpoints(tmp_path: Path) -> None:
    _, scanned, params = models()
    alibi_flax.save_pretrained(tmp_path / "model", scanned, stacked(params))
    _, apart = alibi_flax.from_pretrained(tmp_path / "model")
    assert_same(apart, params, "apart")
    model, again = alibi_flax.from_pretrained(tmp_path / "model", scan_layers=True)
    assert model.scan_layers
    assert_same(again, jax.tree.map(np.asarray, stacked(params)), "stacked")
    (tmp_path / "run.msgpack").write_bytes(serialization.to_bytes({"params": stacked(params)}))
    convert(tmp_path / "run.msgpack", tmp_path / "copy", config=CONFIG, verify="bits")
    assert_same(alibi_flax.from_pretrained(tmp_path / "copy")[1], params, "from msgpack")


def test_traces_are_of_layers_apart() -> None:
    apart, scanned, params = models()
    expected = alibi_flax.trace(apart, params, TOKENS)
    found = alibi_flax.trace(scanned, stacked(params), TOKENS)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert_bitwise(np.asarray(found[name]), np.asarray(array), name)
    plans = alibi_flax.model_plans(scanned, stacked(params), TOKENS)
    assert len(plans) == CONFIG.num_layers


def test_layers_draw_their_own_dropout() -> None:
    """Of branches that are 1 dropout leaves 0 or 2; were all alike, the sum is 0 or 6."""
    config = ALiBiConfig(
        **{"num_layers": 3, "d_model": 64, "num_heads": 1, "dropout": 0.5, "final_norm": False},
    )
    model = alibi_flax.ALiBiTransformer(config, scan_layers=True)
    x = jnp.zeros((1, 8, 64))
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x)["params"])
    params["layers"]["ffn"]["fc2"]["bias"] += 1
    options: Any = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    found = model.apply({"params": params}, x, **options)
    assert set(np.unique(np.asarray(found))) == {0, 2, 4, 6}


def test_caches_are_refused() -> None:
    _, scanned, params = models()
    with pytest.raises(ValueError, match=r"has no cache; call it with scan_layers=False and the"):
        alibi_flax.generate(scanned, stacked(params), TOKENS, 3)
    cache = alibi_flax.KVCache.empty(CONFIG, 2, 20)
    with pytest.raises(ValueError, match="a model with scan_layers has no cache"):
        scanned.apply({"params": stacked(params)}, TOKENS, cache=cache)
