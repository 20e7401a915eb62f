"""The layers of a model, stacked for a scan over them, and apart again.

A scanned model (`scan_layers`) compiles one layer, whatever its depth. Trees are those of params or
of anything that holds such trees, as the states of optax's transformations do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_LAYER = re.compile(r"layers_(\d+)")
_STACKED = "layers"


def stacked(tree: Any) -> Any:
    """The tree with "layers" in place of "layers_0", "layers_1", …: arrays with one axis more."""
    return _rebuilt(tree, _stack)


def unstacked(tree: Any) -> Any:
    """The inverse of `stacked`, bit for bit; a tree that is not stacked stays as it is."""
    return _rebuilt(tree, _unstack)


def is_stacked(params: Any) -> bool:
    """Whether params are those of a scanned model."""
    return _STACKED in params.get("transformer", params)


def _rebuilt(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The tree with some keys of its mappings, in whatever holds them, in place of others."""
    if isinstance(node, Mapping):
        return change({key: _rebuilt(child, change) for key, child in node.items()})
    if hasattr(node, "_fields"):  # a state of optax
        return type(node)(*(_rebuilt(child, change) for child in node))
    if isinstance(node, list | tuple):
        return type(node)(_rebuilt(child, change) for child in node)
    return node


def _stack(node: dict[str, Any]) -> dict[str, Any]:
    layers = {int(found[1]): key for key in node if (found := _LAYER.fullmatch(str(key)))}
    if not layers:
        return node
    others = {key: child for key, child in node.items() if key not in layers.values()}
    every = [node[layers[number]] for number in range(len(layers))]
    return {_STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *every), **others}


def _unstack(node: dict[str, Any]) -> dict[str, Any]:
    if _STACKED not in node:
        return node
    others = {key: child for key, child in node.items() if key != _STACKED}
    every = node[_STACKED]
    count = len(jax.tree.leaves(every)[0])

    def layer(number: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[number], every)

    return {**{f"layers_{number}": layer(number) for number in range(count)}, **others}
