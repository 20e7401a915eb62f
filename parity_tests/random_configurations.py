"""Random configurations and calls, and whether the reference and both backends agree on each.

A case that fails is printed as the command that runs it again:

    python -m parity_tests.random_configurations CONFIGURATION CALL

Both are JSON: the options of an `ALiBiConfig` that are not at their defaults, and a `ModelCall`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import torch

import alibi_flax
import alibi_torch
from alibi_convert.rules import canonical_tensors
from alibi_convert.tensors import as_numpy, as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.biases import DISTANCES, SLOPE_RULES, interpolation
from alibi_spec.budgets import BUDGETS
from alibi_spec.cache import Cache
from alibi_spec.checks import RefusalError, beyond_windows
from alibi_spec.config import ACTIVATIONS, HEADS, NORM_PLACEMENTS, NORMS
from alibi_spec.options import EXPONENT, FLAG, POSITIVE, RATE, kind_of
from alibi_verify.backends import FlaxBackend, TorchBackend
from parity_tests.cases import draw_inputs, draw_parameters
from parity_tests.compare import assert_gradients_within, assert_trace_within, assert_within
from parity_tests.kernel_calls import small_blocks

FLOAT64 = BUDGETS["float64", "cpu"]
Array = np.ndarray

# JAX compiles each operation once for each shape, so that few shapes serve a thousand cases.
WIDTHS = ((1, 1), (1, 6), (2, 3), (3, 2), (6, 1), (5, 2), (7, 2))  # heads and their width
SIZES = ((0, 3), (1, 1), (2, 9), (3, 40), (1, 300))  # sequences and their length
PADDINGS = ("none", "left", "right", "both", "gaps", "a whole sequence")


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """What a model reads, in words and numbers.

    Attributes:
        batch, seq: sequences, and their length.
        padding: which positions the mask hides; "none" is no mask.
        documents: packed into each sequence; 1 is no `segment_ids`.
        has_types: token types are given.
        has_gradients: gradients are compared, too.
        has_cache: it is also read in parts, with a cache.
    """

    batch: int
    seq: int
    padding: str = "none"
    documents: int = 1
    has_types: bool = False
    has_gradients: bool = False
    has_cache: bool = False

    @property
    def mask(self) -> Array | None:
        """1 for what can be seen; booleans where there are gaps."""
        mask, third = np.ones((self.batch, self.seq), np.int64), -(-self.seq // 3)
        if self.padding == "none":
            return None
        if self.padding in ("left", "both"):
            mask[:1, :third] = 0
        if self.padding in ("right", "both"):
            mask[-1:, self.seq - third :] = 0
        if self.padding == "a whole sequence":
            mask[-1:] = 0
        if self.padding == "gaps":
            return np.random.default_rng(3).random(mask.shape) < 0.7
        return mask

    def optional(self, config: ALiBiConfig) -> dict[str, Array]:
        """The other arrays that models take."""
        arrays = {}
        if self.has_types:
            types = config.type_vocab_size or 1
            arrays["token_type_ids"] = np.arange(self.batch * self.seq) % types
        if self.documents > 1:
            ends = np.arange(self.seq) * self.documents // self.seq
            arrays["segment_ids"] = np.tile(ends, self.batch)
        return {name: array.reshape(self.batch, self.seq) for name, array in arrays.items()}


# Options that take values of one of these kinds take any of them.
OF_KIND = {
    FLAG: st.booleans(),
    RATE: st.sampled_from([0.0, 0.1, 0.9]),
    POSITIVE: st.sampled_from([1e-5, 1e-3, 0.3, 1.0, 2.5]),
    EXPONENT: st.sampled_from([8.0, 1e-3, 5.5, 100.0]),
}
# Of the others these do not depend on one another.
OF_OPTION: dict[str, st.SearchStrategy[Any]] = {
    "num_layers": st.sampled_from([1, 2]),
    "max_len": st.sampled_from([1, 256]),
    "expansion_factor": st.sampled_from([1, 2]),
    "vocab_size": st.sampled_from([None, 11, 1]),
    "distance": st.sampled_from(DISTANCES),
    "attention_scale": st.sampled_from([None, 1e-3, 0.3, 5.0]),
    "attention_dropout": st.sampled_from([None, 0.0, 0.4]),
    "slope_interpolation": st.sampled_from([None, 1, 7, 1000]),
    "qkv_clip": st.sampled_from([None, 1.0, 3.0]),
    "feed_forward_dim": st.sampled_from([None, 1, 5]),
    "activation": st.sampled_from(ACTIVATIONS),
    "norm": st.sampled_from(NORMS),
    "norm_placement": st.sampled_from(NORM_PLACEMENTS),
    "type_vocab_size": st.sampled_from([None, 1, 3]),
    "head": st.sampled_from(HEADS),
}
_FREE = {
    field.name: OF_OPTION.get(field.name, OF_KIND.get(kind_of(field)))
    for field in dataclasses.fields(ALiBiConfig)
}
_DRAWN = {name: strategy for name, strategy in _FREE.items() if strategy is not None}


@st.composite
def options(draw: st.DrawFn, widths: tuple[tuple[int, int], ...] = WIDTHS) -> dict[str, Any]:
    """Every option of an `ALiBiConfig`, in any valid combination."""
    heads, head_dim = draw(st.sampled_from(widths))
    values = {name: draw(strategy) for name, strategy in _DRAWN.items()}
    values |= {"num_heads": heads, "d_model": heads * head_dim}
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    values["num_kv_heads"] = draw(st.sampled_from([None, *divisors]))
    of_layer = st.tuples(*[st.sampled_from([0.0, 1e-3, 0.3, 2.0, 1e4])] * heads)
    of_model = st.tuples(*[of_layer] * values["num_layers"])
    values["slopes"] = draw(st.sampled_from(SLOPE_RULES) | of_layer | of_model)
    cutoffs = [None, (1,), (3, 7)] if values["vocab_size"] == 11 else [None]
    values["adaptive_cutoffs"] = draw(st.sampled_from(cutoffs))
    # What contradicts something else gives way.
    if values["slopes"] == "learned" and values["distance"] == "bfloat16":
        values["slopes"] = "paper"
    values["norm_bias"] &= values["norm"] != "rms"
    values["final_norm"] &= values["norm_placement"] != "post"
    values["tie_embeddings"] |= values["head"] == "masked_lm"
    if values["adaptive_cutoffs"] is not None and values["head"] != "linear":
        values["adaptive_cutoffs"] = None
    return values


@st.composite
def cases(
    draw: st.DrawFn,
    widths: tuple[tuple[int, int], ...] = WIDTHS,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> tuple[ALiBiConfig, ModelCall]:
    """A configuration and a call of its model."""
    config = ALiBiConfig(**draw(options(widths)))
    batch, seq = draw(st.sampled_from(sizes))
    documents = draw(st.sampled_from([1, 1, 3])) if may_be_packed(config, seq) else 1
    return config, ModelCall(
        batch=batch,
        seq=seq,
        padding=draw(st.sampled_from(PADDINGS)),
        documents=documents,
        has_types=draw(st.booleans()) and may_have_types(config),
        has_gradients=draw(st.integers(0, 3)) == 0 and not is_constant(config),
        has_cache=draw(st.booleans()) and config.causal and documents == 1,
    )


def may_be_packed(config: ALiBiConfig, seq: int) -> bool:
    """Whether documents in one sequence can be computed as if each were alone (SPEC.md §4.3)."""
    return config.distance != "bfloat16" and interpolation(config, seq) == 1


def is_constant(config: ALiBiConfig) -> bool:
    """Whether LayerNorms of one number hide their inputs, so that gradients are only rounding."""
    return config.d_model == 1 and config.norm == "layer"


def may_have_types(config: ALiBiConfig) -> bool:
    return config.vocab_size is not None and config.type_vocab_size is not None


# Values that no option takes, or that only some do.
HOSTILE = (
    *(None, True, False, -1, 0, 1, 2, 3, 0.5, 1.0, -0.1, 1e300, 10**400, 2**31, float("nan")),
    *(float("inf"), "", "none", "linear", "paper", "rms", "post", "masked_lm", [], {}, (), (1,)),
    *((0.5, -1.0), ((0.5,), 0.5), (None,), ((),), {0.5}, b"ab", 1j, object, range(3)),
    *(np.array(2), np.array([1, 2]), np.int8(3), np.float32(0.5), np.bool_(True)),
)


@st.composite
def careless_options(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Options of which some were changed to whatever came to mind; the names of these."""
    values, other = draw(options()), draw(options())
    names = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True)
    changed = draw(names)
    for name in changed:
        values[name] = draw(st.just(other[name]) | st.sampled_from(HOSTILE))
    return values, changed


