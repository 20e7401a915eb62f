"""Plausible mistakes, for `make mutants`: one row each, in files by what is broken."""

from __future__ import annotations

from parity_tests.meta.faults import (
    adapters,
    command,
    comparison,
    conformance,
    conversion,
    devices,
    ecosystem,
    families,
    files,
    flax_attention,
    inference,
    models,
    optimizer,
    parity,
    precision,
    runs,
    sharding,
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
    *sharding.FAULTS,
    *devices.FAULTS,
    *parity.FAULTS,
    *precision.FAULTS,
    *conversion.FAULTS,
    *files.FAULTS,
    *families.FAULTS,
    *adapters.FAULTS,
    *optimizer.FAULTS,
    *comparison.FAULTS,
    *conformance.FAULTS,
    *ecosystem.FAULTS,
    *command.FAULTS,
)
