"""Keys and values of the positions that a model has read (SPEC.md §10).

A model called with a cache returns another cache, which also holds the new positions. Memory is
allocated once, for `capacity` positions, when the first keys show dtype and device; the later
caches share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from alibi_spec import ALiBiConfig
from alibi_spec.biases import interpolation
from alibi_spec.checks import (
    OTHER_CACHE,
    USED_CACHE,
    check_cache,
    check_cache_dtype,
    check_capacity,
)
from alibi_torch.dispatch import attention
from alibi_torch.kernels import decode
from alibi_torch.kernels.call import Call


@dataclass
class KVCache:
    """Keys and values of the positions that a model has read; created by `empty`.

    Attributes:
        config: of the model.
        capacity: the most positions that it can hold.
        keys, values: by layer, [batch, kv_heads, capacity, head_dim], as attention takes them;
            positions from `length` on are unused.
        visible: False for padding; None where there is none.
        length: positions that were read, padding included: the next query stands there.
        interpolated_len: number of keys for interpolated slopes; None is `length`.
    """

    config: ALiBiConfig
    batch_size: int
    capacity: int
    keys: dict[int, Float[Tensor, "batch kv_heads capacity head_dim"]] = field(repr=False)
    values: dict[int, Float[Tensor, "batch kv_heads capacity head_dim"]] = field(repr=False)
    visible: Bool[Tensor, "batch capacity"] | None = None
    length: int = 0
    interpolated_len: int | None = None
    _is_used: bool = field(default=False, repr=False)

    @classmethod
    def empty(cls, config: ALiBiConfig, batch_size: int, capacity: int) -> Self:
        """The cache of a model that has read nothing.

        Args:
            config: of the model: an `ALiBiLM`, or the `ALiBiTransformer` in it.
            capacity: the most positions that it can hold, padding included.

        Raises:
            ValueError: the configuration is an encoder's.
        """
        check_cache(config, batch_size, batch_size)
        return cls(replace(config, vocab_size=None), batch_size, capacity, {}, {})

    @property
    def slope_factor(self) -> float:
        """The factor on the slopes of the model."""
        return interpolation(self.config, self.interpolated_len or self.length)

    def grown(
        self,
        config: ALiBiConfig,
        shape: tuple[int, int],
        attention_mask: Integer[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
    ) -> Self:
        """A cache that includes new positions, [batch, seq], whose keys and values `attend` writes.

        Raises:
            ValueError: it was already used, belongs to another model or batch, or is full.
        """
        batch, new_len = shape
        if self._is_used:
            raise ValueError(USED_CACHE)
        if config != self.config:
            raise ValueError(OTHER_CACHE)
        check_cache(config, self.batch_size, batch)
        check_capacity(self.length, new_len, self.capacity)
        end, visible = self.length + new_len, self.visible
        if attention_mask is not None:
            if visible is None:
                visible = attention_mask.new_ones((batch, self.capacity), dtype=torch.bool)
            visible[:, self.length : end] = attention_mask
        self._is_used = True
        return replace(self, length=end, visible=visible, _is_used=False)

    def attend(
        self, layer: int, inputs: Any, implementation: str
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Store the keys and values of the newest positions, and attend to all.

        Args:
            inputs: of `alibi_torch.attention`, for the newest positions.

        Raises:
            ValueError: a dtype other than the cache's, or keys that require gradients.
        """
        if inputs["key"].requires_grad:
            raise ValueError("a cache keeps no gradients; call the model under torch.no_grad()")
        key, value = (
            self._with_newest(kept, layer, inputs[name])
            for name, kept in (("key", self.keys), ("value", self.values))
        )
        mask = None if self.visible is None else self.visible[:, : self.length]
        inputs = inputs | {"key": key, "value": value, "attention_mask": mask}
        if inputs["query"].shape[2] > 1:
            return attention(**inputs, implementation=implementation)
        rest = {"segment_ids": None, "tolerance": 0.0, "dropout": None}
        return decode.attention(Call(**inputs, query_start=self.length - 1, **rest))

    def _with_newest(
        self,
        kept: dict[int, Float[Tensor, "batch kv_heads capacity head_dim"]],
        layer: int,
        newest: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> Float[Tensor, "batch kv_heads length head_dim"]:
        batch, heads, new_len, width = newest.shape
        if layer not in kept:
            kept[layer] = newest.new_empty((batch, heads, self.capacity, width))
        check_cache_dtype(str(kept[layer].dtype), str(newest.dtype))
        kept[layer][:, :, self.length - new_len : self.length] = newest
        return kept[layer][:, :, : self.length]