def is_ordinary(config: ALiBiConfig) -> bool:
    """Whether what was changed still makes a small model, whose softmax does not blow up rounding.

    A score that is multiplied by 2^31 is off by 2^-53 · 2^31, and so is a probability.
    """
    sizes = (config.d_model, config.num_layers, config.ffn_dim, config.output_dim)
    return max(*sizes, config.type_vocab_size or 0) < 100 and config.scale < 100


class Model(ABC):
    """A model of one backend in float64, in NumPy terms."""

    def __init__(self, config: ALiBiConfig, implementation: str) -> None:
        self.config = config
        self.implementation = implementation
        self.parameters = draw_parameters(config)

    @abstractmethod
    def trace(self, inputs: Array, mask: Array | None, **types: Array) -> dict[str, Array]:
        """Every intermediate."""

    @abstractmethod
    def output(self, inputs: Array, mask: Array | None, **arrays: Array) -> Array:
        """Logits, or hidden states."""

    @abstractmethod
    def gradients(
        self, cotangent: Array, inputs: Array, mask: Array | None, **arrays: Array
    ) -> dict[str, Array]:
        """Of Σ cotangent · output with respect to every parameter."""

    @abstractmethod
    def read(self, parts: list[tuple[Array, Array | None, dict[str, Array]]]) -> list[Array]:
        """The outputs of one part after the other, with a cache."""


