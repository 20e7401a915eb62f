"""Runs models to compare them: both backends, the reference, the libraries of the families."""

from alibi_verify.verification import Check, Verification, verify, verify_steps

__all__ = ["Check", "Verification", "verify", "verify_steps"]
