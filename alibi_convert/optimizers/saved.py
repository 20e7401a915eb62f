"""Optax states as flax and orbax save them, in the tree of a `TrainState`.

What is read is dicts and lists, in which states are told by the names of their fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alibi_convert.machine import require
from alibi_convert.optimizers.optax_state import from_optax, to_optax
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


def to_saved(state: OptimizerState, config: ALiBiConfig, tx: Any = None) -> dict[str, Any]:
    """What a `TrainState` holds beside the params: its `step`, and its `opt_state` as `tx` has it.

    Args:
        tx: as for `to_optax`; None is `plain_tx`.

    Raises:
        CheckpointError: as for `to_optax`.
    """
    require("optax", "flax", "writing the state of an optimizer")
    opt_state = to_optax(state, config, plain_tx(state) if tx is None else tx)
    return {"step": state.step or 0, "opt_state": opt_state}


def plain_tx(state: OptimizerState) -> Any:
    """What most people train with, for a state of this kind: its rates are not in its state."""
    import optax

    if state.kind == "sgd":
        keeps = state.names or any(group.options.get("momentum") for group in state.groups)
        return optax.sgd(0.0, momentum=0.9 if keeps else None)
    return {"adam": optax.adamw, "lion": optax.lion}[state.kind](0.0)