class TorchModel(Model):
    def __init__(self, config: ALiBiConfig, implementation: str) -> None:
        super().__init__(config, implementation)
        self.model = TorchBackend().model(config, self.parameters, "float64", implementation)

    def trace(self, inputs: Array, mask: Array | None, **types: Array) -> dict[str, Array]:
        arguments, named = self._placed(inputs, mask, types)
        with torch.no_grad(), small_blocks():
            found = alibi_torch.trace(self.model, *arguments, **named)
        return {name: as_numpy(value) for name, value in found.items()}

    def output(self, inputs: Array, mask: Array | None, **arrays: Array) -> Array:
        arguments, named = self._placed(inputs, mask, arrays)
        with torch.no_grad(), small_blocks():
            return as_numpy(self.model(*arguments, **named))

    def gradients(
        self, cotangent: Array, inputs: Array, mask: Array | None, **arrays: Array
    ) -> dict[str, Array]:
        arguments, named = self._placed(inputs, mask, arrays)
        parameters = dict(self.model.named_parameters())
        with small_blocks():
            total = (self.model(*arguments, **named) * as_torch(cotangent)).sum()
            found = torch.autograd.grad(
                total, list(parameters.values()), allow_unused=True, materialize_grads=True
            )
        return dict(zip(parameters, map(as_numpy, found), strict=True))

    def read(self, parts: list[tuple[Array, Array | None, dict[str, Array]]]) -> list[Array]:
        capacity = sum(inputs.shape[1] for inputs, _, _ in parts)
        cache = alibi_torch.KVCache.empty(self.config, len(parts[0][0]), capacity)
        outputs = []
        for inputs, mask, arrays in parts:
            arguments, named = self._placed(inputs, mask, arrays)
            with torch.no_grad(), small_blocks():
                output, cache = self.model(*arguments, **named, cache=cache)
            outputs.append(as_numpy(output))
        return outputs

    def _placed(self, inputs: Array, mask: Array | None, named: Mapping[str, Array]) -> Any:
        given = as_torch(inputs if self.config.vocab_size else inputs.astype(np.float64))
        mask_given = None if mask is None else as_torch(mask)
        return (given, mask_given), {name: as_torch(array) for name, array in named.items()}


