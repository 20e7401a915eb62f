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
    shapes = tensors.shapes
    needed = ("layers.0.attn.m", "layers.0.attn.kqv.weight", "layers.0.ffn.fc1.weight")
    for name in needed:
        if name not in shapes:
            raise CheckpointError(f"a jaketae/alibi state dict without {name}: it may be truncated")
    num_heads = shapes["layers.0.attn.m"][0]
    ffn_dim, d_model = shapes["layers.0.ffn.fc1.weight"]
    _check_slopes(tensors["layers.0.attn.m"], num_heads)
    mask = shapes.get("layers.0.attn.mask")
    optional = {} if mask is None else {"max_len": mask[-1]}
    try:
        return ALiBiConfig.jaketae(
            num_layers=len([name for name in shapes if name.endswith(".attn.kqv.weight")]),
            d_model=d_model,
            num_heads=num_heads,
            causal=mask is not None,
            expansion_factor=ffn_dim // d_model,
            **optional,
        )
    except ValueError as error:
        raise CheckpointError(f"shapes that no jaketae/alibi model has: {error}") from None


def _check_slopes(m: np.ndarray, num_heads: int) -> None:
    expected = geometric_slopes(num_heads).astype(m.dtype)
    if not np.array_equal(m.ravel(), expected):
        raise CheckpointError(
            f"layers.0.attn.m holds {m.ravel().tolist()}, not jaketae/alibi's slopes "
            f"{expected.tolist()}; this is another model"
        )


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
