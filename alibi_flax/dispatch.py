"""The public functions of attention: they check a call and choose a kernel."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim
from jaxtyping import Bool, Float, Int32, Integer, Key

from alibi_flax.kernels import KERNELS, certificate, dense
from alibi_flax.kernels.call import Call, has_values_on_host
from alibi_flax.kernels.certificate import AttentionPlan
from alibi_flax.kernels.dropout import drawn_dropout
from alibi_spec.biases import default_scale
from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.checks import (
    RefusalError,
    check_attention,
    check_attention_options,
    check_count,
    check_mask,
    check_slopes,
    warning_of_dense_dropout,
)

_WARNING_OF_SYMBOLIC_LENGTHS = (
    "dense attention computes symbolic lengths: the exported program costs the square of the "
    "length; export one program for each length, with shapes that are numbers, and the cost grows "
    "linearly"
)


def attention(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    value: Float[Array, "batch key_len kv_heads value_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None = None,
    segment_ids: Integer[Array, "batch key_len"] | None = None,
    tolerance: str | float = "dtype",
    implementation: str = "auto",
    distance: str = "absolute",
    dropout: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
) -> Float[Array, "batch query_len heads value_dim"]:
    """Attention with linear biases (Press et al. 2021; SPEC.md §3-§4).

    softmax over j of scale · q_i·k_j - m |i - j|, times v. With fewer queries than keys the last
    query stands at the last key, as in cached decoding. A query that sees no key gives zeros.

    Args:
        query: of the dtype of key and value: float16, bfloat16, float32 or float64.
        key: each of its heads serves heads / kv_heads consecutive heads of query.
        value: with the heads of key.
        slopes: m for each head, float32; finite.
        causal: queries see no later keys.
        scale: factor on q·k; None is 1/sqrt(head_dim).
        attention_mask: 0 hides a key (padding on either side).
        segment_ids: queries see keys of their own segment only (packed sequences).
        tolerance: share of a query's mass that an implementation may skip; "dtype" is half
            an ulp of the dtype, 0 skips none, and implementation="dense" skips nothing.
        implementation: "auto" or one of `attention_implementations()`. All have first derivatives
            in reverse mode; "dense" has second ones and those in forward mode (jvp), too. For a
            symbolic length of `jax.export`, "auto" is "dense", the only able one.
        distance: "absolute", "signed" for m (j - i) on both sides (jaketae/alibi encoders), or
            "bfloat16" for the rounded bias of Falcon-RW (SPEC.md §2.3).
        dropout: rate on the probabilities (SPEC.md §4.1).
        dropout_rng: key for the seed of dropout; required when `dropout` is above 0.

    Returns:
        The attended values, in the dtype of `value`; logits and softmax are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: shapes that do not fit, slopes that are not finite (on the CPU, outside of
            `jit`), an unknown option, or an implementation that cannot compute this call, with the
            reason.
    """
    return attention_within(
        *(None, query, key, value, slopes),
        causal=causal,
        scale=scale,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        tolerance=tolerance,
        implementation=implementation,
        distance=distance,
        dropout=dropout,
        dropout_rng=dropout_rng,
    )


def attention_within(
    windows: tuple[int, ...] | None,
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    value: Float[Array, "batch key_len kv_heads value_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool,
    scale: float | None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None,
    segment_ids: Integer[Array, "batch key_len"] | None = None,
    implementation: str,
    distance: str,
    dropout: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
    tolerance: str | float = "dtype",
    query_start: int | Int32[Array, ""] | None = None,
) -> Float[Array, "batch query_len heads value_dim"]:
    """`attention`, with what `Call` says of windows and of the first query's position."""
    call = _checked_call(
        *(query, key, value, slopes, causal, scale, attention_mask, segment_ids),
        *(tolerance, distance, query_start),
    )
    call = replace(call, windows=windows)
    check_attention_options(tolerance, dropout, implementation, attention_implementations())
    if dropout > 0:
        if dropout_rng is None:
            raise ValueError(f"dropout={dropout} needs dropout_rng; pass jax.random.key(seed)")
        drawn = drawn_dropout(
            *(dropout, dropout_rng, call.query, call.query_start, call.key.shape[2])
        )
        call = replace(call, dropout=drawn)
    return KERNELS[_chosen(call, implementation)].run(call)


