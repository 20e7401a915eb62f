"""W + scaling · B A, tensor by tensor, when it is read.

The sum over the rank is taken in float64, term by term and always in one order: a term of two
float32 factors is exact there, so every machine gets the same bits, whatever its library of linear
algebra does. What remains is one rounding to the dtype of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alibi_convert.adapters.folder import Adapter, Update
from alibi_convert.adapters.settings import Settings
from alibi_convert.errors import CheckpointError
from alibi_convert.families import Family, Source, same_tensor
from alibi_convert.formats.names import MERGE
from alibi_convert.rules import nearest
from alibi_convert.tensors import CHUNK_BYTES, LazyTensor, Tensors
from alibi_convert.values import cast_tensor, count_nonfinite, gather, round_once

_Factors = Callable[[], tuple[np.ndarray, np.ndarray]]
_ONE = np.ones((1, 1))
_TIES = "tie_word_embeddings"  # what every config.json calls it


@dataclass(frozen=True)
class Merged:
    """A base with its adapter.

    Attributes:
        adapter: what was merged.
        source: what the base's file would be if the adapter were in it.
        added, replaced: tensors of it to which a product was added, and those of the adapter's own.
        untied: the output layer that was the token embedding, and is so no longer; or None.
    """

    adapter: Adapter
    source: Source
    added: Tensors
    replaced: Tensors
    untied: str | None

    @property
    def changed(self) -> Tensors:
        """The tensors that are not in the base's file."""
        head = (
            {} if self.untied is None else {self.untied: self.source.tensors.headers[self.untied]}
        )
        return Tensors({**head, **self.added.headers, **self.replaced.headers})

    def to_dict(self) -> dict[str, Any]:
        """What reports say of it, as plain JSON values."""
        return {
            "path": str(self.adapter.path),
            "base": self.adapter.base,
            "added": len(self.added),
            "replaced": len(self.replaced),
            "scalings": sorted({update.scaling for update in self.adapter.updates}),
            "untied": self.untied,
        }


def merge(adapter: Adapter, family: Family, base: Source) -> Merged:
    """The base, whose tensors have the names of the family's rows, with the adapter.

    Raises:
        CheckpointError: a tensor of the adapter has no place in the base, or one is missing that
            the adapter's configuration promises.
    """
    config, second_names = family.read_config(base), _second_names(family, base)
    transposed = {rule.foreign for rule in family.rules(config) if rule.transposes}
    tensors = _Tensors(adapter, base.tensors.headers, second_names)
    below, replaced = _renamed(family, adapter.below), _renamed(family, adapter.replaced)
    for name, header in below.items():
        for each in {name, *(tensors.other_names(name) - below.keys())}:
            tensors.replace(each, header)
    for name, header in replaced.items():
        tensors.replace(name, header)
    for update in adapter.updates:
        name = family.current_name(f"{update.module}.weight")
        tensors.add(name, update, update.is_embedding or name in transposed)
    _require_complete(adapter, tensors)
    return _settled(adapter, family, base, tensors, second_names)


def _second_names(family: Family, base: Source) -> dict[str, str]:
    """The tensor that each of the tied ones must be."""
    derived = family.derived(family.read_config(base))
    ties = {each.pattern.replace("\\", ""): each.same_as for each in derived}
    return {second: first for second, first in ties.items() if first is not None}


