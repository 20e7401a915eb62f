"""The backends and devices that may be on a machine, and why one cannot run there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from alibi_convert.machine import is_installed
from alibi_verify.backends import Backend, FlaxBackend, TorchBackend


@dataclass(frozen=True)
class Implementation:
    """One backend on one kind of device."""

    name: str
    platform: str  # the device column of alibi_spec.budgets
    create: Callable[[], Backend]
    absent: Callable[[], str | None]  # why it cannot run here, or None


def _torch_absent() -> str | None:
    return None if is_installed("torch") else "torch is not installed"


def _torch_cuda_absent() -> str | None:
    if not is_installed("torch"):
        return _torch_absent()
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _flax_absent(platform: str) -> str | None:
    if not is_installed("flax"):
        return "flax is not installed"
    import jax

    try:
        jax.devices(platform)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


IMPLEMENTATIONS = (
    Implementation("torch-cpu", "cpu", lambda: TorchBackend("cpu"), _torch_absent),
    Implementation("flax-cpu", "cpu", lambda: FlaxBackend("cpu"), lambda: _flax_absent("cpu")),
    Implementation("torch-cuda", "gpu", lambda: TorchBackend("cuda"), _torch_cuda_absent),
    Implementation("flax-gpu", "gpu", lambda: FlaxBackend("gpu"), lambda: _flax_absent("gpu")),
    Implementation("flax-tpu", "tpu", lambda: FlaxBackend("tpu"), lambda: _flax_absent("tpu")),
)


@cache
def absences() -> dict[str, str]:
    """Why each absent implementation cannot run here."""
    reasons = {each.name: each.absent() for each in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def present() -> list[Implementation]:
    """What can run here."""
    return [each for each in IMPLEMENTATIONS if each.name not in absences()]
