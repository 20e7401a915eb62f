"""The table of attention kernels: name -> how to run it and what it refuses, by preference."""

from functools import partial

from alibi_flax.kernels import dense
from alibi_flax.kernels.call import Kernel
from alibi_flax.kernels.windowed import operator, pallas_gpu, pallas_tpu, xla_loops

KERNELS = {
    "pallas_tpu": Kernel(partial(operator.attention, passes=pallas_tpu), pallas_tpu.refuses),
    "blockwise": Kernel(partial(operator.attention, passes=xla_loops), xla_loops.refuses),
    # After "blockwise", so that "auto" never takes it: JAX has deprecated Triton under Pallas, and
    # no GPU has run it yet.
    "pallas_gpu": Kernel(partial(operator.attention, passes=pallas_gpu), pallas_gpu.refuses),
    "dense": Kernel(dense.attention, dense.refuses),
}
