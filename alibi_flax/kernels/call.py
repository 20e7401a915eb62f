"""What a kernel is, and its input: one checked call of `attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int32, Integer, Shaped

from alibi_flax.kernels.dropout import Dropout
from alibi_spec.checks import beyond_windows

HIGHEST = jax.lax.Precision.HIGHEST  # of float32; the default can be bfloat16 or TF32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("query", "key", "value", "slopes", "query_start"),
        *("attention_mask", "segment_ids", "dropout"),
    ),
    meta_fields=("causal", "scale", "tolerance", "distance", "windows"),
)
@dataclass(frozen=True)
class Call:
    """The arguments of `alibi_flax.attention`, which documents them, with heads first.

    Attributes:
        scale: that of the call, or the default.
        query_start: the position of the first query among the keys; of a cache, an array.
        windows: for each head, how many keys its queries are known to need, -1 for all; None if
            that is not known. Devices that divide the positions of a decoder send no others.
    """

    query: Float[Array, "batch heads query_len head_dim"]
    key: Float[Array, "batch kv_heads key_len head_dim"]
    value: Float[Array, "batch kv_heads key_len value_dim"]
    slopes: Float[Array, " heads"]
    causal: bool
    scale: float
    query_start: int | Int32[Array, ""]
    attention_mask: Integer[Array, "batch key_len"] | Bool[Array, "batch key_len"] | None
    segment_ids: Integer[Array, "batch key_len"] | None
    tolerance: str | float
    distance: str
    dropout: Dropout | None
    windows: tuple[int, ...] | None = None

    @property
    def platform(self) -> str:
        """Where it will run: on the query's device, or on the default device of `jit`."""
        if not isinstance(self.query, Tracer) and isinstance(self.query, Array):
            return next(iter(self.query.devices())).platform
        config: Any = jax.config
        device = config.jax_default_device  # a device, the name of a platform, or None
        if device is None:
            return jax.default_backend()
        return device if isinstance(device, str) else device.platform


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    Attributes:
        run: computes a call that is not refused.
        refuses: why a call cannot be computed here, as the rest of a sentence; None if it can.
    """

    run: Callable[[Call], Float[Array, "batch query_len heads value_dim"]]
    refuses: Callable[[Call], str | None]


def refuses_bias(call: Call) -> str | None:
    """The reason why a kernel that computes only -m |i - j| cannot compute a call."""
    return beyond_windows(call.distance, call.causal)


def of_queries(
    x: Shaped[Array, "..."], query_start: int | Int32[Array, ""], query_len: int, axis: int = 1
) -> Shaped[Array, "..."]:
    """The part of an array with an axis of keys that is at the positions of the queries."""
    return jax.lax.dynamic_slice_in_dim(x, query_start, query_len, axis)


def wide_dtype(array: Float[Array, "..."]) -> Any:
    """The dtype of logits, sums and norms: float64 for float64 inputs, else float32."""
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def has_values_on_host(x: Array | np.ndarray) -> bool:
    """Whether the values can be read without waiting for a device."""
    if not isinstance(x, Array):  # of NumPy
        return True
    return (
        not isinstance(x, Tracer)
        and x.is_fully_addressable
        and all(device.platform == "cpu" for device in x.devices())
    )
