"""Every implementation of a model against the float64 reference, tensor by tensor.

Where one leaves its budget, the first tensor that does is named, the place in it, and the likely
cause (`explanations.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Unpack

import numpy as np

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.formats.config_file import OURS
from alibi_convert.tensors import DTYPES, LazyTensor, paired_chunks
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.biases import interpolation
from alibi_spec.budgets import (
    BUDGETS,
    Budget,
    activation_deviations,
    gradient_floor,
    relative_error,
)
from alibi_spec.checks import RefusalError
from alibi_spec.parameters import parameter_names
from alibi_spec.reference import Reference
from alibi_verify.backends import Backend
from alibi_verify.explanations import (
    EVERY_KIND,
    EXPLANATIONS,
    Arrays,
    Cause,
    Explanation,
    explain,
    kind_of,
    with_parameters,
)
from alibi_verify.implementations import Implementation, absences, present
from alibi_verify.inputs import narrowed
from alibi_verify.peers import peer_outputs, why_no_peer

REFERENCE = "reference"
_UNUSED = ("probabilities", "value")  # of a reference's trace; half of its memory
_UNSEEN = (*_UNUSED, "query", "key")  # of the backends
_ARCHITECTURE = ("num_heads", "num_kv_heads", "vocab_size", "head")


@dataclass(frozen=True)
class Place:
    """Where a tensor deviates most; None for what the tensor does not have.

    Attributes:
        row, position: the sequence and the token.
        head: of biased logits, and of attention without an output projection.
        key: the position of the key, of biased logits.
    """

    row: int
    position: int
    head: int | None = None
    key: int | None = None


@dataclass(frozen=True)
class Run:
    """What one implementation made of the inputs, against A's reference.

    Attributes:
        name: backend and device, and the implementation of attention.
        dtype: of parameters and computation; the reference computes in float64.
        budget: error that is allowed in activations.
        errors: of every activation, in the order of computation.
        places: where each of them deviates most.
        gradient_budget: error that is allowed in gradients.
        gradients: errors of every parameter's, in the order of the backward pass; empty if they
            were not asked for.
        causes: of the first activation past its budget, the likeliest first.
    """

    name: str
    dtype: str
    budget: float
    errors: Mapping[str, float]
    places: Mapping[str, Place]
    gradient_budget: float
    gradients: Mapping[str, float]
    causes: tuple[Cause, ...]

    @property
    def first(self) -> str | None:
        """The first activation past its budget, in the order of computation."""
        return _first_past(self.errors, self.budget)

    @property
    def first_gradient(self) -> str | None:
        """The first gradient past its budget, in the order of the backward pass."""
        return _first_past(self.gradients, self.gradient_budget)

    @property
    def by_stage(self) -> dict[str, float]:
        """The worst error of the embedding, of each layer by its number, of output and logits."""
        worst: dict[str, float] = {}
        for name, error in self.errors.items():
            stage = name.split(".")[1] if name.startswith("layers.") else name
            worst[stage] = max(worst.get(stage, 0.0), error)
        return worst

    @property
    def passed(self) -> bool:
        """Nothing is past its budget."""
        return self.first is None and self.first_gradient is None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is infinite or NaN is None."""
        follows = {"first": self.first, "first_gradient": self.first_gradient}
        return _finite(asdict(self) | follows | {"passed": self.passed})


@dataclass(frozen=True)
class Skipped:
    """What was not run, and why: all dtypes, if it says none."""

    name: str
    reason: str
    dtype: str | None = None


@dataclass(frozen=True)
class ParameterDifference:
    """How a tensor differs between two checkpoints.

    Attributes:
        elements: that differ, of `size`.
        largest: difference of any element.
    """

    elements: int
    size: int
    largest: float


