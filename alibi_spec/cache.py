"""The reference model's cache of keys and values (SPEC.md §10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Integer

    from alibi_spec.config import ALiBiConfig

    _KeysOrValues = Float64[np.ndarray, "batch kv_heads length head_dim"]


@dataclass(frozen=True)
class Cache:
    """Keys and values of the positions that the reference model has read.

    Attributes:
        keys, values: of every layer, as attention takes them: after clipping and `qk_norm`.
        visible: False for padding.
    """

    keys: tuple[_KeysOrValues, ...]
    values: tuple[_KeysOrValues, ...]
    visible: Bool[np.ndarray, "batch length"]

    @classmethod
    def empty(cls, config: ALiBiConfig, batch_size: int) -> Cache:
        """The cache of a model that has read nothing."""
        nothing = np.zeros((batch_size, config.kv_heads, 0, config.head_dim))
        layers = (nothing,) * config.num_layers
        return cls(layers, layers, np.zeros((batch_size, 0), bool))

    @property
    def length(self) -> int:
        """Positions that were read, padding included: the next query stands there."""
        return self.visible.shape[1]

    def mask(
        self,
        attention_mask: Integer[np.ndarray, "batch seq"] | Bool[np.ndarray, "batch seq"] | None,
        new_len: int,
    ) -> Bool[np.ndarray, "batch key_len"]:
        """Which keys are not padding: those of the cache, then `new_len` new ones."""
        shape = (len(self.visible), new_len)
        new = np.ones(shape, bool) if attention_mask is None else attention_mask != 0
        return np.concatenate([self.visible, new], axis=1)

    def extended(
        self,
        trace: Mapping[str, Float[np.ndarray, "..."]],
        attention_mask: Integer[np.ndarray, "batch seq"]
        | Bool[np.ndarray, "batch seq"]
        | None = None,
    ) -> Cache:
        """The cache after a call of `reference_forward` that returned `trace`."""
        keys, values = (
            tuple(trace[f"layers.{layer}.{name}"] for layer in range(len(self.keys)))
            for name in ("key", "value")
        )
        return Cache(keys, values, self.mask(attention_mask, keys[0].shape[2] - self.length))
