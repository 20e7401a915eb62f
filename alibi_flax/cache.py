"""Keys and values of the positions that a model has read (SPEC.md §10).

A model called with a cache returns another cache, which also holds the new positions. Both have the
shape of `capacity` positions, so that one program serves every step; donate the old one to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int32, Integer

from alibi_flax.dispatch import attention
from alibi_flax.kernels import decode
from alibi_spec import ALiBiConfig
from alibi_spec.checks import (
    OTHER_CACHE,
    USED_CACHE,
    check_cache,
    check_cache_dtype,
    check_capacity,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "visible", "length", "interpolated_len"),
    meta_fields=("config",),
)
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions that a model has read; created by `empty`.

    Attributes:
        config: of the model.
        keys, values: of every layer, as attention takes them, but heads first: a step reads them
            head by head. Positions from `length` on are unused.
        visible: False for padding, and from `length` on.
        length: positions that were read, padding included: the next query stands there.
        interpolated_len: number of keys for interpolated slopes; None is `length`.
    """

    config: ALiBiConfig
    keys: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]
    values: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]
    visible: Bool[Array, "batch capacity"]
    length: Int32[Array, ""]
    interpolated_len: Int32[Array, ""] | None = None

    @classmethod
    def empty(
        cls, config: ALiBiConfig, batch_size: int, capacity: int, *, dtype: Any = jnp.float32
    ) -> Self:
        """The cache of a model that has read nothing.

        Args:
            config: of the model: an `ALiBiLM`, or the `ALiBiTransformer` in it.
            capacity: the most positions that it can hold, padding included.
            dtype: of the model's computation.

        Raises:
            ValueError: the configuration is an encoder's.
        """
        check_cache(config, batch_size, batch_size)
        shape = (batch_size, config.kv_heads, capacity, config.head_dim)
        keys, values = (
            tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)
        )
        visible = jnp.zeros((batch_size, capacity), jnp.bool_)
        return cls(replace(config, vocab_size=None), keys, values, visible, jnp.int32(0))

    @property
    def capacity(self) -> int:
        """The most positions that it can hold."""
        return self.visible.shape[1]

    @property
    def slope_factor(self) -> float | Float[Array, ""]:
        """The factor on the slopes of the model."""
        limit = self.config.slope_interpolation
        if limit is None:
            return 1.0
        keys = self.length if self.interpolated_len is None else self.interpolated_len
        return limit / jnp.maximum(limit, keys)

    def grown(
        self,
        config: ALiBiConfig,
        shape: tuple[int, int],
        attention_mask: Integer[Array, "batch seq"] | Bool[Array, "batch seq"] | None,
    ) -> Self:
        """A cache that includes new positions, [batch, seq], whose keys and values `attend` writes.

        Raises:
            ValueError: it was donated, belongs to another model or batch, or is full (outside
                `jit`, where its length is known).
        """
        if not isinstance(self.length, Tracer) and self.length.is_deleted():
            raise ValueError(USED_CACHE)
        if config != self.config:
            raise ValueError(OTHER_CACHE)
        check_cache(config, self.visible.shape[0], shape[0])
        check_capacity(0, shape[1], self.capacity)
        if not isinstance(self.length, Tracer):
            check_capacity(int(self.length), shape[1], self.capacity)
        new = jnp.ones(shape, jnp.bool_) if attention_mask is None else attention_mask
        start = (jnp.int32(0), self.length)
        visible = jax.lax.dynamic_update_slice(self.visible, new.astype(jnp.bool_), start)
        return replace(self, visible=visible, length=self.length + shape[1])

    def attend(
        self, layer: int, inputs: Any, implementation: str
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Self]:
        """Store the keys and values of the newest positions, and attend to all.

        Args:
            inputs: of `alibi_flax.attention`, for the newest positions.

        Raises:
            ValueError: a dtype other than the cache's.
        """
        check_cache_dtype(str(self.keys[layer].dtype), str(inputs["key"].dtype))
        new_len, zero = inputs["key"].shape[1], jnp.int32(0)
        start = (zero, zero, self.length - new_len, zero)
        key, value = (
            jax.lax.dynamic_update_slice(kept[layer], inputs[name].swapaxes(1, 2), start)
            for name, kept in (("key", self.keys), ("value", self.values))
        )
        cache = replace(
            self, keys=_with(self.keys, layer, key), values=_with(self.values, layer, value)
        )
        if new_len == 1:
            options: Any = {name: inputs[name] for name in ("query", "slopes", "scale", "distance")}
            options |= {"key": key, "value": value}
            attended = decode.attention(**options, position=self.length - 1, visible=self.visible)
            return attended, cache
        # The newest key moves to the last place, where attention expects the last query. Unused
        # positions move before the oldest key, and are hidden.
        key, value = (self._newest_last(x, 2).swapaxes(1, 2) for x in (key, value))
        mask = self._newest_last(self.visible, 1)
        inputs = inputs | {"key": key, "value": value, "attention_mask": mask}
        return attention(**inputs, implementation=implementation), cache

    def poisoned(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """NaN if more was read than fits: a compiled program cannot raise an error."""
        return jnp.where(self.length > self.capacity, jnp.nan, x)

    def _newest_last(self, x: Array, axis: int) -> Array:
        return jnp.roll(x, self.capacity - self.length, axis)


def _with(values: tuple[Array, ...], index: int, value: Array) -> tuple[Array, ...]:
    return (*values[:index], value, *values[index + 1 :])


def bucket(length: int) -> int:
    """The length that programs are compiled for: the least 2^n or 3·2^n, from 16 on, that fits."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power
