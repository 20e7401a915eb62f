"""Linear maps by the faster of the two libraries that torch has for them.

On x86 `torch.nn.functional.linear` gives float32 to MKL. On AMD's processors that reads the weights
of a few rows, as in a step of generation, at half the speed of the memory; oneDNN reads them at
full speed, and is no slower for many rows.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from alibi_torch.kernels.finite import has_values_on_host

_LEAST = 2**17  # elements of a weight for which oneDNN's fixed cost of about 15 µs is worth it


def linear(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "features width"],
    bias: Float[Tensor, " features"] | None = None,
) -> Float[Tensor, "*batch features"]:
    """A linear map in the common dtype of its input and its parameters (SPEC.md §5.1)."""
    if _is_for_onednn(x, weight, bias):
        operators: Any = torch.ops.mkldnn
        return operators._linear_pointwise(x, weight, bias, "none", [], "")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)  # autocast has its own rule
    return F.linear(*in_common_dtype(x, weight, bias))


def in_common_dtype(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that torch promotes all of theirs to; None stays None."""
    dtypes = {each.dtype for each in tensors if each is not None}
    if len(dtypes) == 1:
        return tensors
    dtype = reduce(torch.promote_types, dtypes)
    return tuple(each if each is None else each.to(dtype) for each in tensors)


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The operator has neither derivatives nor rules for transforms: it takes only plain calls.

    A step of generation asks this for every map, so that the cheap questions come first.
    """
    return (
        not torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None  # else sizes are tensors
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and weight.numel() >= _LEAST
        and (bias is None or bias.dtype is torch.float32)
        and has_values_on_host(x, weight)
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None  # one that counts or records operators
        and torch._C._get_mkldnn_enabled()
        and _is_x86()
        and x.numel() > 0
        and weight.is_contiguous()
    )


@cache
def _is_x86() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and capability.startswith("AVX")
