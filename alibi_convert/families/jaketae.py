"""State dicts of jaketae/alibi's `ALiBiTransformer` (SPEC.md §7).

The file holds no configuration; shapes and buffers imply all of it but dropout, which does not
change what a trained model computes.
"""

from __future__ import annotations

import re

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Family
from alibi_convert.rules import Rule
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, geometric_slopes

_MATRIX = "(part rows) columns -> part rows columns"
_VECTOR = "(part rows) -> part rows"


def _recognises(tensors: Tensors) -> bool:
    return any(re.fullmatch(r"layers\.\d+\.attn\.kqv\.weight", name) for name in tensors)


def _config(tensors: Tensors) -> ALiBiConfig:
    num_layers = sum(name.endswith(".attn.kqv.weight") for name in tensors)
    num_heads = _shape(tensors, "layers.0.attn.m", axes=3)[0]
    ffn_dim, d_model = _shape(tensors, "layers.0.ffn.fc1.weight", axes=2)
    causal = "layers.0.attn.mask" in tensors
    optional = {"max_len": _shape(tensors, "layers.0.attn.mask", axes=4)[-1]} if causal else {}
    for index in range(num_layers):
        _check_buffers(tensors, f"layers.{index}.attn", num_heads, optional.get("max_len"))
    try:
        return ALiBiConfig.jaketae(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            causal=causal,
            expansion_factor=ffn_dim // d_model,
            **optional,
        )
    except ValueError as error:
        raise CheckpointError(f"shapes that no jaketae/alibi model has: {error}") from None


def _shape(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"a jaketae/alibi state dict without {name}: it may be truncated")
    shape = tensors.shapes[name]
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{name} has shape {list(shape)}; expected {axes} non-empty axes")
    return shape


def _check_buffers(tensors: Tensors, module: str, num_heads: int, max_len: int | None) -> None:
    """The buffers say what the configuration says, so nothing is lost by dropping them."""
    m = f"{module}.m"
    _shape(tensors, m, axes=3)
    expected = geometric_slopes(num_heads)[:, None, None].astype(tensors[m].dtype)
    if not np.array_equal(tensors[m], expected):
        raise CheckpointError(
            f"{m} holds {tensors[m].ravel().tolist()}, not jaketae/alibi's slopes "
            f"{expected.ravel().tolist()}; this is another model"
        )
    if max_len is not None:
        mask = f"{module}.mask"
        _shape(tensors, mask, axes=4)
        if not np.array_equal(tensors[mask], np.tril(np.ones((1, 1, max_len, max_len)))):
            raise CheckpointError(f"{mask} is not a causal mask over {max_len} positions")


def _rules(config: ALiBiConfig) -> tuple[Rule, ...]:
    rules = []
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        projections = tuple(f"{layer}.attn.{name}.weight" for name in ("key", "query", "value"))
        rules.append(Rule(f"{layer}.attn.kqv.weight", projections, _MATRIX))
        for module in ("ffn.fc1", "ffn.fc2", "attn_norm", "ffn_norm"):
            weight, bias = f"{layer}.{module}.weight", f"{layer}.{module}.bias"
            is_norm = module.endswith("norm")
            rules.append(Rule(weight, (weight,), _VECTOR if is_norm else _MATRIX))
            rules.append(Rule(bias, (bias,), _VECTOR))
    return tuple(rules)


def _derived(config: ALiBiConfig) -> dict[str, str]:
    derived = {}
    for index in range(config.num_layers):
        derived[f"layers.{index}.attn.m"] = "slopes: the configuration implies them"
        if config.causal:
            derived[f"layers.{index}.attn.mask"] = "causal mask: the configuration implies it"
    return derived


FAMILY = Family("jaketae", _recognises, _config, _rules, _derived)
