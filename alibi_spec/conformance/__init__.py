"""Cases as data, by which any implementation of these models can be tested (README.md here)."""

from alibi_spec.conformance.files import Case, DamagedKitError, read_cases, write_cases
from alibi_spec.conformance.levels import LEVELS, Level
from alibi_spec.conformance.protocol import Implementation

__all__ = [
    "LEVELS",
    "Case",
    "DamagedKitError",
    "Implementation",
    "Level",
    "read_cases",
    "write_cases",
]
