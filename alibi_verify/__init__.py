"""Runs models to compare them: both backends, the reference, the libraries of the families."""

from alibi_verify.explanations import Cause
from alibi_verify.parity import Parity, Run, Skipped
from alibi_verify.verification import Check, Verification, verify, verify_steps

__all__ = [
    "Cause",
    "Check",
    "Parity",
    "Run",
    "Skipped",
    "Verification",
    "verify",
    "verify_steps",
]
