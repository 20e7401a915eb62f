"""The backends and devices under test. What is absent is named in the summary, with the reason.

A third implementation joins by one more row in `IMPLEMENTATIONS`: anything with the methods of
`alibi_verify.backends.Backend`. One that has less is held against the kit (test_conformance.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from alibi_verify.backends import Backend, FlaxBackend, TorchBackend


@dataclass(frozen=True)
class Implementation:
    """One backend on one kind of device."""

    name: str
    platform: str  # the device column of alibi_spec.budgets
    create: Callable[[], Backend]
    absent: Callable[[], str | None]  # why it cannot run here, or None


def _torch_cuda_absent() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _jax_absent(platform: str) -> str | None:
    import jax

    try:
        jax.devices(platform)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


IMPLEMENTATIONS = (
    Implementation("torch-cpu", "cpu", lambda: TorchBackend("cpu"), lambda: None),
    Implementation("flax-cpu", "cpu", lambda: FlaxBackend("cpu"), lambda: None),
    Implementation("torch-cuda", "gpu", lambda: TorchBackend("cuda"), _torch_cuda_absent),
    Implementation("flax-gpu", "gpu", lambda: FlaxBackend("gpu"), lambda: _jax_absent("gpu")),
    Implementation("flax-tpu", "tpu", lambda: FlaxBackend("tpu"), lambda: _jax_absent("tpu")),
)


@cache
def absences() -> dict[str, str]:
    """Why each absent implementation cannot run here."""
    reasons = {each.name: each.absent() for each in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def present() -> list[Implementation]:
    """What can run here."""
    return [each for each in IMPLEMENTATIONS if each.name not in absences()]


def each_implementation(
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu"), other_than: Implementation | None = None
) -> pytest.MarkDecorator:
    """Run a test once per implementation that is present, on these platforms."""
    chosen = [each for each in present() if each.platform in platforms and each is not other_than]
    return pytest.mark.parametrize("implementation", chosen, ids=lambda each: each.name)