class Parity:
    """Two checkpoints, or one, to be compared with the reference of the first.

    Args:
        source: A, whose reference is the truth; anything that `open_checkpoint` reads.
        other: B, which is run; None is A.
        reading: as for `open_checkpoint`; step, revision and adapter apply only to A.

    Attributes:
        ours, theirs: A and B, opened; the same object if there is only A.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        ValueError: A and B are of different architectures.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        other: str | os.PathLike[str] | None = None,
        **reading: Unpack[Reading],
    ) -> None:
        self.ours = self.theirs = open_checkpoint(source, **reading)
        if other is not None:
            self.theirs = open_checkpoint(
                other, **{**reading, "step": None, "revision": None, "adapter": None}
            )
            _require_one_architecture(self.ours, self.theirs)

    @cached_property
    def settings(self) -> dict[str, tuple[Any, Any]]:
        """The options in which the configurations of A and B differ, with both values."""
        ours, theirs = self.ours.config.to_dict(), self.theirs.config.to_dict()
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    @cached_property
    def parameters(self) -> dict[str, ParameterDifference]:
        """The parameters in which A and B differ, read a few megabytes at a time."""
        if self.ours is self.theirs:
            return {}
        ours, theirs = self.ours.tensors.headers, self.theirs.tensors.headers
        names = parameter_names(self.ours.config)
        found = {name: _difference(ours[name], theirs[name]) for name in names}
        return {name: each for name, each in found.items() if each.elements}

    def runs(
        self,
        inputs: np.ndarray,
        attention_mask: np.ndarray,
        *,
        dtypes: Collection[str] = ("float32",),
        implementations: Collection[str] = (),
        gradients: bool = False,
        seed: int = 0,
    ) -> Iterator[Run | Skipped]:
        """What each implementation makes of the inputs, each as soon as it is known.

        Args:
            inputs: tokens [batch, seq], or embeddings [batch, seq, d_model] without a vocabulary.
            attention_mask: [batch, seq], 0 for padding.
            dtypes: of parameters and computation. The reference computes from parameters as this
                dtype holds them.
            implementations: only these, by their names ("torch-cpu dense") or the first word.
            gradients: of all parameters, too.
            seed: of what is summed up for gradients.

        Raises:
            ValueError: inputs that are not the model's, or no such implementation.
        """
        named = self._implementations()
        chosen = [name for name in named if _is_chosen(name, implementations)]
        for each in implementations:
            if not any(_is_chosen(name, [each]) for name in named):
                known = ", ".join(named)
                raise ValueError(f"{each!r} is no implementation here; expected one of: {known}")
        if not implementations:
            yield from (Skipped(name, reason) for name, reason in absences().items())
        for dtype in dtypes:
            truth = _Truth(self, inputs, attention_mask, dtype, gradients, seed)
            for name in chosen:
                yield named[name](truth, name)

    def to_dict(self, runs: Collection[Run], skipped: Collection[Skipped]) -> dict[str, Any]:
        """What was compared, and with what result, for JSON; what is not finite is None."""
        return {
            "checkpoints": [str(self.ours.path), str(self.theirs.path)],
            "settings": {name: list(values) for name, values in self.settings.items()},
            "parameters": {name: _finite(asdict(each)) for name, each in self.parameters.items()},
            "runs": [each.to_dict() for each in runs],
            "not_run": [asdict(each) for each in skipped],
        }

    def _implementations(self) -> dict[str, Callable[[_Truth, str], Run | Skipped]]:
        """How to run each by its name: B, and the libraries of both families."""
        found: dict[str, Callable[[_Truth, str], Run | Skipped]] = {}
        if self.theirs is not self.ours:
            found[REFERENCE] = self._by_reference
        for each in present():
            for attention in each.create().attention_implementations():
                run = partial(self._by_backend, each, attention)
                found[f"{each.name} {attention}"] = run
        for letter, checkpoint in (("A", self.ours), ("B", self.theirs)):
            if checkpoint.family != OURS and (letter == "A" or checkpoint is not self.ours):
                of_both = "" if self.ours is self.theirs else f" of {letter}"
                name = f"transformers' {checkpoint.family}{of_both}"
                found[name] = partial(_by_its_library, checkpoint)
        return found

    def _by_reference(self, truth: _Truth, name: str) -> Run:
        """In float64, from parameters as this dtype holds them."""
        config = self.theirs.config
        tensors = narrowed(config, self.theirs.tensors, truth.dtype)
        found = reference_forward(config, tensors, truth.inputs, truth.attention_mask)
        return truth.judge(name, found, BUDGETS["float64", "cpu"], {})

    def _by_backend(
        self, each: Implementation, attention: str, truth: _Truth, name: str
    ) -> Run | Skipped:
        budget = BUDGETS.get((truth.dtype, each.platform))
        if budget is None:
            reason = f"there is no budget for {truth.dtype} on a {each.platform}"
            return Skipped(name, reason, truth.dtype)
        config, backend = self.theirs.config, each.create()
        tensors = narrowed(config, self.theirs.tensors, truth.dtype)
        arguments = (config, tensors, truth.inputs, truth.attention_mask)
        try:
            found = backend.trace(*arguments, truth.dtype, attention)
        except RefusalError as refusal:
            return Skipped(name, refusal.reason, truth.dtype)
        gradients: Arrays = {}
        if truth.exact_gradients:
            gradients = backend.gradients(*arguments, truth.cotangent, truth.dtype, attention)
        return truth.judge(name, found, budget, gradients)


def _by_its_library(checkpoint: Checkpoint, truth: _Truth, name: str) -> Run | Skipped:
    """Logits of real positions: its library defines no others."""
    reason = why_no_peer(checkpoint)
    if truth.dtype != "float32":
        reason = "only float32 is asked of it"
    if reason is not None:
        return Skipped(name, reason, truth.dtype)
    logits = peer_outputs(checkpoint, truth.inputs, truth.attention_mask, truth.dtype)
    real = truth.attention_mask[..., None] != 0
    found = {"logits": np.where(real, logits, truth.exact["logits"])}
    return truth.judge(name, found, BUDGETS[truth.dtype, "cpu"], {})


class _Truth:
    """A's reference on these inputs, from parameters and embeddings that a dtype can hold."""

    def __init__(
        self,
        parity: Parity,
        inputs: np.ndarray,
        attention_mask: np.ndarray,
        dtype: str,
        gradients: bool,
        seed: int,
    ) -> None:
        self.parity, config = parity, parity.ours.config
        if config.vocab_size is None:
            inputs = inputs.astype(DTYPES[dtype]).astype(np.float64)
        self.inputs, self.attention_mask, self.dtype = inputs, attention_mask, dtype
        tensors = narrowed(config, parity.ours.tensors, dtype)
        slope_factor = interpolation(config, inputs.shape[1])
        self.model = Reference(config, tensors, slope_factor, attention_mask)
        trace = reference_forward(config, tensors, inputs, attention_mask)
        self.exact = {name: array for name, array in trace.items() if kind_of(name) not in _UNUSED}
        rng, shape = np.random.default_rng(seed), inputs.shape[:2]
        self.cotangent = rng.standard_normal((*shape, config.output_dim))
        self.exact_gradients: Arrays = {}
        if gradients:
            arguments = (config, tensors, inputs, attention_mask, self.cotangent)
            self.exact_gradients = _host_backend().gradients(*arguments, "float64", "dense")

    def judge(self, name: str, found: Arrays, budget: Budget, gradients: Arrays) -> Run:
        """Compare, and look for the cause of what is past the budget."""
        config = self.model.config
        errors, places = {}, {}
        for tensor in self.exact:
            if tensor in found and kind_of(tensor) not in _UNSEEN:
                deviations = activation_deviations(config, tensor, found[tensor], self.exact)
                errors[tensor] = float(deviations.max(initial=0.0))
                places[tensor] = _place(config, tensor, deviations)
        first, causes = _first_past(errors, budget.forward), ()
        if first is not None and "embedding" in found:
            causes = self._causes(first, found, budget.forward)
        floor = gradient_floor(self.exact_gradients) if gradients else 0.0
        of_gradients = {
            parameter: relative_error(
                gradients[parameter].astype(np.float64), self.exact_gradients[parameter], floor
            )
            for parameter in reversed(list(gradients))
        }
        return Run(
            *(name, self.dtype, budget.forward, errors, places),
            *(budget.gradient, of_gradients, causes),
        )

    def _causes(self, first: str, found: Arrays, budget: float) -> tuple[Cause, ...]:
        """Known mistakes; else, whether what B has of its own is the cause."""
        arguments = (self.model, self.inputs, first, found, budget)
        known = explain(*arguments, EXPLANATIONS)
        if known and known[0].reproduces:
            return known
        own = explain(*arguments, _differences_as_causes(self.parity))
        return own[:1] if own and own[0].reproduces else known


