"""The declarations of a family of foreign checkpoints, and how they are applied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.rules import Row, Rule, check_shapes
from alibi_convert.tensors import (
    DTYPES,
    LazyTensor,
    Tensors,
    as_bits,
    contiguous_chunks,
    paired_chunks,
)
from alibi_spec import ALiBiConfig, parameter_table


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint before it is understood.

    Attributes:
        config: its config.json (or what its file says about the model); None when there is none.
        tensors: by foreign name, unread.
        ignored: keys of the configuration that the caller says change nothing.
    """

    config: Mapping[str, Any] | None
    tensors: Tensors
    ignored: frozenset[str] = frozenset()

    @property
    def model_type(self) -> Any:
        """The model_type of its config.json, if there is one."""
        return (self.config or {}).get("model_type")


@dataclass(frozen=True)
class Derived:
    """Foreign tensors that are dropped.

    Attributes:
        pattern: regular expression for the whole name.
        reason: why nothing is lost.
        same_as: name of a foreign tensor that must hold the same bits.
    """

    pattern: str
    reason: str
    same_as: str | None = None


def tied_head(embedding: str) -> Callable[[ALiBiConfig], tuple[Derived, ...]]:
    """`derived` of families whose lm_head may be the token embedding, which has this name."""
    head = Derived(r"lm_head\.weight", "tied: it is the token embedding", same_as=embedding)
    return lambda config: (head,) if config.tie_embeddings else ()


@dataclass(frozen=True)
class Fold:
    """One canonical tensor that is computed on import.

    An export leaves it to the next import, if that computes the same bits from the one tensor that
    was written.

    Attributes:
        canonical: its name.
        foreign: shape by name of the foreign tensors that it is computed from.
        compute: called with their arrays, in order; the dtype of the result is that of the first,
            or of the checkpoint's first tensor where there is none.
        reason: what was computed, for the report.
    """

    canonical: str
    foreign: Mapping[str, tuple[int, ...]]
    compute: Callable[..., np.ndarray]
    reason: str


@dataclass(frozen=True)
class Peer:
    """The model of transformers that runs a family's folders itself.

    Attributes:
        attention: the one of its attention implementations that is right.
        ignores: fields of a configuration that it ignores; it computes something else there.
    """

    attention: str = "eager"
    ignores: Callable[[ALiBiConfig], Sequence[str]] = lambda _: ()


def _nothing(*_: Any) -> tuple[Any, ...]:
    return ()


def _no_pickle(_: Any) -> None:
    return None


