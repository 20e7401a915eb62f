"""Both backends as implementations of the kit's protocol (`alibi_spec.conformance`).

`alibi conformance alibi_verify.conforming:Torch` runs what is here. Models, traces and gradients
are those of `alibi_verify.backends`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alibi_convert.rules import canonical_tensors, flax_tree, leaves_by_path
from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import ALiBiConfig, Recipe, model_slopes
from alibi_spec.biases import interpolation
from alibi_spec.sampling import Sampling, uniforms
from alibi_verify.backends import Array, Arrays, FlaxBackend, Mask, TorchBackend

Values = Mapping[str, Any]  # of a configuration or a recipe, as in JSON


class _Backend(ABC):
    """What both backends answer alike."""

    dtype: str
    backend: Any  # of `alibi_verify.backends`

    def biased_logits(
        self,
        config: Values,
        query: Array,
        key: Array,
        slopes: Mask = None,
        attention_mask: Mask = None,
    ) -> Array:
        slopes = _slopes(config, key, slopes)
        return self._called("biased_logits", config, (query, key), slopes, attention_mask)

    def attention(
        self,
        config: Values,
        query: Array,
        key: Array,
        value: Array,
        slopes: Mask = None,
        attention_mask: Mask = None,
    ) -> Array:
        slopes = _slopes(config, key, slopes)
        return self._called("attention", config, (query, key, value), slopes, attention_mask)

    @abstractmethod
    def _called(
        self,
        function: str,
        config: Values,
        arrays: tuple[Array, ...],
        slopes: Array,
        attention_mask: Mask,
    ) -> Array:
        """The result of one of the backend's functions of attention, heads before positions."""

    def forward(
        self, config: Values, parameters: Arrays, inputs: Array, attention_mask: Mask = None
    ) -> Arrays:
        options = ALiBiConfig.from_dict(config)
        return self.backend.trace(options, parameters, inputs, attention_mask, self.dtype)

    def gradients(
        self,
        config: Values,
        parameters: Arrays,
        inputs: Array,
        cotangent: Array,
        attention_mask: Mask = None,
    ) -> Arrays:
        options = ALiBiConfig.from_dict(config)
        arrays = (inputs, attention_mask, cotangent)
        return self.backend.gradients(options, parameters, *arrays, self.dtype)

    def uniforms(self, seed: int, rows: int, steps: int) -> Array:
        """Both backends take them from the specification."""
        return np.stack(list(itertools.islice(uniforms(seed, rows), steps)))

    def to_flax(self, config: Values, parameters: Arrays) -> Arrays:
        """By the converter, which serves both."""
        tree = flax_tree(Tensors.of(parameters), ALiBiConfig.from_dict(config))
        return {"/".join(path): leaf for path, leaf in leaves_by_path(tree).items()}


class Torch(_Backend):
    """`alibi_torch` on one torch device; an `Implementation`."""

    def __init__(self, dtype: str = "float32", device: str = "cpu") -> None:
        self.backend = TorchBackend(device)
        self.name, self.dtype = "alibi_torch", dtype
        self.device = "gpu" if device == "cuda" else device

    def _called(
        self,
        function: str,
        config: Values,
        arrays: tuple[Array, ...],
        slopes: Array,
        attention_mask: Mask,
    ) -> Array:
        import torch

        import alibi_torch

        floats = [self.backend.put(each).to(getattr(torch, self.dtype)) for each in arrays]
        with self.backend.settings():
            found = getattr(alibi_torch, function)(
                *(*floats, self.backend.put(slopes)),
                attention_mask=self.backend.put(attention_mask),
                **_options(config),
            )
        return as_numpy(found)

    def decode(
        self,
        config: Values,
        parameters: Arrays,
        inputs: Array,
        lengths: Sequence[int],
        attention_mask: Mask = None,
    ) -> Array:
        import torch

        import alibi_torch

        options = ALiBiConfig.from_dict(config)
        model = self.backend.model(options, parameters, self.dtype)
        cache, logits = alibi_torch.KVCache.empty(options, *inputs.shape), []
        for part in _parts(inputs, attention_mask, lengths):
            with self.backend.settings(), torch.no_grad():
                found, cache = model(*map(self.backend.put, part), cache=cache)
            logits.append(as_numpy(found))
        return np.concatenate(logits, axis=1)

    def train_step(
        self,
        config: Values,
        recipe: Values,
        step: int,
        parameters: Arrays,
        mean: Arrays,
        mean_square: Arrays,
        inputs: Array,
        targets: Array,
        attention_mask: Mask = None,
    ) -> Arrays:
        import torch

        import alibi_torch

        model = self.backend.model(ALiBiConfig.from_dict(config), parameters, self.dtype)
        trainer = alibi_torch.Trainer(model, Recipe.from_dict(recipe))
        states = trainer.optimizer.state
        for name, parameter in model.named_parameters():
            states[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": self.backend.put(mean[name]).to(parameter.dtype, copy=True),
                "exp_avg_sq": self.backend.put(mean_square[name]).to(parameter.dtype, copy=True),
            }
        with self.backend.settings():
            metrics = trainer.step(_batch(inputs, targets, attention_mask))
        named = dict(model.named_parameters())
        return _step_result(
            metrics,
            {name: as_numpy(each) for name, each in named.items()},
            {name: as_numpy(states[each]["exp_avg"]) for name, each in named.items()},
            {name: as_numpy(states[each]["exp_avg_sq"]) for name, each in named.items()},
        )

    def sample(self, sampling: Values, logits: Array, is_there: Array, uniform: Array) -> Arrays:
        from alibi_torch.sampling import chosen_tokens, processed

        rows, seen, drawn = map(self.backend.put, (logits, is_there, uniform))
        options = Sampling(**sampling)
        return {
            "logits": as_numpy(processed(rows, seen, options)),
            "tokens": as_numpy(chosen_tokens(rows, seen, drawn, options)),
        }


