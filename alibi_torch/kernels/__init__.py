"""The table of attention kernels: name -> how to run it and what it refuses, by preference."""

from functools import partial

from alibi_torch.kernels import dense, flash_attn, flex
from alibi_torch.kernels.call import Kernel
from alibi_torch.kernels.finite import guarded
from alibi_torch.kernels.windowed import aten, operator, plain

KERNELS = {
    "flex": Kernel(guarded(flex.attention), flex.refuses),
    "flash_attn": Kernel(guarded(flash_attn.attention), flash_attn.refuses),
    "aten_flash": Kernel(partial(operator.attention, passes=aten), aten.refuses),
    "blockwise": Kernel(partial(operator.attention, passes=plain), plain.refuses),
    "dense": Kernel(guarded(dense.attention), dense.refuses),
}