def _no_tensors(_: ALiBiConfig) -> dict[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class Family:
    """One family of checkpoints, as data where that is possible.

    Attributes:
        name: what `alibi inspect` calls it.
        recognises: whether a source is the family's; it may be one that cannot be honoured.
        read_config: the configuration of a source; raises CheckpointError naming what it cannot
            honour.
        rows: the table of tensors, both ways.
        aliases: (regular expression, replacement) for names that other files use; each in turn
            renames what it matches as a whole.
        derived: foreign tensors that are dropped.
        folds: canonical tensors that are computed.
        unpickled: the options and the state dict in what the family's library pickles; None for
            other pickles.
        write_config: the foreign config.json of a configuration; raises CheckpointError naming the
            field that the family cannot express. None for a family that is only imported.
        label: what the help text calls an export.
        suffix: of an export; empty for a folder, ".pt" for a state dict without a configuration.
        generated: foreign tensors that an export adds, by name.
        neutral_keys: keys of the foreign config.json that a model may take with it when it returns.
        peer: the library's own model, to be compared with; None where there is none.
    """

    name: str
    recognises: Callable[[Source], bool]
    read_config: Callable[[Source], ALiBiConfig]
    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    derived: Callable[[ALiBiConfig], tuple[Derived, ...]] = _nothing
    folds: Callable[[ALiBiConfig, Source], tuple[Fold, ...]] = _nothing
    unpickled: Callable[[Any], tuple[Mapping[str, Any], Any] | None] = _no_pickle
    write_config: Callable[[ALiBiConfig], dict[str, Any]] | None = None
    label: str = ""
    suffix: str = ""
    generated: Callable[[ALiBiConfig], Mapping[str, np.ndarray]] = _no_tensors
    neutral_keys: frozenset[str] = frozenset()
    peer: Peer | None = None

    def rules(self, config: ALiBiConfig) -> tuple[Rule, ...]:
        """The table for one configuration."""
        table = {row.name: row for row in parameter_table(config)}
        return tuple(rule for row in self.rows for rule in row.rules(table, config.num_layers))

    def renamed(self, tensors: Tensors) -> Tensors:
        """The tensors under the names that `rows` use.

        Raises:
            CheckpointError: two tensors have one name.
        """
        headers: dict[str, LazyTensor] = {}
        for name, header in tensors.headers.items():
            current = self.current_name(name)
            if current in headers:
                raise CheckpointError(f"{name} is there under an older name too; remove one")
            headers[current] = header
        return Tensors(headers)

    def current_name(self, name: str) -> str:
        """The name that `rows` use for a tensor."""
        for pattern, replacement in self.aliases:
            found = re.fullmatch(pattern, name)
            name = found.expand(replacement) if found else name
        return name


@dataclass(frozen=True)
class Import:
    """A foreign checkpoint in canonical terms.

    Attributes:
        tensors: canonical names, torch layout, unread.
        origins: the foreign names that each comes from.
        dropped: foreign tensors that are dropped, with the reason.
        folded: canonical tensors that are computed, with the reason.
    """

    tensors: Tensors
    origins: dict[str, tuple[str, ...]]
    dropped: dict[str, str]
    folded: dict[str, str]


def import_tensors(family: Family, config: ALiBiConfig, source: Source) -> Import:
    """Hold a foreign checkpoint against the family's table and give its tensors our names.

    Raises:
        CheckpointError: tensors missing, unexpected, of the wrong shape, or not what they must be.
    """
    rules, folds = family.rules(config), family.folds(config, source)
    settled = settle_ties(family.derived(config), source.tensors)
    tensors = settled.tensors
    expected = {rule.foreign: rule.foreign_shape for rule in rules}
    for fold in folds:
        expected |= fold.foreign
        _require_floats(fold, tensors)
    check_shapes(expected, tensors.shapes)
    headers: dict[str, LazyTensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        for index, parameter in enumerate(rule.parameters):
            headers[parameter.name] = _extracted(rule, index, tensors)
            origins[parameter.name] = (settled.other_names.get(rule.foreign, rule.foreign),)
    shapes = {row.name: row.shape for row in parameter_table(config)}
    for fold in folds:
        headers[fold.canonical] = _folded(fold, shapes[fold.canonical], tensors)
        origins[fold.canonical] = tuple(fold.foreign)
    ordered = Tensors({name: headers[name] for name in shapes})
    return Import(
        ordered, origins, settled.dropped, {fold.canonical: fold.reason for fold in folds}
    )


def export_tensors(family: Family, config: ALiBiConfig, tensors: Tensors) -> Tensors:
    """Canonical tensors under the family's names and in its layouts, built when looked up.

    Looking one up raises CheckpointError if a tensor that is computed from it on import would
    become another one.
    """
    written = Source(None if family.write_config is None else family.write_config(config), tensors)
    folds = family.folds(config, written)
    headers: dict[str, LazyTensor] = {}
    for rule in family.rules(config):
        built = _built(rule, tensors)
        lost = tuple(fold for fold in folds if rule.foreign in fold.foreign)
        headers[rule.foreign] = _proven(family, built, lost, tensors) if lost else built
    generated = Tensors.of(family.generated(config))
    return Tensors(headers | generated.headers)


@dataclass(frozen=True)
class Settled:
    """Tensors without those that are dropped.

    Attributes:
        tensors: a tied one that was there only under its second name has its first.
        dropped: names that are dropped, with the reason.
        other_names: the second name that the file uses, by the first.
    """

    tensors: Tensors
    dropped: dict[str, str]
    other_names: dict[str, str]


def settle_ties(derived: tuple[Derived, ...], tensors: Tensors) -> Settled:
    """Find the tensors that are dropped, and those that go by a second name.

    Raises:
        CheckpointError: two tensors must be the same and differ.
    """
    headers, other_names = dict(tensors.headers), {}
    for each in derived:
        if each.same_as is not None and each.same_as not in headers:
            second = next((name for name in headers if re.fullmatch(each.pattern, name)), None)
            if second is not None:
                headers[each.same_as] = headers.pop(second)
                other_names[each.same_as] = second
    dropped = dict(_dropped(derived, Tensors(headers)))
    kept = {name: header for name, header in headers.items() if name not in dropped}
    return Settled(Tensors(kept), dropped, other_names)


def _dropped(derived: tuple[Derived, ...], tensors: Tensors) -> Iterator[tuple[str, str]]:
    for name in tensors:
        for each in derived:
            if re.fullmatch(each.pattern, name):
                if each.same_as is not None:
                    _require_same(name, each.same_as, tensors)
                yield name, each.reason


def _require_same(name: str, other: str, tensors: Tensors) -> None:
    if not same_tensor(tensors.headers[name], tensors.headers[other]):
        raise CheckpointError(
            f"{name} and {other} must be the same tensor, since the configuration ties them, and "
            "differ; untie them in config.json if they are meant to"
        )


def _require_floats(fold: Fold, tensors: Tensors) -> None:
    for name in fold.foreign:
        if name in tensors and tensors.headers[name].dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name} is {tensors.headers[name].dtype}; expected one of {', '.join(DTYPES)}"
            )


