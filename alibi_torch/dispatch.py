"""The public functions of attention: they check a call and choose a kernel."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from alibi_spec.biases import default_scale
from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.checks import (
    RefusalError,
    beyond_windows,
    check_attention,
    check_attention_options,
    check_count,
    check_devices,
    check_mask,
    check_slopes,
    warning_of_dense_dropout,
)
from alibi_torch.kernels import KERNELS, certificate, dense, neighbours
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.certificate import AttentionPlan
from alibi_torch.kernels.dropout import drawn_dropout
from alibi_torch.kernels.finite import has_values_on_host
from alibi_torch.positions import Positions


def attention(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    value: Float[Tensor, "batch kv_heads key_len value_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None = None,
    segment_ids: Integer[Tensor, "batch key_len"] | None = None,
    tolerance: str | float = "dtype",
    implementation: str = "auto",
    distance: str = "absolute",
    dropout: float = 0.0,
    dropout_rng: torch.Generator | None = None,
) -> Float[Tensor, "batch heads query_len value_dim"]:
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
            in reverse mode; "dense" has second ones and those in forward mode (jvp), too.
        distance: "absolute", "signed" for m (j - i) on both sides (jaketae/alibi encoders), or
            "bfloat16" for the rounded bias of Falcon-RW (SPEC.md §2.3).
        dropout: rate on the probabilities (SPEC.md §4.1).
        dropout_rng: generator for the seed of dropout; None is torch's own, which
            torch.utils.checkpoint restores when it recomputes a call.

    Returns:
        The attended values, in the dtype of `value`; logits and softmax are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: shapes that do not fit, arrays on several devices, slopes that are not finite
            (on the CPU), an unknown option, or an implementation that cannot compute this call,
            with the reason.
    """
    return attention_within(
        *(None, None, query, key, value, slopes),
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
    positions: Positions | None,
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    value: Float[Tensor, "batch kv_heads key_len value_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    causal: bool,
    scale: float | None,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None,
    segment_ids: Integer[Tensor, "batch key_len"] | None,
    implementation: str,
    distance: str,
    dropout: float,
    dropout_rng: torch.Generator | None = None,
    tolerance: str | float = "dtype",
) -> Float[Tensor, "batch heads query_len value_dim"]:
    """`attention` among all positions, of which the arrays are this device's; None: these are all.

    Heads are known to need no more keys than `windows`, -1 for all; None if that is not known.
    Devices that divide the positions of a decoder send no others (SPEC.md §19).
    """
    call = _checked_call(
        *(query, key, value, slopes, causal, scale, attention_mask, segment_ids),
        *(tolerance, distance),
    )
    check_attention_options(tolerance, dropout, implementation, attention_implementations())
    if dropout > 0:
        start, key_len = call.query_start, key.shape[2]
        if positions is not None:
            start, key_len = positions.number * key_len, positions.count * key_len
        drawn = drawn_dropout(dropout, dropout_rng, query, start, key_len)
        call = replace(call, dropout=drawn)

    if positions is None:
        return KERNELS[_chosen(call, implementation)].run(call)
    if implementation == "dense" or not causal or beyond_windows(distance, causal) is not None:
        windows = None  # which hold for neither

    def attend_here(call: Call) -> Float[Tensor, "batch some query_len value_dim"]:
        return KERNELS[_chosen(call, implementation)].run(call)

    return neighbours.attend(attend_here, call, positions, windows)


def biased_logits(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None = None,
    segment_ids: Integer[Tensor, "batch key_len"] | None = None,
    distance: str = "absolute",
) -> Float[Tensor, "batch heads query_len key_len"]:
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
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch kv_heads key_len head_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Integer[Tensor, "batch key_len"] | Bool[Tensor, "batch key_len"] | None = None,
    segment_ids: Integer[Tensor, "batch key_len"] | None = None,
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
    with torch.no_grad():
        return certificate.attention_plan(call, block_size)


def _chosen(call: Call, implementation: str) -> str:
    """The named implementation; for "auto" the first that is able, or "dense" for a small call."""
    batch, heads, query_len, _ = call.query.shape
    # An empty call has no blocks.
    if any(_is_known(size == 0) for size in (batch, heads, query_len)):
        return "dense"
    if implementation == "auto":
        # A program exported for any length must not be dense: its cost would be quadratic.
        if _is_known(query_len * call.key.shape[2] < dense.PAYS_BELOW):
            return "dense"
        name = next(name for name, kernel in KERNELS.items() if kernel.refuses(call) is None)
        if name == "dense" and call.dropout is not None and not torch.compiler.is_compiling():
            text = warning_of_dense_dropout(call.distance, call.causal)
            warnings.warn(text, stacklevel=4)  # Python shows it once per calling line
        return name
    reason = KERNELS[implementation].refuses(call)
    if reason is not None:
        able = [name for name, kernel in KERNELS.items() if kernel.refuses(call) is None]
        raise RefusalError(implementation, reason, able)
    return implementation


def _is_known(fact: bool) -> bool:
    """Whether it holds; while exporting, only for all shapes: no condition on them is added."""
    return statically_known_true(fact) if torch.compiler.is_exporting() else bool(fact)


def _checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    slopes: Tensor,
    causal: bool,
    scale: float | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    tolerance: str | float,
    distance: str,
) -> Call:
    """The call that these arguments make, without dropout. Logits and plans need no value."""
    arrays = [query, key] if value is None else [query, key, value]
    check_attention(
        *(query.shape, key.shape, None if value is None else value.shape, slopes.shape),
        [str(array.dtype) for array in arrays],
        distance,
        scale,
    )
    named = {"query": query, "key": key, "value": value, "slopes": slopes}
    named |= {"attention_mask": attention_mask, "segment_ids": segment_ids}
    check_devices({name: str(x.device) for name, x in named.items() if x is not None})
    if has_values_on_host(slopes):
        check_slopes(bool(slopes.isfinite().all()))
    for name, mask in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if mask is not None:
            is_integer = not mask.is_floating_point()
            check_mask(name, mask.shape, is_integer, query.shape[0], key.shape[2])
    return Call(
        *(query, key, key if value is None else value, slopes),
        causal=causal,
        scale=default_scale(scale, query.shape[-1]),
        query_start=key.shape[2] - query.shape[2],  # the last query stands at the last key
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        tolerance=tolerance,
        distance=distance,
        dropout=None,
    )