class FlaxModel(Model):
    def __init__(self, config: ALiBiConfig, implementation: str) -> None:
        super().__init__(config, implementation)
        self.backend = FlaxBackend()
        self.model = self.backend.model(config, "float64", implementation)
        with self.backend.settings("float64"):
            self.params = self.backend.params(config, self.parameters, "float64")

    def trace(self, inputs: Array, mask: Array | None, **types: Array) -> dict[str, Array]:
        with self.backend.settings("float64"):
            arguments, named = self._placed(inputs, mask, types)
            found = alibi_flax.trace(self.model, self.params, *arguments, **named)
        return {name: np.asarray(value) for name, value in found.items()}

    def output(self, inputs: Array, mask: Array | None, **arrays: Array) -> Array:
        with self.backend.settings("float64"):
            arguments, named = self._placed(inputs, mask, arrays)
            return np.asarray(self.model.apply({"params": self.params}, *arguments, **named))

    def gradients(
        self, cotangent: Array, inputs: Array, mask: Array | None, **arrays: Array
    ) -> dict[str, Array]:
        with self.backend.settings("float64"):
            arguments, named = self._placed(inputs, mask, arrays)

            def output(params: Any) -> Any:
                return self.model.apply({"params": params}, *arguments, **named)

            (found,) = jax.vjp(output, self.params)[1](self.backend.put(cotangent))
        return canonical_tensors(found, self.config)

    def read(self, parts: list[tuple[Array, Array | None, dict[str, Array]]]) -> list[Array]:
        capacity, outputs = sum(inputs.shape[1] for inputs, _, _ in parts), []
        with self.backend.settings("float64"):
            cache = alibi_flax.KVCache.empty(
                self.config, len(parts[0][0]), capacity, dtype="float64"
            )
            for inputs, mask, arrays in parts:
                arguments, named = self._placed(inputs, mask, arrays)
                output, cache = self.model.apply(
                    {"params": self.params}, *arguments, **named, cache=cache
                )
                outputs.append(np.asarray(output))
        return outputs

    def _placed(self, inputs: Array, mask: Array | None, named: Mapping[str, Array]) -> Any:
        put = self.backend.put
        given = put(inputs if self.config.vocab_size else inputs.astype(np.float64))
        return (given, put(mask)), {name: put(array) for name, array in named.items()}


MODELS: dict[str, tuple[type[Model], tuple[str, ...]]] = {
    "torch": (TorchModel, alibi_torch.attention_implementations()),
    "flax": (FlaxModel, alibi_flax.attention_implementations()),
}
ELSEWHERE = ("flex", "flash_attn", "pallas_tpu", "pallas_gpu")  # kernels for other devices


def check(config: ALiBiConfig, call: ModelCall) -> None:
    """The reference, both backends and all of their kernels agree in float64.

    Raises:
        AssertionError: they do not; the message ends in the command that shows it again.
        ValueError: one of them refuses the case.
    """
    try:
        _check_outputs(config, call)
        if call.has_gradients:
            _check_gradients(config, call)
        if call.has_cache:
            _check_cache(config, call)
    except Exception as error:
        error.add_note(reproduction(config, call))
        raise


def reproduction(config: ALiBiConfig, call: ModelCall) -> str:
    """The command that checks one case again, in two lines."""
    default = ALiBiConfig().to_dict()
    values = {name: each for name, each in config.to_dict().items() if each != default[name]}
    command = f"python -m parity_tests.random_configurations {shlex.quote(json.dumps(values))}"
    return f"{command} \\\n  {shlex.quote(json.dumps(dataclasses.asdict(call)))}"


