"""Memory for numbers that are read again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import UInt8

_HUGE_PAGE = 2**21  # bytes, on x86 and most of ARM


def in_huge_pages(nbytes: int) -> UInt8[np.ndarray, " nbytes"]:
    """Bytes, not set, that begin with a huge page if they fill one.

    A step of generation reads every weight and many keys once, which is faster from huge pages.
    NumPy asks Linux for them from 4 MiB on, but of an array that begins within one only the rest
    can be.
    """
    if nbytes < _HUGE_PAGE:
        return np.empty(nbytes, np.uint8)
    memory = np.empty(nbytes + _HUGE_PAGE, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + nbytes]
