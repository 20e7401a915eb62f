"""Plausible mistakes, for `make mutants`: one row each, in files by what is broken."""

from __future__ import annotations

from parity_tests.meta.faults import (
    adapters,
    command,
    comparison,
    conformance,
    conversion,
    devices,
    families,
    files,
    flax_attention,
    inference,
    models,
    optimizer,
    parity,
    runs,
    spec,
    torch_attention,
    training,
)

FAULTS = (
    *spec.FAULTS,
    *models.FAULTS,
    *torch_attention.FAULTS,
    *flax_attention.FAULTS,
    *inference.FAULTS,
    *training.FAULTS,
    *runs.FAULTS,
    *devices.FAULTS,
    *parity.FAULTS,
    *conversion.FAULTS,
    *files.FAULTS,
    *families.FAULTS,
    *adapters.FAULTS,
    *optimizer.FAULTS,
    *comparison.FAULTS,
    *conformance.FAULTS,
    *command.FAULTS,
)
