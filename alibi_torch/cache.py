"""Keys and values of the positions that a model has read (SPEC.md §10, §16).

A model called with a cache returns another cache, which also holds the new positions. Memory is
allocated once, when the first keys show dtype and device; the later caches share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from alibi_spec import ALiBiConfig
from alibi_spec.biases import interpolation
from alibi_spec.cache import Ring, rings
from alibi_spec.checks import (
    OTHER_CACHE,
    UNPROVED,
    USED_CACHE,
    check_cache,
    check_cache_dtype,
    check_capacity,
)
from alibi_spec.memory import in_huge_pages
from alibi_torch.dispatch import attention
from alibi_torch.kernels import decode, nearest
from alibi_torch.kernels.call import Call
from alibi_torch.kernels.certificate import keys_needed
from alibi_torch.kernels.finite import has_values_on_host


@dataclass
class KVCache:
    """Keys and values of the positions that a model has read; created by `empty`.

    Attributes:
        config: of the model.
        capacity: the most positions that may be read; None is any number.
        rings: of each layer: which heads keep how many positions.
        keys, values: by layer and ring, [batch, ring_heads, size, head_dim]. Position p is in slot
            p mod size.
        largest: by layer, the largest norm of a key that was ever read; where a proof needs it.
        visible: False for padding, of the last positions; None where there is no padding.
        length: positions that were read, padding included: the next query stands there.
        interpolated_len: number of keys for interpolated slopes; None is `length`.
    """

    config: ALiBiConfig
    batch_size: int
    capacity: int | None
    rings: tuple[tuple[Ring, ...], ...] = field(repr=False)
    keys: dict[tuple[int, int], Float[Tensor, "batch _ _ head_dim"]] = field(repr=False)
    values: dict[tuple[int, int], Float[Tensor, "batch _ _ head_dim"]] = field(repr=False)
    largest: dict[int, Float[Tensor, "batch kv_heads"]] = field(repr=False)
    visible: Bool[Tensor, "batch recent"] | None = None
    length: int = 0
    interpolated_len: int | None = None
    _is_used: bool = field(default=False, repr=False)

    @classmethod
    def empty(
        cls,
        config: ALiBiConfig,
        batch_size: int,
        capacity: int | None,
        *,
        windows: Int[Any, "layers heads"] | None = None,
    ) -> Self:
        """The cache of a model that has read nothing.

        Args:
            config: of the model: an `ALiBiLM`, or the `ALiBiTransformer` in it.
            capacity: the most positions that may be read, padding included; None, with windows
                that bound every head, is any number.
            windows: keep only about this many positions of each head: the result of
                `alibi_spec.bounds.model_windows`, -1 for all. Every call proves anew that the keys
                that are gone carry no more than half an ulp of attention mass.

        Raises:
            ValueError: the configuration is an encoder's, or windows do not fit it.
        """
        check_cache(config, batch_size, batch_size)
        every = rings(config, windows, capacity)
        return cls(replace(config, vocab_size=None), batch_size, capacity, every, {}, {}, {})

    @property
    def has_windows(self) -> bool:
        """Whether some heads keep fewer positions than may be read."""
        every = (ring.size for of_layer in self.rings for ring in of_layer)
        return any(size != self.capacity for size in every)

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
        if self.capacity is not None:
            check_capacity(self.length, new_len, self.capacity)
        visible = self._visible_with(attention_mask, shape)
        self._is_used = True
        return replace(self, length=self.length + new_len, visible=visible, _is_used=False)

    def attend(
        self, layer: int, inputs: Any, implementation: str
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Store the keys and values of the newest positions, and attend to all.

        Args:
            inputs: of `alibi_torch.attention`, for the newest positions.

        Raises:
            ValueError: a dtype other than the cache's, keys that require gradients, logits so
                large that keys which are gone could matter, or windows of a model whose heads are
                divided over devices.
        """
        if inputs["key"].requires_grad:
            raise ValueError("a cache keeps no gradients; call the model under torch.no_grad()")
        of_layer = self.rings[layer]
        if inputs["key"].shape[1] < self.config.kv_heads and self.has_windows:
            raise ValueError(
                "windows and a cache of a model whose heads are divided over devices; leave "
                "windows out"
            )
        largest = self._with_largest(layer, inputs["key"])
        self._check_windows(layer, inputs, largest)
        if len(of_layer) == 1:
            return self._attend((layer, 0), of_layer[0], inputs, largest, implementation)
        parts, order = [], []
        for number, ring in enumerate(of_layer):
            readers = self._readers(ring)
            some = _of_heads(inputs, list(ring.heads), readers)
            norms = None if largest is None else _selected(largest, 1, list(ring.heads))
            parts.append(self._attend((layer, number), ring, some, norms, implementation))
            order += readers
        place = sorted(range(len(order)), key=order.__getitem__)
        return _selected(torch.cat(parts, dim=1), 1, place)

    def _attend(
        self,
        index: tuple[int, int],
        ring: Ring,
        inputs: Any,
        largest: Float[Tensor, "batch ring_heads"] | None,
        implementation: str,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Attention of the heads that read one ring."""
        key, value = (
            self._with_newest(kept, index, ring, inputs[name])
            for name, kept in (("key", self.keys), ("value", self.values))
        )
        mask = None if self.visible is None else self.visible[:, -key.shape[2] :]
        inputs = inputs | {"key": key, "value": value, "attention_mask": mask}
        start = key.shape[2] - inputs["query"].shape[2]
        call = Call(**inputs, query_start=start, tolerance=0.0, dropout=None)
        is_in_order = self.length <= ring.size
        if not is_in_order or nearest.refuses(call) is not None:
            largest = None  # and all keys are read
        if inputs["query"].shape[2] > 1:
            if largest is not None and implementation != "dense":
                first = nearest.first_needed(call, largest)
                inputs |= {"key": key[:, :, first:], "value": value[:, :, first:]}
                inputs |= {"attention_mask": None if mask is None else mask[:, first:]}
            return attention(**inputs, implementation=implementation)
        if largest is not None:
            return nearest.attention(call, largest)
        slot = (self.length - 1) % ring.size
        if mask is not None and not is_in_order:
            call = replace(call, attention_mask=mask.roll(slot + 1, dims=1))
        return decode.attention(call, slot)

    def _with_newest(
        self,
        kept: dict[tuple[int, int], Float[Tensor, "batch _ _ head_dim"]],
        index: tuple[int, int],
        ring: Ring,
        newest: Float[Tensor, "batch ring_heads seq head_dim"],
    ) -> Float[Tensor, "batch ring_heads seen head_dim"]:
        """Store the newest, and return all that the queries see: oldest first, or for one query of
        a ring that has come round, as they lie."""
        batch, heads, new_len, width = newest.shape
        if index not in kept:
            kept[index] = _memory(newest, (batch, heads, ring.size, width))
        memory, start = kept[index], self.length - new_len
        check_cache_dtype(str(memory.dtype), str(newest.dtype))
        if new_len == 1 or self.length <= ring.size:
            slot = start % ring.size
            memory[:, :, slot : slot + new_len] = newest
            return memory[:, :, : min(self.length, ring.size)]
        # The first of these queries see keys that the last ones overwrite.
        old = torch.arange(max(0, start - ring.size), start, device=newest.device) % ring.size
        seen = torch.cat([memory.index_select(2, old), newest], dim=2)
        last = torch.arange(max(start, self.length - ring.size), self.length, device=newest.device)
        memory[:, :, last % ring.size] = newest[:, :, -len(last) :]
        return seen

    def _visible_with(
        self,
        attention_mask: Integer[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
        shape: tuple[int, int],
    ) -> Bool[Tensor, "batch recent"] | None:
        """`visible` with new positions: of all that a query can see."""
        visible = self.visible
        if visible is None:
            if attention_mask is None:
                return None
            visible = attention_mask.new_ones((shape[0], self.length), dtype=torch.bool)
        if attention_mask is None:
            attention_mask = visible.new_ones(shape)
        most = max(ring.size for of_layer in self.rings for ring in of_layer)
        return torch.cat([visible[:, -most:], attention_mask.to(torch.bool)], dim=1)

    def _with_largest(
        self, layer: int, key: Float[Tensor, "batch kv_heads seq head_dim"]
    ) -> Float[Tensor, "batch kv_heads"] | None:
        """`largest` of a layer, the newest keys included; None where nothing asks for it."""
        smallest = min(ring.size for ring in self.rings[layer])
        # The same at every call of a cache: the norm of a key that was left out would be missed.
        is_for_steps = key.is_cpu and smallest >= nearest.PAYS_FROM[key.itemsize]
        if smallest == self.capacity and not is_for_steps:
            return None
        dtype = torch.promote_types(key.dtype, torch.float32)
        norms = torch.linalg.vector_norm(key, dim=-1, dtype=dtype)
        if self.visible is not None:
            norms = norms.masked_fill(~self.visible[:, None, -key.shape[2] :], 0.0)
        largest = norms.amax(dim=-1)
        if layer in self.largest:
            largest = torch.maximum(largest, self.largest[layer])
        self.largest[layer] = largest
        return largest

    def _check_windows(
        self, layer: int, inputs: Any, largest: Float[Tensor, "batch kv_heads"] | None
    ) -> None:
        """Prove that the keys which are gone do not matter.

        Raises:
            ValueError: they could.
        """
        query, key, new_len = inputs["query"], inputs["key"], inputs["query"].shape[2]
        lossy = [ring for ring in self.rings[layer] if ring.has_lost(self.length, new_len)]
        if not lossy or largest is None or len(query) == 0:
            return
        needed = keys_needed(query, key, largest, inputs["slopes"], inputs["scale"])
        if self.visible is not None:  # nothing is promised for queries that are padding
            needed = needed.masked_fill(~self.visible[:, None, -new_len:], 1.0)
        of_heads = needed.amax(dim=(0, 2)).tolist()
        if any(of_heads[head] > ring.size for ring in lossy for head in self._readers(ring)):
            raise ValueError(UNPROVED)

    def _readers(self, ring: Ring) -> list[int]:
        """The heads of queries that read a ring."""
        group = self.config.num_heads // self.config.kv_heads
        return [head * group + each for head in ring.heads for each in range(group)]


def _of_heads(inputs: Any, heads: list[int], readers: list[int]) -> Any:
    """The inputs of attention of some heads of keys and the heads of queries that read them."""
    return inputs | {
        "query": _selected(inputs["query"], 1, readers),
        "key": _selected(inputs["key"], 1, heads),
        "value": _selected(inputs["value"], 1, heads),
        "slopes": _selected(inputs["slopes"], 0, readers),
    }


def _selected(x: Tensor, axis: int, indices: list[int]) -> Tensor:
    """These places of an axis; a view, where they are neighbours."""
    first, count = indices[0], len(indices)
    if indices == list(range(first, first + count)):
        return x.narrow(axis, first, count)
    return x.index_select(axis, torch.tensor(indices, device=x.device))


def _memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers, not set, of the dtype of a tensor and where it is.

    Long ones are in huge pages: a short text takes one of them for each head.
    """
    is_long = shape[2] >= nearest.PAYS_FROM[like.itemsize]
    if 0 in shape or not is_long or not has_values_on_host(like):
        return like.new_empty(shape)
    found = torch.from_numpy(in_huge_pages(math.prod(shape) * like.itemsize))
    return found.view(like.dtype).view(shape)
