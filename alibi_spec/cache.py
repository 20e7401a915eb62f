"""What a cache of keys and values holds (SPEC.md §10), and for how long (§16)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_spec.checks import check_bounded, check_windows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64, Integer

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


@dataclass(frozen=True)
class Ring:
    """Heads of keys of which a cache holds the same positions: the last `size`.

    Position p is in slot p mod size.
    """

    heads: tuple[int, ...]
    size: int

    def has_lost(self, length: Any, new_len: int) -> Any:
        """Whether the queries of the newest of `length` positions find that earlier keys are gone.

        One query overwrites the oldest key first; those of a chunk see what it overwrites.
        """
        return length - (new_len if new_len > 1 else 0) > self.size


def rings(
    config: ALiBiConfig,
    windows: Int64[np.ndarray, "layers heads"] | None,
    capacity: int | None,
) -> tuple[tuple[Ring, ...], ...]:
    """The rings of each layer, smallest first: heads that need about as many keys share one.

    Args:
        windows: keys that each head of queries needs, -1 for all of them (`model_windows`); None is
            all for every head.
        capacity: the most positions that are read; None is any number.

    Raises:
        ValueError: windows of another shape, or of a model with rounded distances, which depend on
            all keys; or some head needs all keys and there is no capacity.
    """
    if windows is None:
        windows = np.full((config.num_layers, config.num_heads), -1)
    check_windows(np.shape(windows), bool((windows >= 0).any()), config)
    check_bounded(capacity, bool((windows < 0).any()))
    return tuple(_rings_of_layer(row.tolist(), config.kv_heads, capacity) for row in windows)


def _rings_of_layer(windows: list[int], kv_heads: int, capacity: int | None) -> tuple[Ring, ...]:
    group, by_size = len(windows) // kv_heads, defaultdict(list)
    for head in range(kv_heads):
        readers = windows[head * group : (head + 1) * group]
        size = None if min(readers) < 0 else bucket(max(readers))
        by_size[min(each for each in (size, capacity) if each is not None)].append(head)
    return tuple(Ring(tuple(heads), size) for size, heads in sorted(by_size.items()))


def bucket(length: int) -> int:
    """The least 2^n or 3·2^n, from 16 on, that is at least `length`."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power
