"""The backends and devices under test. What is absent is named in the summary, with the reason.

A third implementation joins by one more row in `IMPLEMENTATIONS` of `alibi_verify`: anything with
the methods of `alibi_verify.backends.Backend`. One that has less is held against the kit
(test_conformance.py).
"""

from __future__ import annotations

import pytest

from alibi_verify.implementations import IMPLEMENTATIONS, Implementation, absences, present

__all__ = ["IMPLEMENTATIONS", "Implementation", "absences", "each_implementation", "present"]


def each_implementation(
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu"), other_than: Implementation | None = None
) -> pytest.MarkDecorator:
    """Run a test once per implementation that is present, on these platforms."""
    chosen = [each for each in present() if each.platform in platforms and each is not other_than]
    return pytest.mark.parametrize("implementation", chosen, ids=lambda each: each.name)
