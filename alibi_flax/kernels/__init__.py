"""The table of attention kernels: name -> implementation, in order of preference."""

from alibi_flax.kernels import dense

KERNELS = {
    "dense": dense.attention,
}
