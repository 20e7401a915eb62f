"""Whether products of float32 matrices are computed in float32.

JAX leaves that to the device by default: TPUs round the factors of such products to bfloat16,
recent GPUs to TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the `with` block float32 means float32; after it, everything is as it was before.

    Products of float32 matrices are computed in float32 on every device, on TPUs by six passes of
    bfloat16: no TF32, no single pass. Blocks may be nested, and an exception restores, too.

    The setting belongs to the thread, and to what is traced in the block. `jax.jit` keeps a program
    for each setting: one that was compiled before is not used inside the block, nor afterwards one
    that was compiled inside. What was compiled ahead of time stays as it is, and so does a product
    with a precision of its own. The pullback of `jax.vjp` has the precision of the forward pass.
    """
    with jax.default_matmul_precision("highest"):
        yield
