"""Each backend behaves as its ecosystem expects: torch's modules and compiler, JAX's transforms."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import alibi_flax
import alibi_torch
from alibi_convert import torch_to_flax
from alibi_convert.formats.folder import write as write_folder
from alibi_convert.rules import canonical_tensors
from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import model_slopes, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.cases import draw_parameters
from parity_tests.compare import (
    assert_bitwise,
    assert_gradients_within,
    assert_trace_within,
    assert_within,
)
from parity_tests.small_models import (
    CONFIG,
    MASK,
    TOKENS,
    attention_slopes,
    flax_model,
    torch_model,
)

FLOAT32 = BUDGETS["float32", "cpu"]


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_compiles_into_one_graph(training: bool) -> None:
    """No graph breaks with masks or dropout; outputs and gradients as in eager mode."""
    model = torch_model().train(training)
    tokens, mask = torch.from_numpy(TOKENS), torch.from_numpy(MASK)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    eager = model(tokens, mask)
    eager.square().mean().backward()
    gradients = {name: as_numpy(p.grad) for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    logits = compiled(tokens, mask)
    logits.square().mean().backward()
    limit = FLOAT32.forward
    assert_within(as_numpy(logits), as_numpy(eager), limit, "logits")
    found = {name: as_numpy(parameter.grad) for name, parameter in model.named_parameters()}
    assert_gradients_within(found, gradients, FLOAT32.gradient, "compiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_torch_compiles_to_machine_code() -> None:
    """The default backend, with a new sequence length after the first."""
    model = torch_model()
    compiled = torch.compile(model, fullgraph=True)
    for length in (40, 33, 25):
        tokens = torch.from_numpy(TOKENS[:, :length])
        expected = as_numpy(model(tokens))
        assert_within(as_numpy(compiled(tokens)), expected, FLOAT32.forward, str(length))


def test_torch_autocast_keeps_logits_in_float32() -> None:
    """bfloat16 activations, float32 biased logits, and an output within bfloat16's budget."""
    model = torch_model()
    tokens = torch.from_numpy(TOKENS)
    exact = alibi_torch.trace(copy.deepcopy(model).double(), tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = alibi_torch.trace(model, tokens)
    assert values["layers.0.biased_logits"].dtype == torch.float32
    assert values["layers.0.ffn"].dtype == torch.bfloat16
    for name in ("layers.0.biased_logits", "layers.1.biased_logits", "logits"):
        dtype = "bfloat16" if name == "logits" else "float32"
        limit = BUDGETS["bfloat16", "cpu"].forward
        assert_within(as_numpy(values[name]), as_numpy(exact[name]), limit, name, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_slopes_are_never_rounded_or_stored(dtype: torch.dtype) -> None:
    model = torch_model().to(dtype)
    assert_bitwise(as_numpy(attention_slopes(model)), model_slopes(CONFIG), "after .to(dtype)")
    assert not any("slopes" in name for name in model.state_dict())
    empty = torch_model().to("meta").to_empty(device="cpu")
    assert_bitwise(as_numpy(attention_slopes(empty)), model_slopes(CONFIG), "after to_empty")


def test_torch_learned_slopes_are_never_rounded() -> None:
    """They follow `.to` to the device, and widen, but stay float32 in narrow models; so do theirs
    gradients."""
    model = alibi_torch.ALiBiLM(dataclasses.replace(CONFIG, slopes="learned"))
    slopes = model.transformer.layers[1].attn.slopes
    slopes.data.mul_(1 / 3)
    model(torch.from_numpy(TOKENS)).square().mean().backward()
    kept, gradient = slopes.detach().clone(), slopes.grad.clone()
    model.to(torch.bfloat16)
    slopes = model.transformer.layers[1].attn.slopes
    assert_bitwise(as_numpy(slopes), as_numpy(kept), "slopes")
    assert_bitwise(as_numpy(slopes.grad), as_numpy(gradient), "gradient")
    assert model(torch.from_numpy(TOKENS)).dtype == torch.bfloat16
    assert model.double().transformer.layers[1].attn.slopes.dtype == torch.float64


@pytest.mark.parametrize("way", ["assign", "to_empty", "reset_parameters", "one by one"])
def test_torch_slopes_of_a_model_made_on_the_meta_device(way: str) -> None:
    """They are real once the weights are, however those arrive."""
    whole, tokens = torch_model(), torch.arange(300)[None] % 23
    with torch.device("meta"):
        model = alibi_torch.ALiBiLM(CONFIG).eval()
    if way == "assign":
        model.load_state_dict(whole.state_dict(), assign=True)
    elif way == "one by one":  # as accelerate does
        for name, value in whole.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)
    else:
        model.to_empty(device="cpu")
        if way == "reset_parameters":
            model.reset_parameters()
            assert model(tokens).isfinite().all()
        model.load_state_dict(whole.state_dict())
    assert not list(model.buffers())
    with torch.inference_mode():
        found = model(tokens)
    assert_bitwise(as_numpy(found), as_numpy(whole(tokens)), "logits")
    model(tokens).mean().backward()  # nothing of the inference is left


@pytest.mark.parametrize(
    ("matrices", "norms", "expected"),
    [("bfloat16", "float32", "bfloat16"), ("float32", "bfloat16", "float32")],
)
def test_mixed_dtypes_follow_one_rule(
    tmp_path: Path, matrices: str, norms: str, expected: str
) -> None:
    """SPEC.md §5.1, from a folder, in both backends: dtypes of every layer, and values."""
    config = dataclasses.replace(CONFIG, qk_norm=True, embedding_norm=True, tie_embeddings=False)
    parameters, tokens = draw_parameters(config, "bfloat16"), np.arange(40).reshape(2, 20) % 23
    stored = {
        name: array.astype(jnp.dtype(norms if "norm" in name else matrices))
        for name, array in parameters.items()
    }
    (folder := tmp_path / "mixed").mkdir()
    write_folder(folder, config, Tensors.of(stored))
    model = alibi_torch.ALiBiLM.from_pretrained(folder)
    module, params = alibi_flax.from_pretrained(folder)
    ours = alibi_torch.trace(model, torch.from_numpy(tokens))
    theirs = alibi_flax.trace(module, params, jnp.asarray(tokens))
    exact = reference_forward(config, parameters, tokens)
    for values in (
        {name: as_numpy(value.detach()) for name, value in ours.items()},
        {name: np.asarray(value) for name, value in theirs.items()},
    ):
        assert_trace_within(config, values, exact, BUDGETS[expected, "cpu"], expected, "mixed")


def test_torch_biases_wider_than_matrices() -> None:
    """A linear map computes in the common dtype, and what follows keeps it; autocast has a rule."""
    model, (module, _) = torch_model().bfloat16(), flax_model()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.float()
    params = torch_to_flax(model.state_dict(), CONFIG)
    assert model(torch.from_numpy(TOKENS)).dtype == torch.float32
    assert module.apply({"params": params}, jnp.asarray(TOKENS)).dtype == jnp.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.from_numpy(TOKENS)).dtype == torch.bfloat16