class Flax(_Backend):
    """`alibi_flax` on one JAX device; as `Torch`."""

    def __init__(self, dtype: str = "float32", device: str = "cpu") -> None:
        self.backend = FlaxBackend(device)
        self.name, self.dtype, self.device = "alibi_flax", dtype, device

    def _called(
        self,
        function: str,
        config: Values,
        arrays: tuple[Array, ...],
        slopes: Array,
        attention_mask: Mask,
    ) -> Array:
        """In the layout of Flax heads follow positions, but not in logits."""
        import alibi_flax

        with self.backend.settings(self.dtype):
            floats = [self.backend.put(each).swapaxes(1, 2).astype(self.dtype) for each in arrays]
            found = getattr(alibi_flax, function)(
                *(*floats, self.backend.put(slopes)),
                attention_mask=self.backend.put(attention_mask),
                **_options(config),
            )
        return np.asarray(found.swapaxes(1, 2) if function == "attention" else found)

    def decode(
        self,
        config: Values,
        parameters: Arrays,
        inputs: Array,
        lengths: Sequence[int],
        attention_mask: Mask = None,
    ) -> Array:
        import jax

        import alibi_flax

        options = ALiBiConfig.from_dict(config)
        model: Any = self.backend.model(options, self.dtype)
        with self.backend.settings(self.dtype):
            variables = {"params": self.backend.params(options, parameters, self.dtype)}
            call = jax.jit(lambda *part, cache: model.apply(variables, *part, cache=cache))
            cache, logits = alibi_flax.KVCache.empty(options, *inputs.shape, dtype=self.dtype), []
            for part in _parts(inputs, attention_mask, lengths):
                found, cache = call(*map(self.backend.put, part), cache=cache)
                logits.append(np.asarray(found))
        return np.concatenate(logits, axis=1)

    def train_step(
        self,
        config: Values,
        recipe: Values,
        step: int,
        parameters: Arrays,
        mean: Arrays,
        mean_square: Arrays,
        inputs: Array,
        targets: Array,
        attention_mask: Mask = None,
    ) -> Arrays:
        import jax
        import jax.numpy as jnp
        import optax

        import alibi_flax

        options = ALiBiConfig.from_dict(config)
        model = self.backend.model(options, self.dtype)
        with self.backend.settings(self.dtype):
            params, mu, nu = (
                self.backend.params(options, each, self.dtype)
                for each in (parameters, mean, mean_square)
            )
            trainer = alibi_flax.Trainer(model, params, Recipe.from_dict(recipe))

        def has_count(node: Any) -> bool:
            return isinstance(node, optax.ScaleByAdamState | optax.ScaleByScheduleState)

        def resumed(node: Any) -> Any:
            if not has_count(node):
                return node
            moments = {"mu": mu, "nu": nu} if isinstance(node, optax.ScaleByAdamState) else {}
            return node._replace(count=jnp.int32(step), **moments)

        state = trainer.optimizer_state
        trainer.optimizer_state = jax.tree.map(resumed, state, is_leaf=has_count)
        with self.backend.settings(self.dtype):
            metrics = trainer.step(_batch(inputs, targets, attention_mask))
        nodes = jax.tree.leaves(trainer.optimizer_state, is_leaf=has_count)
        adam: Any = next(node for node in nodes if isinstance(node, optax.ScaleByAdamState))
        after: Any = (trainer.params, adam.mu, adam.nu)
        return _step_result(metrics, *(canonical_tensors(tree, options) for tree in after))

    def sample(self, sampling: Values, logits: Array, is_there: Array, uniform: Array) -> Arrays:
        from alibi_flax.sampling import chosen_tokens, processed

        options = Sampling(**sampling)
        with self.backend.settings():
            rows, seen, drawn = map(self.backend.put, (logits, is_there, uniform))
            return {
                "logits": np.asarray(processed(rows, seen, options)),
                "tokens": np.asarray(chosen_tokens(rows, seen, drawn, options)),
            }


def _options(config: Values) -> dict[str, Any]:
    """Those of attention."""
    options = ALiBiConfig.from_dict(config)
    return {"causal": options.causal, "scale": options.scale, "distance": options.distance}


def _slopes(config: Values, key: Array, learned: Mask) -> Array:
    """What a model of one layer hands to attention."""
    options = ALiBiConfig.from_dict(config)
    own = model_slopes(options)[0] if learned is None else learned
    return own * np.float32(interpolation(options, key.shape[2]))


def _parts(
    inputs: Array, attention_mask: Mask, lengths: Sequence[int]
) -> Iterator[tuple[Array, Mask]]:
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        mask = None if attention_mask is None else attention_mask[:, start:end]
        yield inputs[:, start:end], mask


def _batch(inputs: Array, targets: Array, attention_mask: Mask) -> dict[str, Array]:
    batch = {"tokens": inputs, "targets": targets}
    return batch if attention_mask is None else batch | {"attention_mask": attention_mask}


def _step_result(
    metrics: Any, parameters: Arrays, mean: Arrays, mean_square: Arrays
) -> dict[str, Array]:
    found = {name: np.asarray(float(value)) for name, value in metrics._asdict().items()}
    kinds = {"parameters": parameters, "mean": mean, "mean_square": mean_square}
    for kind, arrays in kinds.items():
        found |= {f"{kind}/{name}": array for name, array in arrays.items()}
    return found
