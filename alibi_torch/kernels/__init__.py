"""The table of attention kernels: name -> how to run it and what it refuses, by preference."""

from functools import partial

from alibi_torch.kernels import aten_flash, blockwise, dense, flash_attn, flex, windowed
from alibi_torch.kernels.call import Kernel
from alibi_torch.kernels.finite import guarded

KERNELS = {
    "flex": Kernel(guarded(flex.attention), flex.refuses),
    "flash_attn": Kernel(guarded(flash_attn.attention), flash_attn.refuses),
    "aten_flash": Kernel(partial(windowed.attention, tiles="aten_flash"), aten_flash.refuses),
    "blockwise": Kernel(partial(windowed.attention, tiles="blockwise"), blockwise.refuses),
    "dense": Kernel(guarded(dense.attention), dense.refuses),
}

# Queries times keys below which "auto" takes dense attention. On one AVX-512 core with 8 heads of
# 64 in float32, aten_flash draws level at 192 queries and keys, forward and backward; with 512
# it is 4 and 2 times faster. With 2 heads of 16 the two draw level at 400.
DENSE_PAYS_BELOW = 256 * 256
