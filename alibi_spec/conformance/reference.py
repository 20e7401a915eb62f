"""The float64 reference as an implementation of the protocol: what it returns is expected."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alibi_spec import training
from alibi_spec.biases import interpolation, model_slopes
from alibi_spec.cache import Cache
from alibi_spec.config import ALiBiConfig
from alibi_spec.conformance.differences import gradients
from alibi_spec.masks import masked_softmax
from alibi_spec.parameters import Parameter, parameter_table, pattern_shape
from alibi_spec.reference import biased_logits, reference_forward, shared_heads
from alibi_spec.sampling import Sampling, drawn_tokens, processed, uniforms

Array = np.ndarray
Arrays = Mapping[str, np.ndarray]
_LEFT_OUT = ("value", "probabilities")  # follow from what is kept


class Reference:
    """`alibi_spec`, in float64; an `Implementation`."""

    name = "alibi_spec"
    dtype = "float32"  # to which its results are rounded
    device = "cpu"

    def biased_logits(
        self,
        config: Mapping[str, Any],
        query: Array,
        key: Array,
        slopes: Array | None = None,
        attention_mask: Array | None = None,
    ) -> Array:
        options = ALiBiConfig.from_dict(config)
        own = model_slopes(options)[0] if slopes is None else slopes
        return biased_logits(
            *(query, key, own * np.float32(interpolation(options, key.shape[2]))),
            causal=options.causal,
            scale=options.scale,
            attention_mask=attention_mask,
            distance=options.distance,
        )

    def attention(
        self,
        config: Mapping[str, Any],
        query: Array,
        key: Array,
        value: Array,
        slopes: Array | None = None,
        attention_mask: Array | None = None,
    ) -> Array:
        logits = self.biased_logits(config, query, key, slopes, attention_mask)
        return masked_softmax(logits) @ shared_heads(value.astype(np.float64), query.shape[1])

    def forward(
        self,
        config: Mapping[str, Any],
        parameters: Arrays,
        inputs: Array,
        attention_mask: Array | None = None,
    ) -> Arrays:
        trace = reference_forward(ALiBiConfig.from_dict(config), parameters, inputs, attention_mask)
        return {
            name: array for name, array in trace.items() if name.rpartition(".")[2] not in _LEFT_OUT
        }

    def gradients(
        self,
        config: Mapping[str, Any],
        parameters: Arrays,
        inputs: Array,
        cotangent: Array,
        attention_mask: Array | None = None,
    ) -> Arrays:
        def value(moved: Arrays) -> float:
            trace = self.forward(config, moved, inputs, attention_mask)
            return float((cotangent * trace.get("logits", trace["output"])).sum())

        return gradients(value, parameters)

    def decode(
        self,
        config: Mapping[str, Any],
        parameters: Arrays,
        inputs: Array,
        lengths: Sequence[int],
        attention_mask: Array | None = None,
    ) -> Array:
        options = ALiBiConfig.from_dict(config)
        cache, logits = Cache.empty(options, len(inputs)), []
        for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            mask = None if attention_mask is None else attention_mask[:, start:end]
            trace = reference_forward(options, parameters, inputs[:, start:end], mask, cache=cache)
            cache = cache.extended(trace, mask)
            logits.append(trace["logits"])
        return np.concatenate(logits, axis=1)

    def train_step(
        self,
        config: Mapping[str, Any],
        recipe: Mapping[str, Any],
        step: int,
        parameters: Arrays,
        mean: Arrays,
        mean_square: Arrays,
        inputs: Array,
        targets: Array,
        attention_mask: Array | None = None,
    ) -> Arrays:
        options = training.Recipe.from_dict(recipe)

        def loss(moved: Arrays) -> float:
            logits = self.forward(config, moved, inputs, attention_mask)["logits"]
            total, count = training.negative_log_likelihood(logits, targets)
            return total / count

        clipped, norm = training.clipped_gradients(
            gradients(loss, parameters), options.max_grad_norm
        )
        new, state = training.adamw_update(
            *(ALiBiConfig.from_dict(config), options, parameters, clipped),
            training.AdamWState(step, mean, mean_square),
        )
        rate = training.learning_rates(options)[min(step, options.steps - 1)]
        return {
            "loss": np.asarray(loss(parameters)),
            "grad_norm": np.asarray(norm),
            "learning_rate": np.asarray(rate),
            **_prefixed("parameters", new),
            **_prefixed("mean", state.mean),
            **_prefixed("mean_square", state.mean_square),
        }

    def sample(
        self, sampling: Mapping[str, Any], logits: Array, is_there: Array, uniform: Array
    ) -> Arrays:
        kept = processed(logits, is_there, Sampling(**sampling))
        return {"logits": kept, "tokens": drawn_tokens(kept, uniform)}

    def uniforms(self, seed: int, rows: int, steps: int) -> Array:
        return np.stack(list(itertools.islice(uniforms(seed, rows), steps)))

    def to_flax(self, config: Mapping[str, Any], parameters: Arrays) -> Arrays:
        table = parameter_table(ALiBiConfig.from_dict(config))
        return {"/".join(row.flax_path): _flax_layout(row, parameters[row.name]) for row in table}


def _prefixed(prefix: str, arrays: Arrays) -> dict[str, Array]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _flax_layout(row: Parameter, array: Array) -> Array:
    """What the pattern says, by NumPy alone: split axes, then order them."""
    torch_axes, flax_axes = (re.findall(r"\w+", side) for side in row.pattern.split("->"))
    split = array.reshape(pattern_shape(" ".join(torch_axes), row.axis_sizes))
    return split.transpose([torch_axes.index(axis) for axis in flax_axes])
