"""The `state_dict` of a torch optimizer, in which parameters are numbers (SPEC.md §17)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.formats.names import unwrapped_names
from alibi_convert.optimizers.state import (
    KINDS,
    Group,
    OptimizerState,
    check_state,
    scalar,
    whole,
)
from alibi_convert.rules import check_shapes
from alibi_convert.tensors import Tensors, as_torch
from alibi_spec import ALiBiConfig, parameter_table
from alibi_spec.parameters import parameter_names

NAME_THEM = "pass model.named_parameters() to the optimizer, or names="
_NOT_OPTIONS = ("params", "param_names")
# What a group has where torch has no optimizer of that kind: lion-pytorch's defaults.
_LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}


@dataclass(frozen=True)
class Numbered:
    """The param groups of a state dict, and which parameter each number stands for.

    Attributes:
        groups: as they are in the state dict.
        names: by number.
    """

    groups: Sequence[Mapping[str, Any]]
    names: Mapping[Any, str]

    def parameters(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The names in one group."""
        return tuple(self.names[number] for number in group["params"])


def from_torch(
    saved: Mapping[str, Any],
    config: ALiBiConfig,
    names: Sequence[str] | None = None,
    step: int | None = None,
) -> OptimizerState:
    """The neutral form of a state dict; arguments as for `torch_to_optax`.

    Raises:
        CheckpointError: of another model or an unknown optimizer, or one that optax cannot say.
    """
    if not (isinstance(saved, Mapping) and _are_mappings(saved.get("state"))):
        raise _no_state_dict("state")
    groups: Any = saved.get("param_groups")
    kind, entries = kind_of(groups), _entries(saved["state"])
    shapes = {number: np.shape(next(iter(each.values()))) for number, each in entries.items()}
    numbered = _numbered(groups, shapes, config, names)
    unknown = [number for number in entries if number not in numbered.names]
    if unknown:
        raise CheckpointError(
            f"the state has the parameter {unknown[0]!r}, which is in no param group"
        )
    named = {numbered.names[number]: each for number, each in entries.items()}
    _check_entries(kind, named)
    return check_state(
        OptimizerState(
            kind,
            _step(kind, groups, named, saved.get("step"), step),
            {word: _moments(word, named, config) for word in KINDS[kind].moments},
            tuple(Group(numbered.parameters(group), _options(group)) for group in groups),
        ),
        config,
    )


def _are_mappings(values: Any) -> bool:
    return isinstance(values, Mapping) and all(isinstance(v, Mapping) for v in values.values())


def _no_state_dict(lacking: str) -> CheckpointError:
    return CheckpointError(
        f"this is no optimizer's state: its {lacking} is not as expected; give what the "
        "optimizer's state_dict() returns"
    )


def kind_of(groups: Any) -> str:
    """The kind of optimizer that has these param groups: a key of `KINDS`.

    Raises:
        CheckpointError: none that is known, or one with a moment that optax has no word for.
    """
    if not (isinstance(groups, list | tuple) and groups and all(map(_is_group, groups))):
        raise _no_state_dict("param_groups")
    found = set.intersection(*(set(group) for group in groups))
    for name, kind in KINDS.items():
        if kind.options <= found and not kind.lacks & found:
            if any(group.get("amsgrad") for group in groups):
                raise CheckpointError(
                    "amsgrad=True: torch keeps the largest exp_avg_sq (max_exp_avg_sq), optax the "
                    "largest after correction of its bias; only amsgrad=False is converted"
                )
            return name
    listed = ", ".join(sorted(map(str, found - set(_NOT_OPTIONS)))) or "none"
    raise CheckpointError(
        f"the optimizer with the options {listed} is not known; expected torch's AdamW, Adam or "
        "SGD, or lion-pytorch's Lion"
    )


def _is_group(group: Any) -> bool:
    """Whether it lists numbers or names, and perhaps a name for each."""
    if not (isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)):
        return False
    names = group.get("param_names", [""] * len(group["params"]))
    return (
        all(type(number) in (int, str) for number in group["params"])
        and isinstance(names, list | tuple)
        and len(names) == len(group["params"])
        and all(isinstance(name, str) for name in names)
    )