def test_torch_under_fsdp() -> None:
    """Sharded over a group of one, with bfloat16 parameters: bfloat16 logits and gradients."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FSDP)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


_FSDP = """
    import os
    import warnings
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    import alibi_torch
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for slopes in ("paper", "learned"):
        config = alibi_torch.ALiBiConfig(
            num_layers=1, d_model=16, num_heads=2, vocab_size=11, slopes=slopes
        )
        with torch.device("meta"):
            model = alibi_torch.ALiBiLM(config)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in (*model.transformer.layers, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        model.to_empty(device="cpu")
        model.reset_parameters()
        # What FSDP keeps of generation serves the training that follows.
        alibi_torch.generate(model.eval(), torch.arange(10)[None], 2)
        logits = model(torch.arange(10)[None])
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all(), logits
        logits.float().square().mean().backward()
        assert all(each.grad is not None for each in model.parameters())
    warnings.simplefilter("ignore")  # a group of one shards nothing
    precision = MixedPrecision(param_dtype=torch.bfloat16)
    older = FullyShardedDataParallel(
        alibi_torch.ALiBiLM(config), device_id=torch.device("cpu"), mixed_precision=precision
    )
    logits = older(torch.arange(10)[None])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all(), logits
    logits.float().square().mean().backward()
    dist.destroy_process_group()
    os._exit(0)  # see mesh_processes.py: PyTorch can abort while Python shuts down
"""


@pytest.mark.parametrize("slopes", ["paper", "learned"])
def test_torch_replicas_without_parameters(slopes: str) -> None:
    """DataParallel's modules hold plain tensors: their `parameters()` are empty."""
    model = alibi_torch.ALiBiLM(dataclasses.replace(CONFIG, slopes=slopes)).eval()
    tokens = torch.from_numpy(TOKENS)
    replicas = {each: each._replicate_for_data_parallel() for each in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
    assert not list(replicas[model].parameters())
    found, expected = replicas[model](tokens), model(tokens)
    assert_bitwise(as_numpy(found.detach()), as_numpy(expected.detach()), "logits")


def test_torch_on_the_meta_device() -> None:
    """Built under a device context, or moved there: shapes alone, and slopes where the model is."""
    with torch.device("meta"):
        model = alibi_torch.ALiBiLM(CONFIG)
        tokens = torch.zeros(2, 5, dtype=torch.int64)
    assert model(tokens).shape == (2, 5, 23)
    assert torch_model().to("meta")(tokens).shape == (2, 5, 23)


def test_torch_per_sample_gradients() -> None:
    """vmap over grad over functional_call, where nobody may look at the tokens' values."""
    model, tokens = torch_model(), torch.from_numpy(TOKENS)
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, tokens: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (tokens[None],)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for index in range(len(tokens)):
        expected = torch.func.grad(loss)(parameters, tokens[index])
        assert_gradients_within(
            {name: as_numpy(gradient[index]) for name, gradient in found.items()},
            {name: as_numpy(gradient) for name, gradient in expected.items()},
            FLOAT32.gradient,
            f"sample {index}",
        )


def test_torch_state_dict_and_deepcopy() -> None:
    model = torch_model()
    other = alibi_torch.ALiBiLM(CONFIG).eval()
    assert not other.load_state_dict(model.state_dict()).missing_keys
    tokens = torch.from_numpy(TOKENS)
    for each in (other, copy.deepcopy(model)):
        assert_bitwise(as_numpy(each(tokens)), as_numpy(model(tokens)), "copy")


def test_torch_dropout_follows_the_mode() -> None:
    model, tokens = torch_model(), torch.from_numpy(TOKENS)
    assert_bitwise(as_numpy(model(tokens)), as_numpy(model(tokens)), "twice")
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_flax_jit_and_vmap() -> None:
    """One compiled call, and a vmap over single sequences, give what the plain call gives."""
    model, params = flax_model()
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    plain = np.asarray(model.apply({"params": params}, tokens, mask))

    def single(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens[None], mask[None])[0]

    jitted = jax.jit(model.apply)({"params": params}, tokens, mask)
    assert_within(np.asarray(jitted), plain, FLOAT32.forward, "jit")
    mapped = jax.vmap(single)(tokens, mask)
    assert_within(np.asarray(mapped), plain, FLOAT32.forward, "vmap")


def test_flax_recomputation_changes_nothing_but_memory() -> None:
    """The same params tree and gradients, each block inside a checkpoint of its own."""
    kept, params = flax_model()
    rematerialised, same = flax_model(recompute=True)
    assert jax.tree.structure(params) == jax.tree.structure(same)
    tokens = jnp.asarray(TOKENS)

    def loss(params: Any, model: alibi_flax.ALiBiLM) -> jax.Array:
        return (model.apply({"params": params}, tokens) ** 2).mean()

    ours, theirs = (
        canonical_tensors(jax.jit(jax.grad(loss), static_argnums=1)(params, model), CONFIG)
        for model in (kept, rematerialised)
    )
    assert_gradients_within(theirs, ours, FLOAT32.gradient, "remat")
    blocks = [
        str(jax.make_jaxpr(lambda params, model=model: jax.grad(loss)(params, model))(params))
        for model in (kept, rematerialised)
    ]
    assert [jaxpr.count("prevent_cse=True") for jaxpr in blocks] == [0, CONFIG.num_layers]


def test_flax_recomputation_draws_the_same_dropout_twice() -> None:
    """The recomputed forward pass must drop what the first one dropped: a central difference of the
    stochastic loss, at a fixed key, is the gradient."""
    model, params = flax_model(param_dtype="float64", recompute=True)
    tokens = jnp.asarray(TOKENS)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(2)}}

    def loss(params: Any) -> jax.Array:
        return (model.apply({"params": params}, tokens, **options) ** 2).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    gradient = value_and_gradient(params)[1]
    norm = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)) ** 0.5
    step = 1e-6 / norm
    ahead, behind = (
        value_and_gradient(jax.tree.map(lambda p, g, step=step: p + step * g, params, gradient))[0]
        for step in (step, -step)
    )
    slope = np.asarray((ahead - behind) / (2 * step))
    assert_within(slope, np.asarray(norm**2), FLOAT32.gradient, "slope along the gradient")


