"""One row of the planted faults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    fault: str
    file: str
    before: str
    after: str
    tests: str