def _check_outputs(config: ALiBiConfig, call: ModelCall) -> None:
    inputs, arrays = draw_inputs(config, batch=call.batch, seq=call.seq), call.optional(config)
    exact = reference_forward(config, draw_parameters(config), inputs, call.mask, **arrays)
    output = exact.get("logits", exact["output"])
    for name, (model, implementations) in MODELS.items():
        if call.documents == 1:
            found = model(config, "auto").trace(inputs, call.mask, **arrays)
            assert_trace_within(config, found, exact, FLOAT64, "float64", name)
        for each in implementations:
            _unless_refused(
                *(config, call, each, f"{name} {each}"),
                lambda each=each, model=model: model(config, each).output(
                    inputs, call.mask, **arrays
                ),
                lambda found, what: assert_within(found, output, FLOAT64.forward, what),
            )


def _check_gradients(config: ALiBiConfig, call: ModelCall) -> None:
    """Against those of torch's dense attention."""
    inputs, arrays = draw_inputs(config, batch=call.batch, seq=call.seq), call.optional(config)
    rng = np.random.default_rng(2)
    cotangent = rng.standard_normal((call.batch, call.seq, config.output_dim))
    exact = TorchModel(config, "dense").gradients(cotangent, inputs, call.mask, **arrays)
    for name, (model, implementations) in MODELS.items():
        for each in implementations:
            _unless_refused(
                *(config, call, each, f"{name} {each}"),
                lambda each=each, model=model: model(config, each).gradients(
                    cotangent, inputs, call.mask, **arrays
                ),
                lambda found, what: assert_gradients_within(found, exact, FLOAT64.gradient, what),
            )


def _unless_refused(
    config: ALiBiConfig,
    call: ModelCall,
    implementation: str,
    what: str,
    compute: Callable[[], Any],
    compare: Callable[[Any, str], Any],
) -> None:
    """Compare what a kernel computes, or see that it had a reason not to."""
    try:
        found = compute()
    except RefusalError as refusal:
        has_learned_slopes = call.has_gradients and config.slopes == "learned"
        if (
            implementation in ELSEWHERE
            or (implementation != "dense" and beyond_windows(config.distance, config.causal))
            or (implementation == "aten_flash" and has_learned_slopes)
        ):
            return
        raise AssertionError(f"{what} refuses without need: {refusal.reason}") from None
    compare(found, what)


def _check_cache(config: ALiBiConfig, call: ModelCall) -> None:
    """Each part as by the reference with a cache; and, unless slopes go by the length, as whole."""
    inputs, arrays = draw_inputs(config, batch=call.batch, seq=call.seq), call.optional(config)
    ends = sorted({0, call.seq // 2, min(call.seq, call.seq // 2 + 1), call.seq})
    parts = []
    for start, end in itertools.pairwise(ends):
        mask = None if call.mask is None else call.mask[:, start:end]
        its_arrays = {name: array[:, start:end] for name, array in arrays.items()}
        parts.append((inputs[:, start:end], mask, its_arrays))
    parameters = draw_parameters(config)
    cache, exact = Cache.empty(config, call.batch), []
    for part, mask, its_arrays in parts:
        trace = reference_forward(config, parameters, part, mask, **its_arrays, cache=cache)
        cache = cache.extended(trace, mask)
        exact.append(trace.get("logits", trace["output"]))
    if interpolation(config, call.seq) == 1:
        whole = reference_forward(config, parameters, inputs, call.mask, **arrays)
        whole = whole.get("logits", whole["output"])
        found = np.concatenate(exact, axis=1)
        assert_within(found, whole, FLOAT64.forward, "reference, cached")
    for name, (model, _) in MODELS.items():
        found = model(config, "auto").read(parts)
        for number, (output, expected) in enumerate(zip(found, exact, strict=True)):
            what = f"{name}, cached, part {number}"
            assert_within(output, expected, FLOAT64.forward, what)


def main(arguments: list[str]) -> int:
    """Check the case that is given."""
    options, call = map(json.loads, arguments)
    check(ALiBiConfig.from_dict(options), ModelCall(**call))
    print("all agree")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
