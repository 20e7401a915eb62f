"""Plausible mistakes in training: packed documents, recomputation, loss, schedule, update."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "packed documents see one another in torch",
        "alibi_torch/model.py",
        '"segment_ids": segment_ids,',
        '"segment_ids": None,',
        "test_packing.py -k 'alone and short'",
    ),
    Mutant(
        "packed documents see one another in Flax",
        "alibi_flax/model.py",
        '"segment_ids": segment_ids,\n',
        '"segment_ids": None,\n',
        "test_packing.py -k 'alone and short'",
    ),
    Mutant(
        "interpolated slopes of a packed row",
        "alibi_spec/checks.py",
        "if limit is not None and seq > limit:",
        "if limit is not None and seq > 2 * limit:",
        "test_packing.py -k refused",
    ),
    Mutant(
        "other dropout when a block is recomputed",
        "alibi_torch/model.py",
        "use_reentrant=False)",
        "use_reentrant=False, preserve_rng_state=False)",
        "test_recomputation.py -k same_bits",
    ),
    Mutant(
        "torch recomputes nothing",
        "alibi_torch/model.py",
        "if self.recompute and torch.is_grad_enabled():",
        "if False:",
        "test_recomputation.py -k torch_keeps_the_inputs",
    ),
    Mutant(
        "Flax recomputes nothing",
        "alibi_flax/model.py",
        "if self.recompute else Block",
        "if False else Block",
        "test_recomputation.py -k flax",
    ),
)
