"""The one table of parameters: names, shapes, layouts, axes and initialisers (SPEC.md §6).

Every layout is one einops pattern from the torch layout to the Flax layout. Its axis names are at
once the keys of `axis_sizes` and, read on the Flax side, the logical axes for sharding, so that
shapes, the inverse and the sharding all follow from the pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from alibi_spec.config import ALiBiConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter in both layouts.

    Attributes:
        name: key in the torch `state_dict` and in every checkpoint folder.
        flax_path: keys from the root of the Flax params tree to the leaf.
        pattern: einops pattern, torch layout -> Flax layout; swap the sides for the way back.
        axis_sizes: size of every axis that the pattern names.
        init: "zeros", "ones", or the standard deviation of a normal distribution around zero.
    """

    name: str
    flax_path: tuple[str, ...]
    pattern: str
    axis_sizes: dict[str, int]
    init: str | float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the torch layout."""
        return pattern_shape(self.pattern.split("->")[0], self.axis_sizes)

    @property
    def flax_shape(self) -> tuple[int, ...]:
        """Shape in the Flax layout."""
        return pattern_shape(self.pattern.split("->")[1], self.axis_sizes)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Names of the axes in the Flax layout, for sharding rules."""
        return tuple(self.pattern.split("->")[1].split())


def pattern_shape(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape of an array with one side of an einops pattern, e.g. "(heads head_dim) embed"."""
    return tuple(
        math.prod(sizes[axis] for axis in group.strip("()").split())
        for group in re.findall(r"\([^)]*\)|\w+", side)
    )


def axis_sizes(config: ALiBiConfig) -> dict[str, int]:
    """Size of every logical axis."""
    sizes = {
        "embed": config.d_model,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "mlp": config.ffn_dim,
    }
    if config.vocab_size is not None:
        sizes["vocab"] = config.vocab_size
    return sizes


def parameter_table(config: ALiBiConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model, once, in the order of the forward pass.

    With `vocab_size` the rows are those of `ALiBiLM`, without it those of `ALiBiTransformer`.
    """
    return tuple(_rows(config))


def _rows(config: ALiBiConfig) -> Iterator[Parameter]:
    sizes = axis_sizes(config)
    prefix = "" if config.vocab_size is None else "transformer."

    def row(module: str, leaf: str, pattern: str, init: str | float) -> Parameter:
        path = re.sub(r"layers\.(\d+)", r"layers_\1", module).split(".")
        flax_leaf = leaf
        if leaf == "weight":
            is_norm, is_embedding = module.endswith("norm"), module.endswith("embedding")
            flax_leaf = "scale" if is_norm else "embedding" if is_embedding else "kernel"
        return Parameter(f"{module}.{leaf}", (*path, flax_leaf), pattern, sizes, init)

    def norm(module: str) -> Iterator[Parameter]:
        yield row(module, "weight", "embed -> embed", "ones")
        yield row(module, "bias", "embed -> embed", "zeros")

    if config.vocab_size is not None:
        yield row("token_embedding", "weight", "vocab embed -> vocab embed", config.init_std)
    for index in range(config.num_layers):
        layer = f"{prefix}layers.{index}"
        yield from norm(f"{layer}.attn_norm")
        for projection in ("query", "key", "value"):
            module = f"{layer}.attn.{projection}"
            pattern = "(heads head_dim) embed -> embed heads head_dim"
            yield row(module, "weight", pattern, config.init_std)
            if config.attention_bias:
                yield row(module, "bias", "(heads head_dim) -> heads head_dim", "zeros")
        if config.output_projection:
            module = f"{layer}.attn.output"
            pattern = "embed (heads head_dim) -> heads head_dim embed"
            yield row(module, "weight", pattern, config.residual_init_std)
            if config.attention_bias:
                yield row(module, "bias", "embed -> embed", "zeros")
        yield from norm(f"{layer}.ffn_norm")
        yield row(f"{layer}.ffn.fc1", "weight", "mlp embed -> embed mlp", config.init_std)
        yield row(f"{layer}.ffn.fc1", "bias", "mlp -> mlp", "zeros")
        yield row(f"{layer}.ffn.fc2", "weight", "embed mlp -> mlp embed", config.residual_init_std)
        yield row(f"{layer}.ffn.fc2", "bias", "embed -> embed", "zeros")
    if config.final_norm:
        yield from norm(f"{prefix}final_norm")
    if config.vocab_size is not None and not config.tie_embeddings:
        yield row("lm_head", "weight", "vocab embed -> embed vocab", config.init_std)
