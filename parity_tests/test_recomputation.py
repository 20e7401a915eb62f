"""Blocks that are computed again in the backward pass: the same numbers, less memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.autograd.graph import saved_tensors_hooks

import alibi_flax
import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.small_models import TOKENS

CONFIGS = {
    layers: ALiBiConfig(num_layers=layers, d_model=30, num_heads=5, vocab_size=23)
    for layers in (1, 3)
}
BLOCK_INPUT = TOKENS.size * 30  # numbers


def _torch_run(layers: int, recompute: bool) -> tuple[dict[str, Any], int]:
    """Logits and gradients in training mode, and how many activations the graph keeps."""
    torch.manual_seed(0)
    model = alibi_torch.ALiBiLM(CONFIGS[layers], recompute=recompute)
    weights = {each.data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.from_numpy(TOKENS))
    size = sum(kept.values())
    logits.square().mean().backward()
    found = {name: as_numpy(each.grad) for name, each in model.named_parameters()}
    return found | {"logits": as_numpy(logits.detach())}, size


def test_torch_recomputes_the_same_bits() -> None:
    """Dropout too."""
    (kept, _), (again, _) = (_torch_run(3, recompute) for recompute in (False, True))
    for name, array in kept.items():
        assert_bitwise(again[name], array, name)


def test_torch_keeps_the_inputs_of_blocks_alone() -> None:
    (_, one), (_, three) = (_torch_run(layers, True) for layers in (1, 3))
    assert three - one == 2 * BLOCK_INPUT
    (_, one), (_, three) = (_torch_run(layers, False) for layers in (1, 3))
    assert three - one > 16 * BLOCK_INPUT


def test_torch_keeps_nothing_without_gradients() -> None:
    model = alibi_torch.ALiBiLM(CONFIGS[1], recompute=True).eval()
    with torch.no_grad():
        assert not model(torch.from_numpy(TOKENS)).requires_grad


def _flax_residuals(layers: int, recompute: bool) -> int:
    """How many activations the backward pass is given."""
    model = alibi_flax.ALiBiLM(CONFIGS[layers], recompute=recompute)
    tokens, rngs = jnp.asarray(TOKENS), {"dropout": jax.random.key(1)}
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def pullback(params: Any) -> Any:
        options: Any = {"deterministic": False, "rngs": rngs}
        return jax.vjp(lambda params: model.apply({"params": params}, tokens, **options), params)[1]

    kept = sum(each.size for each in jax.tree.leaves(jax.eval_shape(pullback, params)))
    return kept - sum(each.size for each in jax.tree.leaves(params))


def test_flax_keeps_the_inputs_of_blocks_alone() -> None:
    """Two more layers keep their inputs and little else: keys of dropout, factors of slopes."""
    assert _flax_residuals(3, True) - _flax_residuals(1, True) < 3 * BLOCK_INPUT
    assert _flax_residuals(3, False) - _flax_residuals(1, False) > 16 * BLOCK_INPUT
