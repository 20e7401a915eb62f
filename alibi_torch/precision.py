"""Whether products of float32 matrices are computed in float32.

torch has settings for the whole process that let cuBLAS and oneDNN round the factors of such
products to TF32 or bfloat16, and cuBLAS the partial sums of narrower ones; only the latter are set
by default.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Since torch 2.9 each library has a setting of its own; "none" follows the settings above it.
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_ABOVE = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))  # from the top

_cublas: Any = torch.backends.cuda.matmul
_own: Any = torch._C  # torch 2.13's public setter of all of oneDNN sets that of all libraries


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the `with` block float32 means float32; after it, everything is as it was before.

    Products of float32 matrices are computed in float32 on every device: no TF32, no bfloat16.
    Those of float16 and bfloat16 are summed in float32. Blocks may be nested, and an exception
    restores, too.

    The settings belong to the process: other threads compute in full precision meanwhile. What
    `torch.compile` made of a model before is compiled again for the block. torch has two interfaces
    for these settings, of which the old one cannot be read where the new one says otherwise: inside
    the block they agree, and after it each says what it said before. Convolutions and recurrent
    layers keep their precision: no model here has any, and torch cannot return to their default.
    """
    with ExitStack() as after:
        for setting, value in _own_settings().items():
            after.callback(_own._set_fp32_precision_setter, *setting, value)
            _own._set_fp32_precision_setter(*setting, "ieee")
        after.callback(_set_old_setting, _old_setting())  # which can be read only now
        _set_old_setting("highest")
        for name, (allowed, *split) in _sums().items():
            after.callback(setattr, _cublas, name, (allowed, *split) if split else allowed)
            setattr(_cublas, name, (False, *split) if split else False)
        yield


def _own_settings() -> dict[tuple[str, str], str]:
    """What each library was told itself, without what it follows; nothing in torch before 2.9."""
    if not hasattr(_own, "_set_fp32_precision_setter"):
        return {}
    above = {}
    for setting in _ABOVE:
        above[setting] = _own._get_fp32_precision_getter(*setting)
        _own._set_fp32_precision_setter(*setting, "none")
    found = {setting: _own._get_fp32_precision_getter(*setting) for setting in _PRODUCTS}
    for setting, value in above.items():
        _own._set_fp32_precision_setter(*setting, value)
    return found


def _old_setting() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn of the old interface
        return torch.get_float32_matmul_precision()


def _set_old_setting(value: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(value)


def _sums() -> dict[str, tuple[bool, ...]]:
    """Whether cuBLAS may sum in narrow dtypes; and for some, in newer versions, by parts."""
    names = (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    found = {}
    for name in names:
        kinds = (kind for kind in (name, f"{name}_split_k") if hasattr(_cublas, kind))
        found[name] = tuple(getattr(_cublas, kind) for kind in kinds)
    return found