def same_tensor(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors hold the same bits."""
    return (first.shape, first.dtype) == (second.shape, second.dtype) and all(
        np.array_equal(as_bits(mine), as_bits(other))
        for mine, other in paired_chunks(first.chunks(), second.chunks())
    )


def _extracted(rule: Rule, index: int, tensors: Tensors) -> LazyTensor:
    shape = rule.parameters[index].shape
    foreign = tensors.headers[rule.foreign]
    return LazyTensor(
        *(shape, foreign.dtype, lambda: rule.extract(foreign.read(), index)),
        stream=lambda: contiguous_chunks(rule.elements(foreign.read(), index)),
    )


def _folded(fold: Fold, shape: tuple[int, ...], tensors: Tensors) -> LazyTensor:
    like = next(iter(fold.foreign), next(iter(tensors)))
    dtype = tensors.headers[like].dtype

    def read() -> np.ndarray:
        computed = fold.compute(*(tensors[name] for name in fold.foreign))
        return np.broadcast_to(computed, shape).astype(dtype, copy=False)

    return LazyTensor(shape, dtype, read)


def _built(rule: Rule, tensors: Tensors) -> LazyTensor:
    dtype = tensors.headers[rule.parameters[0].name].dtype
    return LazyTensor(
        *(rule.foreign_shape, dtype, lambda: rule.build(tensors)),
        stream=lambda: rule.built_chunks(tensors),
    )


def _proven(
    family: Family, built: LazyTensor, folds: tuple[Fold, ...], tensors: Tensors
) -> LazyTensor:
    """A foreign tensor, after the proof that an import computes ours from it."""

    def read() -> np.ndarray:
        foreign = built.read()
        for fold in folds:
            ours = tensors[fold.canonical]
            computed = np.broadcast_to(fold.compute(foreign), ours.shape).astype(ours.dtype)
            if not np.array_equal(as_bits(computed), as_bits(np.ascontiguousarray(ours))):
                raise CheckpointError(
                    f"{family.name} cannot express {fold.canonical}: it would be read back as "
                    f"{fold.reason}"
                )
        return foreign

    return LazyTensor(built.shape, built.dtype, read)
