"""The table of attention kernels: name -> implementation, in order of preference."""

from alibi_torch.kernels import dense

KERNELS = {
    "dense": dense.attention,
}