def _differences_as_causes(parity: Parity) -> tuple[Explanation, ...]:
    """That B has other parameters, or another configuration."""
    if parity.ours is parity.theirs:
        return ()

    def parameters(model: Reference, prefix: str) -> Reference:
        in_place = [
            name
            for name in parity.parameters
            if (name.startswith(prefix) if prefix else "layers." not in name)
        ]
        tensors = parity.theirs.tensors
        return with_parameters(model, {name: tensors[name] for name in in_place})

    def configuration(model: Reference, _: str) -> Reference:
        return replace(model, config=parity.theirs.config)

    def both(model: Reference, prefix: str) -> Reference:
        return configuration(parameters(model, prefix), prefix)

    return (
        Explanation("parameters that have other values in B", EVERY_KIND, parameters),
        Explanation("another configuration of B", EVERY_KIND, configuration),
        Explanation("parameters and configuration of B, which are others", EVERY_KIND, both),
    )


def _host_backend() -> Backend:
    """What computes gradients in float64."""
    return next(each for each in present() if each.platform == "cpu").create()


def _place(config: ALiBiConfig, name: str, deviations: np.ndarray) -> Place:
    where = [int(i) for i in np.unravel_index(int(deviations.argmax()), deviations.shape)]
    if name.endswith(".biased_logits"):
        row, head, position, key = where
        return Place(row, position, head, key)
    row, position, channel = where
    is_by_head = name.endswith(".attn") and not config.output_projection
    return Place(row, position, channel // config.head_dim if is_by_head else None)


def _first_past(errors: Mapping[str, float], budget: float) -> str | None:
    return next((name for name, error in errors.items() if not error <= budget), None)


def _is_chosen(name: str, implementations: Collection[str]) -> bool:
    return not implementations or name in implementations or name.split()[0] in implementations


def _require_one_architecture(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Raise ValueError unless every tensor of one has its like in the other."""
    mine, others = ours.tensors.shapes, theirs.tensors.shapes
    ours_of = {name: getattr(ours.config, name) for name in _ARCHITECTURE} | mine
    theirs_of = {name: getattr(theirs.config, name) for name in _ARCHITECTURE} | others
    differences = [
        f"{name} is {theirs_of.get(name, 'absent')}, expected {ours_of.get(name, 'absent')}"
        for name in ours_of | theirs_of
        if ours_of.get(name) != theirs_of.get(name)
    ]
    if differences:
        raise ValueError(
            f"{theirs.path} is of another architecture than {ours.path}: {differences[0]}; "
            "compare each with itself"
        )


def _difference(mine: LazyTensor, other: LazyTensor) -> ParameterDifference:
    elements, largest = 0, 0.0
    for ours, theirs in paired_chunks(mine.chunks(), other.chunks()):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        differs = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
        elements += int(differs.sum())
        with np.errstate(invalid="ignore"):  # infinities
            distances = np.abs(ours - theirs)[differs]
        largest = max(largest, float(np.nan_to_num(distances, nan=np.inf).max(initial=0.0)))
    return ParameterDifference(elements, mine.size, largest)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
