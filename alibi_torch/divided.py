"""Tensors and batches that may be divided over devices, for code that need not know if they are.

Nothing here imports `torch.distributed`: a DTensor is there only where that was imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.utils import get_total_norm

from alibi_spec.sharding import batch_axes

# The axes of a mesh over which a batch is divided.
PARTS_OF_SEQUENCES = ("sequence",)
PARTS = ("data", "fsdp", *PARTS_OF_SEQUENCES)


def own(x: Tensor) -> Tensor:
    """This device's part; all of a tensor that is not divided."""
    return cast(Any, x).to_local() if is_divided(x) else x


def whole(x: Tensor) -> Tensor:
    """All of it, gathered if it is divided: then every process of its mesh calls this.

    FSDP divides what the axis "tensor" has divided, so its parts are gathered first.
    """
    if not is_divided(x):
        return x
    divided = cast(Any, x)
    from torch.distributed.tensor import Replicate

    for number in range(divided.device_mesh.ndim):
        placements = [*divided.placements]
        placements[number] = Replicate()
        divided = divided.redistribute(placements=placements)
    return divided.to_local()


def placed_like(parameter: Tensor, values: Tensor, device: Any) -> Tensor:
    """The values on a kind of device, divided as the parameter is.

    Every process has all the values, and takes its part of them.
    """
    values = values.to(device)
    if not is_divided(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    like = cast(Any, parameter)
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def own_part(batch: Mapping[str, Tensor], mesh: Any) -> Mapping[str, Tensor]:
    """The sequences of a batch that this process computes: all of them without a mesh.

    They are whole, also where their positions are divided, as inputs of a model are.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    if mesh is None:
        return batch
    rows, *_ = shape = next(iter(batch.values())).shape
    batch_axes(shape, dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)))
    number, count = place(mesh)
    size = rows // count
    return {name: array[number * size : (number + 1) * size] for name, array in batch.items()}


def place(mesh: Any) -> tuple[int, int]:
    """Which part of the sequences of a batch this process computes, and how many there are."""
    if mesh is None:
        return 0, 1
    data, fsdp = mesh["data"], mesh["fsdp"]
    number = data.get_local_rank() * fsdp.size() + fsdp.get_local_rank()
    return number, data.size() * fsdp.size()


def require_gathered(mesh: Any, what: str) -> None:
    """Raise ValueError for a model that FSDP has divided: only whole calls gather its weights."""
    if mesh is not None and any(mesh[axis].size() > 1 for axis in PARTS):
        raise ValueError(
            f"{what} calls parts of the model, whose weights are divided over {', '.join(PARTS)}; "
            "divide it over the axis tensor only, or load it on one device"
        )


def summed(
    value: Float[Tensor, ""] | Integer[Tensor, ""], mesh: Any, axes: Sequence[str] = PARTS
) -> Tensor:
    """The sum of a number over the parts of a batch, in every process."""
    return value if mesh is None else _sum(value, mesh, axes)


def total_norm(gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The norm of all together; each may be divided."""
    if not any(map(is_divided, gradients)):
        return get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(own(each)) / math.sqrt(_copies(each)) for each in gradients]
    mesh = cast(Any, gradients[0]).device_mesh
    return _sum(torch.stack(norms).square().sum(), mesh, mesh.mesh_dim_names).sqrt()


def _copies(x: Any) -> int:
    """How many devices have the same part."""
    sizes = zip(x.device_mesh.shape, x.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def _sum(value: Tensor, mesh: Any, axes: Sequence[str]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if name in axes else Replicate() for name in mesh.mesh_dim_names]
    return whole(DTensor.from_local(value, mesh, placements, run_check=False))


def is_divided(x: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(x, "device_mesh") and isinstance(x, torch.Tensor)