def _renamed(family: Family, headers: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {family.current_name(name): header for name, header in headers.items()}


class _Tensors:
    """The tensors of a base, as they become those of the merged model.

    Attributes:
        headers: by the names of the family's rows; a tied tensor by both of its names.
        added, replaced: names of those that changed.
    """

    def __init__(
        self, adapter: Adapter, headers: Mapping[str, LazyTensor], second_names: Mapping[str, str]
    ) -> None:
        self._adapter, self._pairs = adapter, [set(pair) for pair in second_names.items()]
        self.headers = dict(headers)
        self.added: set[str] = set()
        self.replaced: set[str] = set()
        for pair in self._pairs:
            for name in pair & headers.keys():
                self.headers |= dict.fromkeys(pair - headers.keys(), headers[name])

    def other_names(self, name: str) -> set[str]:
        """Those by which the base knows this tensor too."""
        return {other for pair in self._pairs if name in pair for other in pair} - {name}

    def replace(self, name: str, header: LazyTensor) -> None:
        """Put the adapter's own tensor there."""
        base = self._find(name, header.shape)
        is_same = header.dtype == base.dtype
        self.headers[name] = header if is_same else cast_tensor(header, base.dtype)
        self.replaced.add(name)

    def add(self, name: str, update: Update, is_transposed: bool) -> None:
        """Add a module's product to its weight, and to its bias what belongs there."""
        outer, inner = update.second, update.first
        shape = (outer.shape[0], inner.shape[1])

        def factors() -> tuple[np.ndarray, np.ndarray]:
            left, right = outer.read(), inner.read()
            return (right.T, left.T) if is_transposed else (left, right)

        self._add(name, shape[::-1] if is_transposed else shape, factors, update.scaling)
        bias = update.bias
        if bias is not None:
            name = f"{name.removesuffix('.weight')}.bias"
            self._add(name, bias.shape, lambda: (bias.read()[:, None], _ONE), update.scaling)

    def _add(self, name: str, shape: tuple[int, ...], factors: _Factors, scaling: float) -> None:
        self.headers[name] = _sum(name, self._find(name, shape), factors, scaling)
        self.added.add(name)

    def _find(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        if name not in self.headers:
            raise CheckpointError(
                f"{self._adapter.path} changes {name}, which the base does not have"
                f"{nearest(name, [*self.headers])}"
            )
        base = self.headers[name]
        if base.shape != shape:
            raise CheckpointError(
                f"{self._adapter.path} has {list(shape)} for {name}, which is {list(base.shape)} "
                f"in the base; give the base that it was trained on: {self._adapter.base!r}, with "
                "embeddings of the adapter's size"
            )
        return base


def _sum(name: str, base: LazyTensor, factors: _Factors, scaling: float) -> LazyTensor:
    """A tensor plus scaling times a product, computed some rows at a time."""

    def stream() -> Iterator[np.ndarray]:
        left, right = (factor.astype(np.float64) for factor in factors())
        weight = base.read().reshape(len(left), right.shape[1])
        rows = max(1, CHUNK_BYTES // max(1, right.nbytes // len(right)))
        for start in range(0, len(left), rows):
            block = slice(start, start + rows)
            yield _block(name, weight[block], left[block], right, scaling).reshape(-1)

    def read() -> np.ndarray:
        return gather(stream(), base.shape, base.dtype)

    return LazyTensor(base.shape, base.dtype, read, stream)


def _block(
    name: str, weight: np.ndarray, left: np.ndarray, right: np.ndarray, scaling: float
) -> np.ndarray:
    total, term = np.zeros(weight.shape), np.empty(weight.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for column, row in zip(left.T, right, strict=True):
            total += np.multiply(column[:, None], row, out=term)
        total *= scaling
        total += weight
    result = round_once(total, weight.dtype)
    if count_nonfinite(result.reshape(-1)) > count_nonfinite(total.reshape(-1)):
        raise CheckpointError(
            f"{name} with the adapter is beyond the range of {weight.dtype}; convert the base to a "
            "wider dtype first, in its family's format (--dtype, --to)"
        )
    return result


def _require_complete(adapter: Adapter, tensors: _Tensors) -> None:
    """Raise CheckpointError if the adapter's configuration promises a tensor that is not there."""
    if not tensors.added and not tensors.replaced:
        raise CheckpointError(f"{adapter.path} holds no tensors; save the adapter again")
    for name in tensors.headers:
        if _is_promised(adapter.settings, name, tensors.added) and name not in (
            tensors.added | tensors.replaced
        ):
            raise CheckpointError(
                f"{adapter.path} has nothing for {name}, which its configuration says was trained; "
                "save the adapter again, whole"
            )


def _is_promised(settings: Settings, name: str, added: Collection[str]) -> bool:
    """Whether the settings say that a tensor of the base was trained."""
    module, _, parameter = name.rpartition(".")
    if settings.is_replaced(module):
        return True
    if parameter == "weight":
        return settings.has_target(module)
    has_update = f"{module}.weight" in added
    is_bias = parameter == "bias"
    return is_bias and (settings.bias == "all" or (settings.bias == "lora_only" and has_update))


def _settled(
    adapter: Adapter,
    family: Family,
    base: Source,
    tensors: _Tensors,
    second_names: Mapping[str, str],
) -> Merged:
    """Without the second names that the base does not use; untied where the two now differ."""
    headers, untied = tensors.headers, None
    for second, first in second_names.items():
        if not {first, second} & (tensors.added | tensors.replaced):
            for name in {first, second} - base.tensors.keys():
                headers.pop(name, None)
        elif not same_tensor(headers[first], headers[second]):
            untied = second
        elif second not in base.tensors:
            del headers[second]
    source = replace(base, tensors=Tensors(headers))
    if untied is not None:
        source = replace(source, config={**(base.config or {}), _TIES: False})
        _require_untied(adapter, family, source, untied)
    added, replaced = (
        Tensors({name: header for name, header in headers.items() if name in names})
        for names in (tensors.added, tensors.replaced - tensors.added)
    )
    return Merged(adapter, source, added, replaced, untied)


def _require_untied(adapter: Adapter, family: Family, source: Source, untied: str) -> None:
    try:
        is_tied = untied in _second_names(family, source)
    except CheckpointError:
        is_tied = True
    if is_tied:
        raise CheckpointError(
            f"{adapter.path} makes {untied} differ from the token embedding, which {family.name} "
            f"cannot express; {MERGE}"
        )
