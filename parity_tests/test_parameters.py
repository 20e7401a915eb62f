"""The parameter table, both backends' parameters, and the conversion between their layouts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, flax_to_torch, torch_to_flax
from alibi_convert.rules import canonical_tensors, check_shapes
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig, parameter_table, slopes
from parity_tests.cases import CONFIGS, each_config
from parity_tests.compare import assert_bitwise


@each_config
def test_table_is_both_backends(config_name: str) -> None:
    """Every parameter of either backend is in the table once, with its shape, and nothing else."""
    config = CONFIGS[config_name]
    table = parameter_table(config)
    ours = {name: tuple(value.shape) for name, value in _torch_model(config).state_dict().items()}
    assert ours == {row.name: row.shape for row in table}
    shapes = jax.eval_shape(lambda: _flax_params(config))
    theirs = {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}
    assert theirs == {row.flax_path: row.flax_shape for row in table}


def test_boxed_params_are_params() -> None:
    """Linen's boxes, which others put around params, live and as they are written to a file."""
    config = CONFIGS["lm-tied"]
    params = _flax_params(config)
    plain = canonical_tensors(params, config)
    boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), params)
    for params in (boxed, to_state_dict(boxed), flatten_dict(to_state_dict(boxed), sep="/")):
        for name, tensor in canonical_tensors(params, config).items():
            assert_bitwise(tensor, plain[name], name)


@each_config
def test_tracer(config_name: str) -> None:
    """Every element of every tensor arrives exactly where a hand-written index says, both ways.

    Elements are unique over the whole model, so no two can be exchanged unseen.
    """
    config = CONFIGS[config_name]
    state, first = {}, 0
    for row in parameter_table(config):
        size = int(np.prod(row.shape))
        state[row.name] = np.arange(first, first + size, dtype=np.float64).reshape(row.shape)
        first += size
    tree = torch_to_flax(state, config)
    for row in parameter_table(config):
        leaf = tree
        for key in row.flax_path:
            leaf = leaf[key]
        expected = _expected_flax(row.name, state[row.name], config)
        assert_bitwise(leaf, expected, row.name)
        assert leaf.flags.c_contiguous
    back = flax_to_torch(tree, config)
    assert list(back) == list(state)
    for name, tensor in back.items():
        assert_bitwise(as_numpy(tensor), state[name], name)


def _expected_flax(name: str, tensor: np.ndarray, config: ALiBiConfig) -> np.ndarray:
    """The Flax leaf, element by element, from what linen's layers mean by their kernels."""
    head_dim = config.head_dim
    module, _, leaf = name.rpartition(".")
    is_key_or_value = module.endswith((".key", ".value", ".key_norm"))
    heads = (config.num_kv_heads or config.num_heads) if is_key_or_value else config.num_heads
    if module.endswith((".query_norm", ".key_norm")):
        return np.array([[tensor[h * head_dim + d] for d in range(head_dim)] for h in range(heads)])
    if module.endswith((".query", ".key", ".value")):
        if leaf == "bias":  # y[h, d] += bias[h, d]; torch's feature is h * head_dim + d
            return np.array(
                [[tensor[h * head_dim + d] for d in range(head_dim)] for h in range(heads)]
            )
        expected = np.empty((config.d_model, heads, head_dim))
        for h in range(heads):
            for d in range(head_dim):
                expected[:, h, d] = tensor[h * head_dim + d, :]
        return expected
    if module.endswith(".output") and leaf == "weight":
        expected = np.empty((heads, head_dim, config.d_model))
        for h in range(heads):
            for d in range(head_dim):
                expected[h, d, :] = tensor[:, h * head_dim + d]
        return expected
    linear = (".fc1", ".fc2", ".gate", "lm_head", "cluster_head", "head_transform")
    is_kernel = leaf == "weight" and module.endswith(linear)
    return np.ascontiguousarray(tensor.T) if is_kernel else tensor


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bits_survive(dtype: str) -> None:
    """Every bit pattern, NaN payloads and negative zero included, both ways and in every dtype."""
    config = ALiBiConfig(num_layers=1, d_model=6, num_heads=3, vocab_size=7)
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    state = {}
    for row in parameter_table(config):
        raw = rng.integers(0, 256, (*row.shape, kind.itemsize), dtype=np.uint8)
        state[row.name] = raw.view(kind)[..., 0]
    tree = torch_to_flax(state, config)
    for name, array in canonical_tensors(tree, config).items():
        assert_bitwise(array, np.ascontiguousarray(state[name]), name)
    for name, tensor in flax_to_torch(tree, config).items():
        assert tensor.dtype == getattr(torch, dtype)
        assert_bitwise(as_numpy(tensor), np.ascontiguousarray(state[name]), name)


def test_torch_state_dict_runs_in_flax_and_back() -> None:
    """The public functions on live objects: outputs before and after are the same bits."""
    config = CONFIGS["lm-untied"]
    model = alibi_torch.ALiBiLM(config).eval()
    tokens = np.arange(20).reshape(2, 10)
    before = model(torch.from_numpy(tokens))
    params = torch_to_flax(model.state_dict(), config)
    assert alibi_flax.ALiBiLM(config).apply({"params": params}, jnp.asarray(tokens)).shape == (
        *tokens.shape,
        config.vocab_size,
    )
    other = alibi_torch.ALiBiLM(config).eval()
    other.load_state_dict(flax_to_torch(params, config))
    after = other(torch.from_numpy(tokens))
    assert_bitwise(as_numpy(after), as_numpy(before), "logits")


