"""Linear maps by the faster of the two libraries that torch has for them.

On x86 `torch.nn.functional.linear` gives float32 to MKL. On AMD's processors that reads the weights
of a few rows, as in a step of generation, at half the speed of the memory; oneDNN reads them at
full speed, and is no slower for many rows. Where several sequences are generated together it is
faster still with weights in a layout of its own, of which `packed_weights` makes a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from alibi_torch.kernels.finite import has_values_on_host

_LEAST = 2**17  # elements of a weight for which oneDNN's fixed cost of about 15 µs is worth it
_FEW = 2  # rows for which weights are read as fast where they lie

Activation = Callable[[Tensor], Tensor]
gelu_tanh: Activation = partial(F.gelu, approximate="tanh")
# What oneDNN can compute without another pass over the results of a map. Its ReLU is left out: of
# NaN it gives 0.
_ACTIVATIONS: dict[Activation | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    F.gelu: ("gelu", [], "none"),
    gelu_tanh: ("gelu", [], "tanh"),
}


@dataclass(frozen=True)
class Packed:
    """A weight as oneDNN lays it out, and what it was made from."""

    values: Tensor
    weight: Tensor  # kept, so that its address is not given to another
    version: int

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """The copy of a weight that `_can_be_packed`."""
        operators: Any = torch.ops.mkldnn
        weight = weight.detach()
        return cls(operators._reorder_linear_weight(weight, None), weight, weight._version)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model, in memory or on disk, has none

    def serves(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is faster for this input, and the weight is still what it was."""
        return (
            x.numel() > _FEW * x.shape[-1]
            and weight.data_ptr() == self.weight.data_ptr()
            and self.weight._version == self.version
        )


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within the block a model on the CPU is faster for a few sequences at a time.

    Its large weights are copied into oneDNN's layout: as much memory again, and the time of some
    ten steps. Three to sixteen sequences that are generated together gain most; one gains nothing.
    A weight that changes within the block is read where it lies from then on, unless it was
    changed through `.data`, which cannot be noticed.

    Args:
        model: an `ALiBiLM` or `ALiBiTransformer`.

    Raises:
        ValueError: no weight of the model can be packed.
    """
    maps: list[Any] = [module for module in model.modules() if hasattr(module, "packed")]
    with torch.no_grad():
        maps = [module for module in maps if _can_be_packed(module.weight)]
        packed = [Packed.of(module.weight) for module in maps]
    if not packed:
        raise ValueError(
            "no weight of this model can be packed: expected float32 on an x86 CPU, on one device, "
            f"of at least {_LEAST:,} elements, and not created in torch.inference_mode()"
        )
    before = [module.packed for module in maps]
    try:
        for module, each in zip(maps, packed, strict=True):
            module.packed = each
        yield
    finally:
        for module, each in zip(maps, before, strict=True):
            module.packed = each


def linear(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "features width"],
    bias: Float[Tensor, " features"] | None = None,
    packed: Packed | None = None,
) -> Float[Tensor, "*batch features"]:
    """A linear map in the common dtype of its input and its parameters (SPEC.md §5.1)."""
    if _is_for_onednn(x, weight, bias):
        return by_onednn(x, weight, bias, packed)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)  # autocast has its own rule
    return F.linear(*in_common_dtype(x, weight, bias))


def is_fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> bool:
    """Whether `by_onednn` may be asked for the activation of a map."""
    return activation in _ACTIVATIONS and _is_for_onednn(x, weight, bias)


def by_onednn(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "features width"],
    bias: Float[Tensor, " features"] | None,
    packed: Packed | None,
    activation: Activation | None = None,
) -> Float[Tensor, "*batch features"]:
    """The activation of a linear map, None for the map alone, if `is_fused` allows it."""
    operators: Any = torch.ops.mkldnn
    if packed is not None and packed.serves(x, weight):
        weight = packed.values
    return operators._linear_pointwise(x, weight, bias, *_ACTIVATIONS[activation])


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


def _can_be_packed(weight: Tensor) -> bool:
    # Changes of a tensor of inference mode are not counted.
    is_one = _is_for_onednn(weight[:1], weight, None) if weight.dim() == 2 else False
    return is_one and not weight.is_inference()


@cache
def _is_x86() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and capability.startswith("AVX")
