"""State dicts of jaketae/alibi's `ALiBiTransformer` (SPEC.md §7).

The file holds no configuration; shapes and buffers imply all of it but dropout, which does not
change what a trained model computes.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Derived, Family, Source
from alibi_convert.rules import Row
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, geometric_slopes

_ROWS = (
    Row("layers.{i}.attn.kqv.weight", "layers.{i}.attn.{key,query,value}.weight"),
    Row("layers.{i}.ffn.fc1.weight", "layers.{i}.ffn.fc1.weight"),
    Row("layers.{i}.ffn.fc1.bias", "layers.{i}.ffn.fc1.bias"),
    Row("layers.{i}.ffn.fc2.weight", "layers.{i}.ffn.fc2.weight"),
    Row("layers.{i}.ffn.fc2.bias", "layers.{i}.ffn.fc2.bias"),
    Row("layers.{i}.attn_norm.weight", "layers.{i}.attn_norm.weight"),
    Row("layers.{i}.attn_norm.bias", "layers.{i}.attn_norm.bias"),
    Row("layers.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
    Row("layers.{i}.ffn_norm.bias", "layers.{i}.ffn_norm.bias"),
)
# The options of jaketae/alibi's own configuration.
_OWN_FIELDS = (
    "num_layers",
    "d_model",
    "num_heads",
    "max_len",
    "dropout",
    "causal",
    "expansion_factor",
)


def _recognises(source: Source) -> bool:
    pattern = r"layers\.\d+\.attn\.kqv\.weight"
    return source.config is None and any(re.fullmatch(pattern, name) for name in source.tensors)


def _config(source: Source) -> ALiBiConfig:
    tensors = source.tensors
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


def _derived(config: ALiBiConfig) -> tuple[Derived, ...]:
    slopes = Derived(r"layers\.\d+\.attn\.m", "slopes: the configuration implies them")
    mask = Derived(r"layers\.\d+\.attn\.mask", "causal mask: the configuration implies it")
    return (slopes, mask) if config.causal else (slopes,)


def _write_config(config: ALiBiConfig) -> dict[str, Any]:
    """Nothing, as the file holds no configuration; but the model must be one of jaketae/alibi's."""
    own = {name: getattr(config, name) for name in _OWN_FIELDS}
    theirs = ALiBiConfig.jaketae(**own)
    for name, value in dataclasses.asdict(config).items():
        wanted = getattr(theirs, name)
        if value != wanted and name != "init_std":
            raise CheckpointError(
                f"jaketae cannot express {name}={value!r}; this model would need {wanted!r}"
            )
    return {}


def _buffers(config: ALiBiConfig) -> dict[str, np.ndarray]:
    """Slopes and causal masks, which jaketae/alibi keeps in every layer."""
    buffers = {"m": geometric_slopes(config.num_heads)[:, None, None]}
    if config.causal:
        buffers["mask"] = np.tril(np.ones((1, 1, config.max_len, config.max_len), np.float32))
    return {
        f"layers.{index}.attn.{name}": array
        for index in range(config.num_layers)
        for name, array in buffers.items()
    }


FAMILY = Family(
    "jaketae",
    _recognises,
    _config,
    _ROWS,
    derived=_derived,
    write_config=_write_config,
    label="state dict of jaketae/alibi, pickled",
    suffix=".pt",
    generated=_buffers,
)
