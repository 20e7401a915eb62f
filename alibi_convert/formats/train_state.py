"""The tree that a Flax training run saves: the params, with or without optimizer and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError

_PARAMS = "params"
_OPTIMIZER = "opt_state"


@dataclass(frozen=True)
class Found:
    """The params in a tree.

    Attributes:
        params: the nested mapping that is meant.
        keys: that lead to it.
        optimizer: keys that lead to the optimizer's state, if there is one.
    """

    params: Mapping[str, Any]
    keys: tuple[str, ...]
    optimizer: tuple[str, ...] = ()

    @property
    def in_place(self) -> dict[str, Any]:
        """The tree with nothing but the params."""
        return placed(self.params, self.keys)


def placed(tree: Any, keys: Sequence[str]) -> Any:
    """What these keys lead to, and nothing else."""
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def at(tree: Any, keys: Sequence[str]) -> Any:
    """What the keys lead to."""
    for key in keys:
        tree = tree[key]
    return tree


def beside_params(params: Any, others: Mapping[str, Any] | None) -> Any:
    """The params, or the tree of a `TrainState` that has them and these others."""
    return params if others is None else {**others, _PARAMS: params}


def find_params(tree: Any, path: Path) -> tuple[Found, dict[str, str]]:
    """The params in a tree, and the other keys, with the reason why they are dropped.

    Params are the tree itself, or under "params" in it or in one of its branches; variables, in
    which they are under "params" once more, may take their place.

    Raises:
        CheckpointError: no tree, or several branches with params.
    """
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, expected a tree of params")
    keys: tuple[str, ...] = ()
    branches = [str(name) for name, branch in tree.items() if _has_params(branch)]
    if len(branches) > 1 and not _has_params(tree):
        raise CheckpointError(
            f"{path} holds several params, in {', '.join(branches)}; save only one of them"
        )
    left: dict[str, str] = {}
    optimizer: tuple[str, ...] = ()
    node: Mapping[str, Any] = tree
    while _has_params(node) or (not keys and branches):
        key = _PARAMS if _has_params(node) else branches[0]
        for name in node:
            if name == _OPTIMIZER:
                optimizer = (*keys, name)
            if name != key:
                left["/".join((*keys, str(name)))] = "not in the params, which are the model"
        node, keys = node[key], (*keys, key)
    return Found(node, keys, optimizer), left


def _has_params(node: Any) -> bool:
    return isinstance(node, Mapping) and isinstance(node.get(_PARAMS), Mapping)
