"""The neutral form on disk: `optimizer.safetensors` beside the weights (SPEC.md §17).

Tensors are named `<moment>.<parameter>`; what else is known is JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.files import parse_json
from alibi_convert.formats.safetensors import read_safetensors
from alibi_convert.optimizers.state import KINDS, Group, OptimizerState, check_state
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_spec import ALiBiConfig
from alibi_spec.parameters import parameter_names

_KEY = "alibi_optimizer"
_VERSION = 1


def as_file(state: OptimizerState) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of the file."""
    headers = {
        f"{word}.{name}": header
        for word, tensors in state.moments.items()
        for name, header in tensors.headers.items()
    }
    groups = [
        {"parameters": group.parameters, "options": dict(group.options)} for group in state.groups
    ]
    values = {"version": _VERSION, "kind": state.kind, "step": state.step, "groups": groups}
    try:
        return Tensors(headers), {_KEY: json.dumps(values)}
    except TypeError as error:
        raise CheckpointError(f"an option of the optimizer is no JSON: {error}") from None


def from_file(path: Path, config: ALiBiConfig) -> OptimizerState:
    """The state in a file, unread.

    Raises:
        CheckpointError: not ours, of a newer version, or of another model.
    """
    tensors, metadata = read_safetensors(path)
    values = parse_json(metadata.get(_KEY, "{}"), f"metadata of {path}")
    if values.get("version") != _VERSION or values.get("kind") not in [*KINDS]:
        raise CheckpointError(
            f"{path} is no optimizer's state of version {_VERSION}; expected what alibi-duo wrote"
        )
    groups = _groups(values.get("groups"), path, config)
    moments: dict[str, dict[str, LazyTensor]] = {word: {} for word in KINDS[values["kind"]].moments}
    for key, header in tensors.headers.items():
        word, _, name = key.partition(".")
        if word not in moments:
            raise CheckpointError(f"{path} has {key}; expected {', '.join(moments)} of parameters")
        moments[word][name] = header
    step = values.get("step")
    if not (step is None or (type(step) is int and step >= 0)):
        raise CheckpointError(f"{path} says step {step!r}, expected a whole number or null")
    ordered = {
        word: Tensors(
            {name: found[name] for name in [*parameter_names(config), *found] if name in found}
        )
        for word, found in moments.items()
    }
    return check_state(OptimizerState(values["kind"], step, ordered, groups), config)


def _groups(saved: Any, path: Path, config: ALiBiConfig) -> tuple[Group, ...]:
    known, seen = set(parameter_names(config)), []
    try:
        groups = tuple(
            Group(tuple(each["parameters"]), _options(each["options"])) for each in saved
        )
        seen = [name for group in groups for name in group.parameters]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: groups must list parameters and options") from None
    if not all(name in known for name in map(str, seen)) or len(set(map(str, seen))) < len(seen):
        raise CheckpointError(f"{path}: the groups are not those of the model's parameters")
    return groups


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples, which JSON has as lists."""
    return {
        word: tuple(value) if isinstance(value, list) else value for word, value in saved.items()
    }
