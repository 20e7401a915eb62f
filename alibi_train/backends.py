"""A trainer in either backend, from a state and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from alibi_convert.optimizers import OptimizerState, from_optax, from_torch, to_optax, to_torch
from alibi_convert.rules import flax_tree, unread_tensors
from alibi_convert.tensors import LazyTensor, Tensors, as_numpy
from alibi_spec import ALiBiConfig, Parameter
from alibi_spec.training import Metrics, Recipe

BACKENDS = ("torch", "flax")
Write = Callable[[Tensors, OptimizerState], None]


@runtime_checkable
class Trainer(Protocol):
    """`alibi_torch.Trainer` or `alibi_flax.Trainer`, and its state by canonical names."""

    def step(self, batch: Mapping[str, Any]) -> Metrics:
        """Update the weights."""
        ...

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """The negative log-likelihood of a batch, and of how many targets."""
        ...

    def save(self, write: Write, write_later: Write) -> None:
        """Give parameters and the optimizer's state to one of the two.

        Args:
            write: must be done with them when it returns.
            write_later: gets copies, in the host's memory.
        """
        ...


def trainer(
    backend: str,
    config: ALiBiConfig,
    recipe: Recipe,
    tensors: Tensors,
    optimizer: OptimizerState | None,
    device: str | None = None,
    mesh: Any = None,
) -> Trainer:
    """A trainer that goes on from these parameters.

    Args:
        backend: "torch" or "flax".
        tensors: canonical names, torch layout, in the dtype that is trained in.
        optimizer: None before the first step.
        device: of torch; None is a GPU where there is one.
        mesh: of the backend, that the model is divided over (`alibi_train.processes`).

    Raises:
        ValueError: another backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; expected one of {BACKENDS}")
    if backend == "torch":
        return _TorchTrainer(config, recipe, tensors, optimizer, device, mesh)
    return _FlaxTrainer(config, recipe, tensors, optimizer, mesh)


class _TorchTrainer:
    def __init__(
        self,
        config: ALiBiConfig,
        recipe: Recipe,
        tensors: Tensors,
        optimizer: OptimizerState | None,
        device: str | None,
        mesh: Any,
    ) -> None:
        import torch

        from alibi_torch import ALiBiLM, Trainer
        from alibi_torch.divided import placed_like

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device("meta"):
            model = ALiBiLM(config)
        model.load_tensors(tensors, device=device, mesh=mesh, compute_dtype=recipe.compute_dtype)
        self._trainer = Trainer(model, recipe)
        if optimizer is not None:
            like = self._trainer.optimizer_state

            def place(name: str, moment: Any) -> Any:
                parameter = model.get_parameter(name)
                return placed_like(parameter, moment, parameter.device)

            state = to_torch(optimizer, config, like, place=place)
            self._trainer.optimizer.load_state_dict(state)
        self.step, self.evaluate = self._trainer.step, self._trainer.evaluate

    def save(self, write: Write, write_later: Write) -> None:
        trainer = self._trainer
        tensors, optimizer = trainer.model.state_dict(), trainer.optimizer_state
        if trainer.model.mesh is None:
            found = from_torch(optimizer, trainer.config)
            write_later(_copied(Tensors.of(tensors)), _in_memory(found))
        else:
            _save_gathered(trainer.config, tensors, optimizer, write)


def _save_gathered(
    config: ALiBiConfig, tensors: dict[str, Any], optimizer: dict[str, Any], write: Write
) -> None:
    """Write what is divided over devices: in the first process, one tensor after the other."""
    from alibi_torch.checkpoint import with_gathered

    moments, shown = {}, {}
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    for number, entry in optimizer["state"].items():
        kept = {word: value for word, value in entry.items() if word != "step"}
        moments |= {f"{word} {names[number]}": value for word, value in kept.items()}
        # Of the right shape, and no memory: gathering is for later.
        shapes = {word: np.broadcast_to(np.float32(0), value.shape) for word, value in kept.items()}
        shown[number] = entry | shapes
    state = from_torch(optimizer | {"state": shown}, config)
    with_gathered(tensors | moments, partial(_write_parts, write, [*tensors], state))


class _FlaxTrainer:
    def __init__(
        self,
        config: ALiBiConfig,
        recipe: Recipe,
        tensors: Tensors,
        optimizer: OptimizerState | None,
        mesh: Any,
    ) -> None:
        from alibi_flax import ALiBiLM, Trainer, parameter_sharding
        from alibi_flax.checkpoint import placed
        from alibi_flax.divided import beside

        def place(row: Parameter, tensor: np.ndarray) -> Any:
            return placed(
                row, tensor, sharding=None if mesh is None else parameter_sharding(row, mesh)
            )

        dtype = next(iter(tensors.headers.values())).dtype
        params = flax_tree(tensors, config, place)
        self._mesh = mesh
        self._trainer = trainer = Trainer(ALiBiLM(config, param_dtype=dtype), params, recipe)
        if optimizer is not None:
            like = trainer.optimizer_state
            state = to_optax(optimizer, config, trainer.optimizer, like=like, place=place)
            trainer.optimizer_state = beside(trainer.params, state)

    def step(self, batch: Mapping[str, Any]) -> Metrics:
        with self._on_the_mesh():
            return self._trainer.step(batch)

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        with self._on_the_mesh():
            return self._trainer.evaluate(batch)

    def _on_the_mesh(self) -> AbstractContextManager[Any]:
        if self._mesh is None:
            return nullcontext()
        import jax

        return jax.set_mesh(self._mesh)

    def save(self, write: Write, write_later: Write) -> None:
        from alibi_flax.checkpoint import on_host, with_gathered

        trainer = self._trainer
        tensors = unread_tensors(on_host(trainer.params), trainer.config)
        state = from_optax(on_host(trainer.optimizer_state), trainer.config)
        if self._mesh is None:
            write_later(_copied(tensors), _in_memory(state))
            return
        every = Tensors(tensors.headers | _named_moments(state))
        with_gathered(lambda: every, partial(_write_parts, write, [*tensors], state))


def _named_moments(state: OptimizerState) -> dict[str, LazyTensor]:
    """The moments beside parameters, under names of their own."""
    return {
        f"{word} {name}": header
        for word, tensors in state.moments.items()
        for name, header in tensors.headers.items()
    }


def _write_parts(write: Write, names: Iterable[str], state: OptimizerState, every: Tensors) -> None:
    """Give `write` parameters, and a state with moments, of which both are read."""
    moments = {
        word: Tensors({name: every.headers[f"{word} {name}"] for name in tensors})
        for word, tensors in state.moments.items()
    }
    model = Tensors({name: every.headers[name] for name in names})
    write(model, replace(state, moments=moments))


def _copied(tensors: Tensors) -> Tensors:
    """In memory of their own: the next step overwrites what they are read from."""
    return Tensors.of({name: np.array(as_numpy(tensors[name])) for name in tensors})


def _in_memory(state: OptimizerState) -> OptimizerState:
    moments = {word: _copied(tensors) for word, tensors in state.moments.items()}
    return replace(state, moments=moments)
