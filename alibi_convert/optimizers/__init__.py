"""The state of optimizers between torch and optax, through the parameter table (SPEC.md §17)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alibi_convert.optimizers.optax_state import from_optax, to_optax
from alibi_convert.optimizers.state import OptimizerState
from alibi_convert.optimizers.torch_state import from_torch, to_torch
from alibi_spec import ALiBiConfig

__all__ = [
    "OptimizerState",
    "from_optax",
    "from_torch",
    "optax_to_torch",
    "to_optax",
    "to_torch",
    "torch_to_optax",
]


def torch_to_optax(
    optimizer_state_dict: Mapping[str, Any],
    config: ALiBiConfig,
    tx: Any,
    *,
    names: Sequence[str] | None = None,
    step: int | None = None,
) -> Any:
    """The `state_dict()` of a torch optimizer as the state of an optax transformation, bit for bit.

    Adam, AdamW, SGD, and Lion in the layout of lion-pytorch. What `optax.inject_hyperparams` holds
    is taken from the options of the param groups; all else that `tx` computes with is its own.

    Args:
        optimizer_state_dict: of an optimizer of the model's parameters. They are known by the names
            in its param groups (those of `named_parameters()`), else by their order, which is the
            model's; of several groups without names, where their shapes tell them.
        config: of the model.
        tx: the `optax.GradientTransformation` that goes on, over the Flax params of `config`. What
            keeps a state of its own must be one of `alibi_convert.optimizers.optax_tree.STATES`.
        names: of the parameters, in the order of their numbers, where nothing else tells it.
        step: how many updates were made, where a schedule must know it and torch keeps none: SGD
            and Lion.

    Raises:
        CheckpointError: the state is another model's, or one side has no word for what the other
            keeps.
    """
    return to_optax(from_torch(optimizer_state_dict, config, names, step), config, tx)


def optax_to_torch(
    opt_state: Any,
    config: ALiBiConfig,
    *,
    like: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """An optax state as a `state_dict` that a torch optimizer loads, bit for bit.

    `load_state_dict` takes the options of its param groups from here, and optax knows only those in
    `optax.inject_hyperparams`, which come first. So pass `like`, to keep those of your optimizer.

    Args:
        opt_state: of a transformation over the Flax params of `config`.
        config: of the model.
        like: the `state_dict()` of the optimizer that goes on, or its `param_groups`: which groups
            there are, and their options. Without it, one group of all parameters in the order of
            the model's, or one for each set of injected hyperparameters; other options are the
            defaults of `torch.optim.AdamW`, `torch.optim.SGD` or lion-pytorch. SGD's momentum has
            no default that its state allows, and is left out.
        names: of the parameters in `like`, where nothing else tells them, as for `torch_to_optax`.

    Raises:
        CheckpointError: the state is another model's, or one side has no word for what the other
            keeps.
    """
    return to_torch(from_optax(opt_state, config), config, like, names)