def test_converted_params_are_a_copy() -> None:
    """Training the torch model on must not move the Flax params, nor the other way round."""
    config = CONFIGS["lm-tied"]
    model = alibi_torch.ALiBiLM(config)
    params = torch_to_flax(model.state_dict(), config)
    before = jax.tree.map(np.copy, params)
    state = flax_to_torch(params, config)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for parameter in model.parameters():
        parameter.data.add_(1)
    jax.tree.map(lambda a, b: assert_bitwise(a, b, "params"), params, before)
    for leaf in jax.tree.leaves(params):
        leaf += 1
    for name, tensor in state.items():
        assert_bitwise(as_numpy(tensor), as_numpy(kept[name]), name)


def test_differences_are_readable() -> None:
    expected = {"layers.0.mlp.down.weight": (8, 4), "a.weight": (4, 8), "b.bias": (4,), "c": (5,)}
    found = {"layers.0.mlp.dwn.weight": (8, 4), "a.weight": (8, 4), "b.bias": (4, 1), "c": (6,)}
    with pytest.raises(CheckpointError) as caught:
        check_shapes(expected, found)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 tensors missing, 1 unexpected, 3 of the wrong shape (of 4)"
    assert lines[1].split() == (
        ["missing", "layers.0.mlp.down.weight", "[8,", "4]", "nearest:", "layers.0.mlp.dwn.weight"]
    )
    assert lines[2].split()[:2] == ["unexpected", "layers.0.mlp.dwn.weight"]
    assert lines[3].endswith("a.weight  is [8, 4], expected [4, 8]: it is transposed")
    assert lines[4].endswith("it has 2 axes instead of 1")
    assert lines[5].endswith("axis 0 disagrees with the configuration")


def test_wrong_trees_are_refused() -> None:
    config = CONFIGS["lm-tied"]
    params = jax.tree.map(np.asarray, _flax_params(config))
    del params["transformer"]["layers_1"]["ffn"]["fc1"]["bias"]
    params["transformer"]["layers_1"]["ffn"]["fc1"]["extra"] = np.zeros(3)
    with pytest.raises(CheckpointError, match=r"missing +transformer/layers_1/ffn/fc1/bias"):
        flax_to_torch(params, config)
    state = alibi_torch.ALiBiLM(config).state_dict()
    state.pop("transformer.final_norm.bias")
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        torch_to_flax(state, config)


@each_config
def test_initial_values_follow_the_table(config_name: str) -> None:
    """Zeros and ones exactly; normal draws with the table's deviation, in both backends."""
    config = CONFIGS[config_name]
    flax_initial = canonical_tensors(_flax_params(config), config)
    torch_initial = {name: as_numpy(v) for name, v in _torch_model(config).state_dict().items()}
    for row in parameter_table(config):
        for initial in (flax_initial, torch_initial):
            values = initial[row.name].ravel()
            if row.init == "slopes":
                assert_bitwise(values, slopes(config.num_heads), row.name)
            elif isinstance(row.init, str):
                assert (values == {"zeros": 0.0, "ones": 1.0}[row.init]).all(), row.name
            else:
                # Five standard errors of a sample deviation: one false alarm in two million.
                assert abs(values.std() / row.init - 1) < 5 / np.sqrt(2 * values.size), row.name
                assert abs(values.mean() / row.init) < 5 / np.sqrt(values.size), row.name


def test_fresh_params_go_through_the_recipe_of_flax() -> None:
    """Logical axes to the axes of a mesh, and parameters drawn where they belong."""
    config = CONFIGS["lm-tied"]
    model, tokens = alibi_flax.ALiBiLM(config), jnp.zeros((1, 2), jnp.int32)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("model",))
    rules = [("heads", "model"), ("kv_heads", "model"), ("mlp", "model"), ("vocab", "model")]
    specs = {"params": alibi_flax.partition_specs(config)}
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    variables = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), tokens)
    layer = variables["params"]["transformer"]["layers_0"]
    expected = {
        ("attn", "query"): PartitionSpec(None, "model", None),
        ("attn", "output"): PartitionSpec("model", None, None),
        ("ffn", "fc1"): PartitionSpec(None, "model"),
        ("ffn", "fc2"): PartitionSpec("model", None),
    }
    for (branch, module), spec in expected.items():
        assert layer[branch][module]["kernel"].sharding.spec == spec, module


def _torch_model(config: ALiBiConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    bare = config.vocab_size is None
    return (alibi_torch.ALiBiTransformer if bare else alibi_torch.ALiBiLM)(config)


def _flax_params(config: ALiBiConfig) -> dict[str, Any]:
    if config.vocab_size is None:
        model, inputs = alibi_flax.ALiBiTransformer(config), jnp.zeros((1, 2, config.d_model))
    else:
        model, inputs = alibi_flax.ALiBiLM(config), jnp.zeros((1, 2), jnp.int32)
    return model.init(jax.random.key(0), inputs)["params"]