def test_flax_whole_model_remat() -> None:
    """linen's own lifted transform on the whole class."""
    model, params = flax_model()
    lifted = nn.remat(alibi_flax.ALiBiLM)(CONFIG)
    tokens = jnp.asarray(TOKENS)
    expected = np.asarray(model.apply({"params": params}, tokens))
    found = lifted.apply({"params": params}, tokens)
    assert_within(np.asarray(found), expected, FLOAT32.forward, "nn.remat")


def test_flax_trace_sees_through_recomputation() -> None:
    model, params = flax_model(recompute=True)
    for name, value in alibi_flax.trace(model, params, jnp.asarray(TOKENS)).items():
        assert np.isfinite(np.asarray(value)[..., :1]).all(), name


def test_flax_under_strict_promotion() -> None:
    """No dtype is mixed in silence. (bfloat16 is, inside linen's own LayerNorm.)"""
    model, params = flax_model()
    with jax.numpy_dtype_promotion("strict"):
        rngs = {"dropout": jax.random.key(0)}
        arguments = ({"params": params}, jnp.asarray(TOKENS), jnp.asarray(MASK))
        logits = model.apply(*arguments, deterministic=False, rngs=rngs)
    assert logits.dtype == jnp.float32


def test_flax_dropout_is_drawn_from_its_rng() -> None:
    model, params = flax_model()

    def logits(seed: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(
            model.apply({"params": params}, jnp.asarray(TOKENS), deterministic=False, rngs=rngs)
        )

    assert_bitwise(logits(0), logits(0), "same key")
    assert (logits(0) != logits(1)).any()


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32"]
)
def test_flax_dtype_and_param_dtype(dtype: str) -> None:
    """`dtype` rules the computation, `param_dtype` the parameters, and neither the logits."""
    model, params = flax_model(dtype=dtype, param_dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    values = alibi_flax.trace(model, params, jnp.asarray(TOKENS))
    assert str(values["logits"].dtype) == dtype
    assert str(values["layers.0.biased_logits"].dtype) == "float32"
    _, narrow = flax_model(param_dtype=dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(narrow)} == {dtype}


def test_flax_nnx_bridge() -> None:
    """The linen model as an nnx module: the same output, and gradients through nnx."""
    tokens = jnp.asarray(TOKENS)
    model = nnx.bridge.ToNNX(alibi_flax.ALiBiLM(CONFIG), rngs=nnx.Rngs(0)).lazy_init(tokens)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = np.asarray(alibi_flax.ALiBiLM(CONFIG).apply({"params": params}, tokens))
    assert_within(np.asarray(model(tokens)), expected, FLOAT32.forward, "ToNNX")
    gradients = nnx.grad(lambda model: (model(tokens) ** 2).mean())(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
