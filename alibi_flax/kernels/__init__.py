"""The table of attention kernels: name -> how to run it and what it refuses, by preference."""

from functools import partial

from alibi_flax.kernels import blockwise, dense, pallas_gpu, pallas_tpu, windowed
from alibi_flax.kernels.call import Kernel

KERNELS = {
    "pallas_tpu": Kernel(
        partial(windowed.attention, passes=pallas_tpu, block_size=pallas_tpu.BLOCK_SIZE),
        pallas_tpu.refuses,
    ),
    "blockwise": Kernel(
        partial(windowed.attention, passes=blockwise, block_size=blockwise.BLOCK_SIZE),
        blockwise.refuses,
    ),
    # After "blockwise", so that only its name calls it: JAX has deprecated what it stands on, and
    # no GPU has run it yet.
    "pallas_gpu": Kernel(
        lambda call: windowed.attention(call, pallas_gpu, pallas_gpu.block_size(call)),
        pallas_gpu.refuses,
    ),
    "dense": Kernel(dense.attention, dense.refuses),
}

# Queries times keys below which dense attention is the faster one. On two CPU cores, with 8 heads
# of width 64, gradients at 512 x 512 take as long, and one query with 16,384 keys 3/4 as long.
DENSE_PAYS_BELOW = 512 * 512
