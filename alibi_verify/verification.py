"""Prove that a model computes the same in both backends, and that two checkpoints are one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import numpy as np

from alibi_convert.checkpoint import Checkpoint, Reading, open_checkpoint
from alibi_convert.comparison import first_difference, relation
from alibi_convert.formats.config_file import OURS
from alibi_convert.machine import require
from alibi_convert.rules import canonical_tensors, flax_tree
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS, Budget, activation_errors, gradient_floor, relative_error
from alibi_spec.exact import exact_attention
from alibi_verify.backends import Backend, FlaxBackend, TorchBackend
from alibi_verify.inputs import padding_of, random_inputs
from alibi_verify.logits import output_errors
from alibi_verify.peers import why_no_peer

_BUDGET = BUDGETS["float32", "cpu"]


@dataclass(frozen=True)
class Check:
    """One statement that was tested.

    Attributes:
        name: the statement.
        passed: whether it held.
        measured: the measurement, in words and figures.
    """

    name: str
    passed: bool
    measured: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; it passed if every check did."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Every check held."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify(
    source: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    inputs: np.ndarray | None = None,
    new_tokens: int = 256,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> Verification:
    """Compare a checkpoint, run by PyTorch, with a second one (or itself), run by Flax, on the CPU.

    Both are also compared with the float64 reference, in float32, with padding on either side. If
    one is the other after a rounding cast, bit for bit, its activations may differ by the budget of
    its dtype; the other checks then run one checkpoint in both backends.

    Args:
        source: what PyTorch runs; anything that `open_checkpoint` reads.
        other: what Flax runs; None is `source`.
        inputs: tokens [batch, seq] (embeddings [batch, seq, d_model] without a vocabulary) for the
            comparison of activations; None draws three random sequences past `max_len`.
        new_tokens: length of the greedy continuation that must agree.
        seed: of all random numbers.
        reading: config, allow_pt, ignore_keys, step, revision and adapter, as for
            `open_checkpoint`; the last three apply only to `source`.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        ValueError: a backend is not installed.
    """
    return Verification(tuple(verify_steps(source, other, inputs, new_tokens, seed, **reading)))


def verify_steps(
    source: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    inputs: np.ndarray | None = None,
    new_tokens: int = 256,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> Iterator[Check]:
    """The checks of `verify` one by one, each as soon as it is known."""
    require("torch", "torch", "verify")
    require("flax", "flax", "verify")
    ours = open_checkpoint(source, **reading)
    theirs = ours
    if other is not None:
        theirs = open_checkpoint(
            other, **{**reading, "step": None, "revision": None, "adapter": None}
        )
    budget, rounded, note = _BUDGET, None, ""
    if other is not None:
        found = relation(ours, theirs)
        how = "bitwise the cast" if found.dtype else "bitwise"
        measured = found.difference or f"{len(ours.tensors)} tensors, {how}"
        yield Check(found.statement, found.difference is None, measured)
        if ours.config != theirs.config or ours.tensors.shapes != theirs.tensors.shapes:
            return  # nothing further can be compared
        rounded = found.rounded
        if rounded is not None:
            when = "after" if rounded is theirs else "before"
            budget, note = BUDGETS[found.dtype, "cpu"], f", {when} rounding to {found.dtype}"
    yield _round_trip(ours)
    foreign, plain = (theirs, ours) if ours.family == OURS else (ours, theirs)
    if foreign.family != OURS and why_no_peer(foreign) is None:
        yield _against_its_own_library(foreign, plain if rounded is None else foreign)
    yield _exact_logits(ours.config, seed)
    rng = np.random.default_rng(seed)
    if inputs is None:
        inputs = random_inputs(ours.config, 3, min(ours.config.max_len + 64, 320), rng)
    attention_mask = padding_of(*inputs.shape[:2])
    exact = reference_forward(ours.config, ours.tensors, inputs, attention_mask)
    yield _activations(TorchBackend(), ours, inputs, attention_mask, exact, _BUDGET)
    yield _activations(FlaxBackend(), theirs, inputs, attention_mask, exact, budget, note)
    pair = (ours, theirs) if rounded is None else (rounded, rounded)
    yield _gradients(*pair, inputs, attention_mask, rng)
    is_lm = ours.config.vocab_size is not None and ours.config.head == "linear"
    if is_lm and ours.config.causal:
        yield _generation(*pair, inputs[:1, :32], new_tokens)


def _round_trip(checkpoint: Checkpoint) -> Check:
    config = checkpoint.config
    back = canonical_tensors(flax_tree(checkpoint.tensors, config), config)
    found = Checkpoint(checkpoint.path, "", "", config, Tensors.of(back), {})
    difference = first_difference(checkpoint, found)
    measured = difference or f"{len(back)} tensors, bitwise"
    return Check("parameters survive torch -> Flax -> torch", difference is None, measured)


def _against_its_own_library(foreign: Checkpoint, other: Checkpoint) -> Check:
    found = output_errors(foreign, other)
    measured = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
    measured += ", all from the same files" if other is foreign else ""
    return Check(
        f"outputs are those of {found.against} within {_BUDGET.forward:.0e}",
        max(found.errors.values()) <= _BUDGET.forward,
        measured + (" in float64" if found.dtype == "float64" else ""),
    )


def _exact_logits(config: ALiBiConfig, seed: int) -> Check:
    case = exact_attention(config, seed=seed)
    wrong = []
    for backend in (TorchBackend(), FlaxBackend()):
        logits = backend.exact_logits(case)
        differing = int((logits.view(np.uint32) != case.biased_logits.view(np.uint32)).sum())
        if differing:
            wrong.append(f"{backend.name} differs in {differing}")
    count = f"{case.biased_logits.size} logits"
    measured = f"of {count}: {', '.join(wrong)}" if wrong else f"{count}, bitwise"
    return Check(
        "biased logits on exact inputs are those of the specification", not wrong, measured
    )


def _activations(
    backend: Backend,
    checkpoint: Checkpoint,
    inputs: np.ndarray,
    attention_mask: np.ndarray,
    exact: Mapping[str, np.ndarray],
    budget: Budget,
    note: str = "",
) -> Check:
    config = checkpoint.config
    last = "logits" if "logits" in exact else "output"
    found = backend.trace(config, checkpoint.tensors, inputs, attention_mask, "float32")
    errors = activation_errors(config, found, exact)
    outside = [name for name, error in errors.items() if not error <= budget.forward]
    measured = (
        f"first outside: {outside[0]} at {errors[outside[0]]:.1e}"
        if outside
        else f"{last} {errors[last]:.1e}, worst {max(errors.values()):.1e}"
    )
    limit = f"within {budget.forward:.0e} of float64"
    return Check(f"{backend.name}{note}: every layer {limit}", not outside, measured)


def _gradients(
    ours: Checkpoint,
    theirs: Checkpoint,
    inputs: np.ndarray,
    attention_mask: np.ndarray,
    rng: np.random.Generator,
) -> Check:
    config = ours.config
    cotangent = rng.standard_normal((*inputs.shape[:2], config.output_dim))
    arguments = (inputs, attention_mask, cotangent)
    exact = TorchBackend().gradients(config, ours.tensors, *arguments, "float64")
    floor = gradient_floor(exact)
    worst, where = 0.0, ""
    for backend, checkpoint in ((TorchBackend(), ours), (FlaxBackend(), theirs)):
        found = backend.gradients(config, checkpoint.tensors, *arguments, "float32")
        for name, gradient in exact.items():
            error = relative_error(found[name], gradient, floor)
            if not error <= worst:
                worst, where = error, f"{backend.name} {name}"
    return Check(
        f"gradients of all {len(exact)} parameters within {_BUDGET.gradient:.0e} of float64",
        worst <= _BUDGET.gradient,
        f"worst {worst:.1e} ({where})",
    )


def _generation(ours: Checkpoint, theirs: Checkpoint, prompt: np.ndarray, new_tokens: int) -> Check:
    torch_tokens = TorchBackend().generate(ours.config, ours.tensors, prompt, new_tokens)
    flax_tokens = FlaxBackend().generate(theirs.config, theirs.tensors, prompt, new_tokens)
    differing = np.flatnonzero(torch_tokens[0] != flax_tokens[0])
    measured = (
        f"they differ from new token {differing[0] - prompt.shape[1] + 1} on"
        if differing.size
        else f"{new_tokens} tokens, identical"
    )
    return Check(f"the same {new_tokens} greedily chosen tokens", not differing.size, measured)
