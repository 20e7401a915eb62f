"""Models run to be compared: both backends, the reference, and the libraries of the families."""

from alibi_verify.verification import Check, Verification, verify, verify_steps

__all__ = ["Check", "Verification", "verify", "verify_steps"]
