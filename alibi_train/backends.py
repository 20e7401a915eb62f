"""A trainer in either backend, from a state and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from alibi_convert.optimizers import OptimizerState, from_optax, from_torch, to_optax, to_torch
from alibi_convert.rules import canonical_tensors, flax_tree, flax_view
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import ALiBiConfig
from alibi_spec.training import Metrics, Recipe

BACKENDS = ("torch", "flax")


@runtime_checkable
class Trainer(Protocol):
    """`alibi_torch.Trainer` or `alibi_flax.Trainer`, and its state by canonical names."""

    def step(self, batch: Mapping[str, Any]) -> Metrics:
        """Update the weights."""
        ...

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """The negative log-likelihood of a batch, and of how many targets."""
        ...

    def state(self) -> tuple[Tensors, OptimizerState]:
        """Copies of the parameters and of the optimizer's state, in the host's memory."""
        ...


def trainer(
    backend: str,
    config: ALiBiConfig,
    recipe: Recipe,
    tensors: Tensors,
    optimizer: OptimizerState | None,
    device: str | None = None,
) -> Trainer:
    """A trainer that goes on from these parameters.

    Args:
        backend: "torch" or "flax".
        tensors: canonical names, torch layout, in the dtype that is trained in.
        optimizer: None before the first step.
        device: of torch; None is a GPU where there is one.

    Raises:
        ValueError: another backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; expected one of {BACKENDS}")
    if backend == "torch":
        return _TorchTrainer(config, recipe, tensors, optimizer, device)
    return _FlaxTrainer(config, recipe, tensors, optimizer)


class _TorchTrainer:
    def __init__(
        self,
        config: ALiBiConfig,
        recipe: Recipe,
        tensors: Tensors,
        optimizer: OptimizerState | None,
        device: str | None,
    ) -> None:
        import torch

        from alibi_torch import ALiBiLM, Trainer

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ALiBiLM(config)
        model.load_state_dict({name: as_torch(tensors[name]) for name in tensors}, assign=True)
        self._trainer = Trainer(model.to(device), recipe)
        if optimizer is not None:
            like = self._trainer.optimizer_state
            self._trainer.optimizer.load_state_dict(to_torch(optimizer, config, like))
        self.step, self.evaluate = self._trainer.step, self._trainer.evaluate

    def state(self) -> tuple[Tensors, OptimizerState]:
        trainer = self._trainer
        optimizer = from_torch(trainer.optimizer_state, trainer.config)
        return _copied(Tensors.of(trainer.model.state_dict())), _in_memory(optimizer)


class _FlaxTrainer:
    def __init__(
        self,
        config: ALiBiConfig,
        recipe: Recipe,
        tensors: Tensors,
        optimizer: OptimizerState | None,
    ) -> None:
        from alibi_flax import ALiBiLM, Trainer

        params = flax_tree(tensors, config, lambda row, tensor: np.array(flax_view(row, tensor)))
        dtype = next(iter(tensors.headers.values())).dtype
        self._trainer = Trainer(ALiBiLM(config, param_dtype=dtype), params, recipe)
        if optimizer is not None:
            state = to_optax(optimizer, config, self._trainer.optimizer)
            self._trainer.optimizer_state = state
        self.step, self.evaluate = self._trainer.step, self._trainer.evaluate

    def state(self) -> tuple[Tensors, OptimizerState]:
        trainer = self._trainer
        optimizer = from_optax(trainer.optimizer_state, trainer.config)
        tensors = canonical_tensors(trainer.params, trainer.config)
        return _copied(Tensors.of(tensors)), _in_memory(optimizer)


def _copied(tensors: Tensors) -> Tensors:
    """In memory of their own: the next step overwrites what they are read from."""
    return Tensors.of({name: np.array(as_numpy(tensors[name])) for name in tensors})


def _in_memory(state: OptimizerState) -> OptimizerState:
    moments = {word: _copied(tensors) for word, tensors in state.moments.items()}
    return replace(state, moments=moments)
