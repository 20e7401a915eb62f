"""Optax states as flax and orbax save them: dicts and lists, told by the names of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alibi_convert.optimizers.optax_state import from_optax
from alibi_convert.optimizers.optax_tree import INNER, RECORD, STATES, Saved
from alibi_convert.optimizers.state import OptimizerState
from alibi_spec import ALiBiConfig


def from_saved(tree: Any, config: ALiBiConfig) -> OptimizerState:
    """The neutral form of a saved state.

    Raises:
        CheckpointError: as for `from_optax`.
    """
    return from_optax(recognised(tree), config)


def recognised(node: Any) -> Any:
    """The tree with every known state in its place."""
    if isinstance(node, list | tuple):
        return [recognised(child) for child in node]
    if node is None:  # how orbax has an empty state
        return []
    if not isinstance(node, Mapping):
        return node
    for name, roles in STATES.items():
        needed = {field for field, role in roles.items() if role != RECORD}
        if needed and needed <= node.keys() <= roles.keys():
            values = {
                field: recognised(value) if roles[field] == INNER else value
                for field, value in node.items()
            }
            return Saved(name, values)
    return {key: recognised(child) for key, child in node.items()}
