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
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.biases import slopes
from alibi_spec.config import ALiBiConfig

if TYPE_CHECKING:
    from jaxtyping import Float

_CONSTANTS = {"zeros": 0.0, "ones": 1.0}


@dataclass(frozen=True)
class Parameter:
    """One parameter in both layouts.

    Attributes:
        name: key in the torch `state_dict` and in every checkpoint folder.
        flax_path: keys from the root of the Flax params tree to the leaf.
        pattern: einops pattern, torch layout -> Flax layout; swap the sides for the way back.
        axis_sizes: size of every axis that the pattern names.
        init: "zeros", "ones", "slopes" (the paper's), or the standard deviation of a normal
            distribution around zero.
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
    def is_wide(self) -> bool:
        """Whether it is float32 or float64 in models of every dtype: slopes are (SPEC.md §2.1)."""
        return self.init == "slopes"

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear map: no bias, norm, embedding or slope."""
        return self.flax_path[-1] == "kernel"

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Names of the axes in the Flax layout, for sharding rules."""
        return tuple(self.pattern.split("->")[1].split())

    @property
    def torch_axes(self) -> tuple[tuple[str, ...], ...]:
        """Names of the axes that each axis of the torch layout holds, the slowest first."""
        groups = re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[0])
        return tuple(tuple(group.strip("()").split()) for group in groups)


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
        "features": config.d_model,  # a second axis of that width
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.ffn_dim,
    }
    optional = {
        "vocab": config.vocab_size,
        "types": config.type_vocab_size,
        "clusters": config.adaptive_cutoffs and len(config.adaptive_cutoffs),
    }
    return sizes | {axis: size for axis, size in optional.items() if size is not None}


def parameter_table(config: ALiBiConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model, once, in the order of the forward pass and of torch.

    `named_parameters()` has a module's own parameters before those of its submodules; by that order
    torch's optimizers number them.

    With `vocab_size` the rows are those of `ALiBiLM`, without it those of `ALiBiTransformer`.
    """
    return tuple(_rows(config))


def stacked_table(config: ALiBiConfig) -> tuple[Parameter, ...]:
    """The table for a scan over layers: one row for each parameter of all layers (SPEC.md §6).

    Its tensors have a first axis "layers". A name has `*` for the number of the layer; in the Flax
    tree they are under "layers".
    """
    rows: dict[str, Parameter] = {}
    for row in parameter_table(config):
        name = re.sub(r"\blayers\.\d+\.", "layers.*.", row.name)
        if name == row.name:
            rows[name] = row
        elif name not in rows:
            path = tuple("layers" if key == "layers_0" else key for key in row.flax_path)
            pattern = " -> ".join(f"layers {side.strip()}" for side in row.pattern.split("->"))
            sizes = row.axis_sizes | {"layers": config.num_layers}
            rows[name] = Parameter(name, path, pattern, sizes, row.init)
    return tuple(rows.values())


def initial_parameters(config: ALiBiConfig, seed: int) -> dict[str, Float[np.ndarray, "..."]]:
    """Fresh parameters by name, float32, in the torch layout: the same for both backends.

    The numbers of a parameter are those of NumPy's Philox4x64-10 with the key (seed, its place in
    the table); those of `init` and `reset_parameters` are the frameworks' own.
    """
    return {
        row.name: initial_parameter(config, row, seed, number)
        for number, row in enumerate(parameter_table(config))
    }


def initial_parameter(
    config: ALiBiConfig, row: Parameter, seed: int, number: int
) -> Float[np.ndarray, "..."]:
    """One of `initial_parameters`: a row of the table, and its place there."""
    if row.init == "slopes":
        return slopes(config.num_heads, config.bias_max)
    if isinstance(row.init, str):
        return np.full(row.shape, _CONSTANTS[row.init], np.float32)
    key = np.array([seed, number], np.uint64)
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(row.shape)
    return (row.init * drawn).astype(np.float32)


def parameter_names(config: ALiBiConfig) -> tuple[str, ...]:
    """The name of every parameter, in the order of the table."""
    return tuple(row.name for row in _rows(config))


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

    def norm(module: str, pattern: str = "embed -> embed") -> Iterator[Parameter]:
        yield row(module, "weight", pattern, "ones")
        if config.norm_bias:
            yield row(module, "bias", pattern, "zeros")

    def linear(
        module: str, pattern: str, has_bias: bool, init: float = config.init_std
    ) -> Iterator[Parameter]:
        """The weight, and the bias, which has only the output's axes: the pattern's first group."""
        yield row(module, "weight", pattern, init)
        if has_bias:
            output = re.findall(r"\([^)]*\)|\w+", pattern)[0]
            yield row(module, "bias", f"{output} -> {output.strip('()')}", "zeros")

    if config.vocab_size is not None:
        if config.head == "masked_lm":
            yield Parameter("head_bias", ("head_bias",), "vocab -> vocab", sizes, "zeros")
        yield row("token_embedding", "weight", "vocab embed -> vocab embed", config.init_std)
        if config.type_vocab_size is not None:
            pattern = "types embed -> types embed"
            yield row("token_type_embedding", "weight", pattern, config.init_std)
        if config.embedding_norm:
            yield from norm("embedding_norm")
    for index in range(config.num_layers):
        layer = f"{prefix}layers.{index}"
        yield from norm(f"{layer}.attn_norm")
        if config.slopes == "learned":
            yield row(f"{layer}.attn", "slopes", "heads -> heads", "slopes")
        for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
            pattern = f"({heads} head_dim) embed -> embed {heads} head_dim"
            yield from linear(f"{layer}.attn.{name}", pattern, config.attention_bias)
        if config.qk_norm:
            yield from norm(f"{layer}.attn.query_norm", "(heads head_dim) -> heads head_dim")
            yield from norm(f"{layer}.attn.key_norm", "(kv_heads head_dim) -> kv_heads head_dim")
        if config.output_projection:
            yield from linear(
                f"{layer}.attn.output",
                "embed (heads head_dim) -> heads head_dim embed",
                config.attention_bias,
                config.residual_init_std,
            )
        if config.attention_output_norm:
            yield from norm(f"{layer}.attn_output_norm")
        yield from norm(f"{layer}.ffn_norm")
        if config.gated_ffn:
            yield from linear(f"{layer}.ffn.gate", "mlp embed -> embed mlp", config.ffn_bias)
        yield from linear(f"{layer}.ffn.fc1", "mlp embed -> embed mlp", config.ffn_bias)
        yield from linear(
            f"{layer}.ffn.fc2", "embed mlp -> mlp embed", config.ffn_bias, config.residual_init_std
        )
    if config.final_norm:
        yield from norm(f"{prefix}final_norm")
    if config.vocab_size is None or config.head == "none":
        return
    if config.head == "masked_lm":
        yield from linear("head_transform", "features embed -> embed features", has_bias=True)
        yield from norm("head_norm")
    if not config.tie_embeddings:
        yield row("lm_head", "weight", "vocab embed -> embed vocab", config.init_std)
    if config.adaptive_cutoffs is not None:
        pattern = "clusters embed -> embed clusters"
        yield row("cluster_head", "weight", pattern, config.init_std)