def biased_logits(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None = None,
    segment_ids: Integer[Array, "batch key_len"] | None = None,
    distance: str = "absolute",
) -> Float[Array, "batch heads query_len key_len"]:
    """The logits of `attention` before its softmax: float32 (float64), -inf where masked.

    Arguments and errors are those of `attention`.
    """
    return dense.biased_logits(
        _checked_call(
            *(query, key, None, slopes, causal, scale, attention_mask, segment_ids),
            *("dtype", distance),
        )
    )


def attention_implementations() -> tuple[str, ...]:
    """Names that `attention` accepts as `implementation`, apart from "auto"."""
    return tuple(KERNELS)


def attention_plan(
    query: Float[Array, "batch query_len heads head_dim"],
    key: Float[Array, "batch key_len kv_heads head_dim"],
    slopes: Float[Array, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None = None,
    segment_ids: Integer[Array, "batch key_len"] | None = None,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> AttentionPlan:
    """Which blocks of keys `attention` needs, and their share of all blocks (SPEC.md §9).

    Arguments and errors are those of `attention`, with distances as in "absolute".

    Args:
        block_size: positions in a block, of queries and of keys.
    """
    call = _checked_call(
        *(query, key, None, slopes, causal, scale, attention_mask, segment_ids),
        *(tolerance, "absolute"),
    )
    check_attention_options(tolerance, 0.0, "auto", attention_implementations())
    check_count("block_size", block_size)
    return certificate.attention_plan(call, block_size)


def _chosen(call: Call, implementation: str) -> str:
    """The named implementation; for "auto" the first that is able, or "dense" for a small call."""
    if 0 in call.query.shape[:3]:  # an empty call has no blocks
        return "dense"
    query_len, key_len = call.query.shape[2], call.key.shape[2]
    is_symbolic = is_symbolic_dim(query_len) or is_symbolic_dim(key_len)
    if implementation == "auto":
        if is_symbolic:
            warnings.warn(_WARNING_OF_SYMBOLIC_LENGTHS, stacklevel=3)
            return "dense"
        if query_len * key_len < dense.PAYS_BELOW:
            return "dense"
        name = next(name for name, kernel in KERNELS.items() if kernel.refuses(call) is None)
        if name == "dense" and call.dropout is not None:
            text = warning_of_dense_dropout(call.distance, call.causal)
            warnings.warn(text, stacklevel=3)  # Python shows it once per calling line
        return name
    if is_symbolic and implementation != "dense":
        raise ValueError(
            f"implementation={implementation!r} needs lengths that are numbers; this call has "
            f"{query_len} queries and {key_len} keys; use 'dense', or export one program per length"
        )
    reason = KERNELS[implementation].refuses(call)
    if reason is not None:
        able = [name for name, kernel in KERNELS.items() if kernel.refuses(call) is None]
        raise RefusalError(implementation, reason, able)
    return implementation


def _checked_call(
    query: Array,
    key: Array,
    value: Array | None,
    slopes: Array,
    causal: bool,
    scale: float | None,
    attention_mask: Array | None,
    segment_ids: Array | None,
    tolerance: str | float,
    distance: str,
    query_start: int | Int32[Array, ""] | None = None,
) -> Call:
    """The call that these arguments make, without dropout. Logits and plans need no value."""
    arrays = [query, key] if value is None else [query, key, value]
    shapes = [_heads_first(array) for array in arrays]
    check_attention(
        *(shapes[0], shapes[1], None if value is None else shapes[2]),
        *(slopes.shape, [str(array.dtype) for array in arrays], distance, scale),
    )
    if has_values_on_host(slopes):
        check_slopes(bool(np.isfinite(slopes).all()))
    for name, mask in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if mask is not None:
            is_integer = not jnp.issubdtype(mask.dtype, jnp.floating)
            check_mask(name, mask.shape, is_integer, query.shape[0], key.shape[1])
    # XLA leaves out the exchange of axes where keys come from a cache: it holds them heads first.
    query, key, *values = (array.swapaxes(1, 2) for array in arrays)
    if query_start is None:
        query_start = key.shape[2] - query.shape[2]  # the last query stands at the last key
    return Call(
        *(query, key, values[0] if values else key, slopes),
        causal=causal,
        scale=default_scale(scale, query.shape[-1]),
        query_start=query_start,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        tolerance=tolerance,
        distance=distance,
        dropout=None,
    )


def _heads_first(array: Array) -> tuple[int, ...]:
    """The shape in the order of axes of `check_attention`."""
    if array.ndim != 4:
        return array.shape
    batch, seq, heads, head_dim = array.shape
    return (batch, heads, seq, head_dim)