def _entries(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """What is kept of each parameter: moments first, without those that torch has not made yet."""
    entries = {}
    for number, entry in state.items():
        kept = {word: value for word, value in entry.items() if value is not None}
        for word, value in kept.items():
            if word != "step" and not (hasattr(value, "shape") and hasattr(value, "dtype")):
                raise CheckpointError(
                    f"{word} of parameter {number} is a {type(value).__name__}, expected a tensor"
                )
        if kept:
            entries[number] = dict(sorted(kept.items(), key=lambda item: item[0] == "step"))
    return entries


def _numbered(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[Any, tuple[int, ...]],
    config: ALiBiConfig,
    given: Sequence[str] | None,
) -> Numbered:
    """The names of the numbers: those given, or in the groups, or the one order that fits."""
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise _no_state_dict("param_groups")
    names: Sequence[str]
    if given is not None:
        names = list(given)
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    elif all(isinstance(number, str) for number in numbers):
        names = numbers
    elif len(groups) == 1:
        names = parameter_names(config)
    else:
        _require_count(numbers, parameter_names(config))
        names = _told_by_shapes(groups, shapes, config)
    _require_count(numbers, names)
    unwrapped, _ = unwrapped_names(names)
    names = [unwrapped[name] for name in names]
    known = {row.name: row.shape for row in parameter_table(config)}
    check_shapes(
        {name: known[name] for name in names if name in known},
        {name: known.get(name, ()) for name in names},
    )
    if len(set(names)) < len(names):
        raise CheckpointError(f"a parameter is named twice: {', '.join(names)}; {NAME_THEM}")
    return Numbered(groups, dict(zip(numbers, names, strict=True)))


def _require_count(numbers: Sequence[Any], names: Sequence[str]) -> None:
    if len(numbers) != len(names):
        raise CheckpointError(
            f"the optimizer has {len(numbers)} parameters, and there are {len(names)} names; give "
            f"the configuration of the model that it trained; if it trained a part, {NAME_THEM}"
        )


def _told_by_shapes(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[Any, tuple[int, ...]],
    config: ALiBiConfig,
) -> list[str]:
    """The names in groups that keep the order of the model and have no shape in common.

    Raises:
        CheckpointError: two groups share a shape, or a shape is not known.
    """
    owners: dict[tuple[int, ...], int] = {}
    for index, group in enumerate(groups):
        for number in group["params"]:
            if owners.setdefault(shapes.get(number, ()), index) != index or number not in shapes:
                raise CheckpointError(
                    f"{len(groups)} param groups without names, and the shapes do not tell which "
                    f"parameter is in which group; {NAME_THEM}"
                )
    known = {row.name: row.shape for row in parameter_table(config)}
    by_group: list[list[str]] = [[] for _ in groups]
    for name in parameter_names(config):
        by_group[owners.get(known[name], 0)].append(name)
    for group, names in zip(groups, by_group, strict=True):
        found = [shapes[number] for number in group["params"]]
        if found != [known[name] for name in names]:
            raise CheckpointError(
                "the shapes in the param groups are not those of the model of this configuration "
                f"in its order; give the configuration of the trained model, or {NAME_THEM}"
            )
    return [name for names in by_group for name in names]


def _check_entries(kind: str, named: Mapping[str, Mapping[str, Any]]) -> None:
    words = {*KINDS[kind].moments, *(("step",) if KINDS[kind].has_step else ())}
    for name, entry in named.items():
        for word in (*(words - entry.keys()), *(entry.keys() - words)):
            raise CheckpointError(
                f"{name} {'lacks' if word in words else 'has'} {word}; an optimizer of the kind "
                f"{kind} is expected to keep {', '.join(sorted(words))}"
            )


def _moments(word: str, named: Mapping[str, Mapping[str, Any]], config: ALiBiConfig) -> Tensors:
    order = (name for name in parameter_names(config) if name in named)
    return Tensors.of({name: named[name][word] for name in order})


def _step(
    kind: str,
    groups: Sequence[Mapping[str, Any]],
    named: Mapping[str, Mapping[str, Any]],
    saved: int | None,
    given: int | None,
) -> int | None:
    """How many updates were made, if that is known; every parameter must say the same."""
    steps = {
        name: whole(f"step of {name}", each["step"])
        for name, each in named.items()
        if "step" in each
    }
    if len(set(steps.values())) > 1:
        (first, step), *others = steps.items()
        other = next(each for each in others if each[1] != step)
        raise CheckpointError(
            f"{first} was updated {step} times and {other[0]} {other[1]} times, and optax has one "
            "count for all; give both a gradient at every step, or train them by two optimizers"
        )
    stated = [whole("step", each) for each in (saved, given) if each is not None]
    known = {*steps.values(), *stated}
    if len(known) > 1:
        raise CheckpointError(
            f"the state was updated {min(known)} times or {max(known)} times; leave out step="
        )
    keeps = KINDS[kind].has_step or any(group.get("momentum", 1) for group in groups)
    return known.pop() if known else 0 if keeps and not named else None


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {word: _plain(word, group[word]) for word in group if word not in _NOT_OPTIONS}


def _plain(word: str, value: Any) -> Any:
    """A Python number for a tensor of one."""
    if isinstance(value, list | tuple):
        return tuple(_plain(word, each) for each in value)
    return scalar(word, value) if hasattr(value, "shape") else value


def to_torch(
    state: OptimizerState,
    config: ALiBiConfig,
    like: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    names: Sequence[str] | None = None,
    place: Callable[[str, Any], Any] = lambda name, moment: moment,  # noqa: ARG005
) -> dict[str, Any]:
    """The state dict of a state; arguments as for `optax_to_torch`.

    Args:
        place: of a parameter's name and a moment: what to put in its place, before the next is
            read.

    Raises:
        CheckpointError: `like` is of another kind, or has other parameters.
    """
    check_state(state, config)
    numbered = _fresh(state, config) if like is None else _alike(state, config, like, names)
    numbers = {name: number for number, name in numbered.names.items()}
    for name in state.names:
        if name not in numbers:
            raise CheckpointError(f"{name} has a state and is in no param group; {NAME_THEM}")
    has_moments = set(state.names)
    entries = {
        number: _entry(state, name, place)
        for name, number in numbers.items()
        if name in has_moments
    }
    saved: dict[str, Any] = {"state": entries, "param_groups": list(numbered.groups)}
    if state.step is not None and not KINDS[state.kind].has_step:
        saved["step"] = state.step
    return saved


def _entry(state: OptimizerState, name: str, place: Callable[[str, Any], Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if KINDS[state.kind].has_step:
        entry["step"] = _counter(state.step)
    moments = state.moments.items()
    return entry | {word: place(name, as_torch(tensors[name])) for word, tensors in moments}


def _counter(step: int | None) -> Any:
    """A counter of one parameter's own: torch adds to it in place."""
    import torch

    counter = torch.tensor(float(step or 0), dtype=torch.float32)
    if int(counter) != step:
        raise CheckpointError(f"torch counts updates in float32, which has no {step:,}")
    return counter


def _fresh(state: OptimizerState, config: ALiBiConfig) -> Numbered:
    """Groups for the options of the state, and torch's defaults for what it does not know."""
    groups, names = [], {}
    are_known = [group.parameters for group in state.groups] == [parameter_names(config)]
    for group in state.groups:
        numbers = range(len(names), len(names) + len(group.parameters))
        names |= dict(zip(numbers, group.parameters, strict=True))
        made = {**_defaults(state), **group.options, "params": list(numbers)}
        groups.append(made if are_known else made | {"param_names": list(group.parameters)})
    return Numbered(groups, names)


def _defaults(state: OptimizerState) -> dict[str, Any]:
    """The options of a fresh optimizer; not a momentum of 0, which a momentum_buffer rules out."""
    if state.kind == "lion":
        return dict(_LION)
    import torch

    make = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[state.kind]
    options = dict(make([torch.zeros(1)]).defaults)
    if state.names:
        options.pop("momentum", None)
    return options


def _alike(
    state: OptimizerState,
    config: ALiBiConfig,
    like: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    names: Sequence[str] | None,
) -> Numbered:
    """The groups and options of another state dict, with the options that the state knows."""
    groups = like["param_groups"] if isinstance(like, Mapping) else like
    if kind_of(groups) != state.kind:
        raise CheckpointError(
            f"the state is of the kind {state.kind}, and like= of {kind_of(groups)}; give the "
            "state_dict() of an optimizer of that kind"
        )
    numbered = _numbered(groups, {}, config, names)
    merged = [dict(group) | state.options(numbered.parameters(group)) for group in groups]
    if any(group.get("weight_decay") for group in groups):  # groups without it stay without it
        for group, made in zip(groups, merged, strict=True):
            made["weight_decay"] = made["weight_decay"] if group["weight_decay"] else 0
    return Numbered(merged, numbered.names)
