"""How far the heads of a model can look, proved only from its weights (SPEC.md §12)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alibi_spec.biases import model_slopes
from alibi_spec.certificate import TOLERANCES, tolerance_of

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

    from alibi_spec.config import ALiBiConfig

_SUMS = 2.0**-24  # rounding of sums: every dtype except float64 is summed in float32


def model_windows(
    config: ALiBiConfig,
    parameters: Mapping[str, Float[np.ndarray, "..."]],
    *,
    tolerance: str | float = "dtype",
    dtype: str = "float32",
) -> Int64[np.ndarray, "layers heads"]:
    """How many keys each head needs for any input, including the query's own; -1 if not provable.

    All keys farther away carry at most `tolerance` of the mass of a query that is not padding.

    Args:
        parameters: the arrays of `parameter_table(config)` by name, torch layout.
        tolerance: as for `attention`.
        dtype: of the model's computation.
    """
    windows = np.full((config.num_layers, config.num_heads), -1, np.int64)
    # Interpolated slopes fall with the length, so windows would grow with it.
    if not config.causal or config.distance == "bfloat16" or config.slope_interpolation is not None:
        return windows
    log_tolerance = _log(tolerance_of(tolerance, dtype))
    fixed = model_slopes(config)
    for layer in range(config.num_layers):
        name = _layer(config, layer) + ".attn"
        slopes = parameters[f"{name}.slopes"] if config.slopes == "learned" else fixed[layer]
        gaps = logit_gaps(config, parameters, layer, dtype)
        for head, (slope, gap) in enumerate(zip(slopes.astype(np.float64), gaps, strict=True)):
            if slope > 0 and math.isfinite(gap) and log_tolerance > -math.inf:
                needed = (gap - log_tolerance - math.log(-math.expm1(-slope))) / slope
                windows[layer, head] = max(1, math.ceil(needed))
    return windows


def logit_gaps(
    config: ALiBiConfig,
    parameters: Mapping[str, Float[np.ndarray, "..."]],
    layer: int,
    dtype: str = "float32",
) -> Float64[np.ndarray, " heads"]:
    """The most by which scale q·k of any key can exceed that of the query's own; or inf."""
    source = _Source.of(config, parameters, layer)
    if source is None:
        return np.full(config.num_heads, np.inf)
    group = config.num_heads // config.kv_heads
    gaps = []
    for head in range(config.num_heads):
        query = _Heads.of(config, parameters, layer, "query", head, source)
        key = _Heads.of(config, parameters, layer, "key", head // group, source)
        gaps.append(_gap(config, query, key, source, dtype))
    return np.array(gaps)


@dataclass(frozen=True)
class _Source:
    """The input of attention: weight ∘ z + shift, with ‖z‖ at most the radius."""

    weight: Float64[np.ndarray, " embed"]
    shift: Float64[np.ndarray, " embed"]
    radius: float

    @classmethod
    def of(
        cls,
        config: ALiBiConfig,
        parameters: Mapping[str, Float[np.ndarray, "..."]],
        layer: int,
    ) -> _Source | None:
        if config.norm_placement != "post":
            norm = f"{_layer(config, layer)}.attn_norm"
        elif layer > 0:
            norm = f"{_layer(config, layer - 1)}.ffn_norm"
        elif config.vocab_size is not None and config.embedding_norm:
            norm = "embedding_norm"
        elif config.vocab_size is not None:
            return cls(*_embeddings(config, parameters))
        else:
            return None
        weight = parameters[f"{norm}.weight"].astype(np.float64)
        shift = parameters.get(f"{norm}.bias", np.zeros(config.d_model)).astype(np.float64)
        return cls(weight, shift, math.sqrt(config.d_model))


def _embeddings(
    config: ALiBiConfig, parameters: Mapping[str, Float[np.ndarray, "..."]]
) -> tuple[Float64[np.ndarray, " embed"], Float64[np.ndarray, " embed"], float]:
    radius = config.embedding_scale * _largest_row(parameters["token_embedding.weight"])
    if config.type_vocab_size is not None:
        radius += _largest_row(parameters["token_type_embedding.weight"])
    return np.ones(config.d_model), np.zeros(config.d_model), radius


def _largest_row(embedding: Float[np.ndarray, "rows embed"]) -> float:
    return float(np.linalg.norm(embedding.astype(np.float64), axis=1).max())


@dataclass(frozen=True)
class _Heads:
    """The queries, or the keys, of one head: centre + matrix z.

    Attributes:
        matrix: None where clipping or a norm follows it.
        spread: largest distance of one of them from the centre.
        norm: largest norm of one of them.
        magnitude: norm of the terms that are summed; rounding is relative to it.
    """

    centre: Float64[np.ndarray, " head_dim"]
    matrix: Float64[np.ndarray, "head_dim embed"] | None
    spread: float
    norm: float
    magnitude: float

    @classmethod
    def of(
        cls,
        config: ALiBiConfig,
        parameters: Mapping[str, Float[np.ndarray, "..."]],
        layer: int,
        name: str,
        head: int,
        source: _Source,
    ) -> _Heads:
        module, width = f"{_layer(config, layer)}.attn.{name}", config.head_dim
        rows = slice(head * width, (head + 1) * width)
        weight = parameters[f"{module}.weight"][rows].astype(np.float64)
        bias = np.zeros(width)
        if config.attention_bias:
            bias = parameters[f"{module}.bias"][rows].astype(np.float64)
        matrix, centre = weight * source.weight, weight @ source.shift + bias
        if not (np.isfinite(matrix).all() and np.isfinite(centre).all()):
            return cls(centre, None, math.inf, math.inf, math.inf)
        terms = np.abs(weight) @ np.abs(source.shift) + np.abs(bias)
        magnitude = float(np.linalg.norm(matrix)) * source.radius + float(np.linalg.norm(terms))
        spread = float(np.linalg.norm(matrix, 2)) * source.radius
        norm = float(np.linalg.norm(centre)) + spread
        if config.qkv_clip is not None:
            most = config.qkv_clip * math.sqrt(width)
            centre, matrix = centre.clip(-config.qkv_clip, config.qkv_clip), None
            spread, norm, magnitude = min(spread, 2 * most), min(norm, most), min(magnitude, most)
        if config.qk_norm:
            norms = f"{module}_norm"
            full = len(parameters[f"{module}.weight"])
            gain = parameters[f"{norms}.weight"][rows].astype(np.float64)
            centre, matrix = np.zeros(width), None
            if f"{norms}.bias" in parameters:
                centre = parameters[f"{norms}.bias"][rows].astype(np.float64)
            spread = float(np.abs(gain).max()) * math.sqrt(full)
            norm = magnitude = float(np.linalg.norm(centre)) + spread
        return cls(centre, matrix, spread, norm, magnitude)


def _gap(config: ALiBiConfig, query: _Heads, key: _Heads, source: _Source, dtype: str) -> float:
    """B of SPEC.md §12, plus the largest effect of rounding."""
    exact = query.norm * 2 * key.spread
    if config.qkv_clip is not None:
        exact = min(exact, query.norm * 2 * key.norm)
    if query.matrix is not None and key.matrix is not None:
        product = _spectral_norm_of_product(query.matrix, key.matrix)
        turned = float(np.linalg.norm(key.matrix.T @ query.centre))
        radius = source.radius
        exact = min(exact, 2 * radius**2 * product + 2 * radius * turned)
    sums = 2.0**-53 if dtype == "float64" else _SUMS
    relative = (config.d_model + 16) * sums + 4 * TOLERANCES[dtype]
    query_error, key_error = relative * query.magnitude, relative * key.magnitude
    query_norm, key_norm = query.norm + query_error, key.norm + key_error
    rounding = query_error * 2 * key_norm + query_norm * 2 * key_error
    rounding += 2 * (config.head_dim + 8) * sums * query_norm * key_norm
    return config.scale * (exact + rounding)


def _spectral_norm_of_product(
    first: Float64[np.ndarray, "head_dim embed"], second: Float64[np.ndarray, "head_dim embed"]
) -> float:
    """‖firstᵀ second‖₂, of matrices no larger than head_dim."""
    left, right = (np.linalg.qr(each.T)[1] for each in (first, second))
    return float(np.linalg.norm(left @ right.T, 2))


def _layer(config: ALiBiConfig, layer: int) -> str:
    prefix = "" if config.vocab_size is None else "transformer."
    return f"{prefix}layers.{layer}"


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
