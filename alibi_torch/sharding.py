"""Models on a mesh of devices, by the rules of `alibi_spec.sharding` (SPEC.md §19).

Along "tensor" parameters are DTensors, and between modules every device has ordinary tensors: those
of its own heads and hidden units inside attention and feed-forward, whole ones elsewhere. Along
"data" and "fsdp" it is FSDP2 that divides and gathers. Along "sequence" a device has the positions
that `positions` gives it. The model knows nothing of all this but which heads and positions are its
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.sharding import (
    AXES,
    Rules,
    check_mesh_axes,
    check_sharding,
    resolved_rules,
    torch_axes,
)
from alibi_spec.training import COMPUTE_DTYPES
from alibi_torch.checkpoint import PretrainedModule
from alibi_torch.positions import Positions, divide_positions

if TYPE_CHECKING:
    from alibi_torch.model import Attention

_NORMS_OVER_HEADS = ("query_norm", "key_norm")
_MAY_BE_WHOLE = ("vocab", "heads", "kv_heads", "mlp")
Model = TypeVar("Model", bound=PretrainedModule)


def device_mesh(sizes: Mapping[str, int], device_type: str | None = None) -> DeviceMesh:
    """The mesh of all processes with these sizes; an axis that is not named has size 1.

    Args:
        sizes: by axis: "data", "fsdp", "sequence" and "tensor".
        device_type: "cuda" or "cpu"; None is a GPU where there is one.

    Raises:
        ValueError: an unknown axis, no group of processes, or another number of them.
    """
    check_mesh_axes(sizes)
    _require_processes()
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    count, processes = int(torch.tensor(shape).prod()), dist.get_world_size()
    if count != processes:
        raise ValueError(
            f"a mesh of {_written(sizes)} needs {count} processes, and there are {processes}; "
            f"start {count}, as by torchrun --nproc-per-node={count}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


def parallelize(
    model: Model, mesh: DeviceMesh, rules: Rules | None = None, *, compute_dtype: str = "float32"
) -> Model:
    """Divide a model over a mesh, in place; every process of the mesh calls it alike.

    Its calls, `generate`, `train_step` and `save_pretrained` are those of the whole model from then
    on, and every process makes them together. Optimizers are made after it.

    Args:
        model: an `ALiBiLM` or `ALiBiTransformer`, on the mesh's kind of device, or without data
            (`torch.device("meta")`).
        mesh: of all processes, with axes among "data", "fsdp", "sequence" and "tensor".
        rules: in place of some of `alibi_spec.sharding.RULES`: None for "vocab", "heads",
            "kv_heads" or "mlp" keeps it whole.
        compute_dtype: "float32" is that of the weights; "bfloat16" rounds what FSDP gathers, as
            `Recipe.compute_dtype` does on one device. Gradients are summed in float32.

    Returns:
        The model.

    Raises:
        ValueError: a parameter cannot be divided like this; a mesh of other axes or not of all
            processes; a model that was divided before, lies elsewhere, or has weights of several
            dtypes; bfloat16 for learned slopes.
    """
    sizes = _checked_sizes(mesh)
    _check_rules(model.config, sizes, rules)
    _check_model(model, mesh)
    mesh = _with_every_axis(mesh)
    weights, positions = _of_weights(mesh), Positions.of(mesh)
    if mesh["tensor"].size() > 1:
        _divide_computation(model, weights["tensor"], sizes, rules)
    if weights["data"].size() * weights["fsdp"].size() > 1:
        _divide_storage(model, weights["data", "fsdp"], sizes, rules, compute_dtype)
        model.gathered_dtype = compute_dtype
    if positions is not None:
        divide_positions(model, _transformer(model), positions)
    model.mesh = mesh
    return model


# Checks


def _checked_sizes(mesh: DeviceMesh) -> dict[str, int]:
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            f"the mesh is a {type(mesh).__name__}; expected a DeviceMesh of torch.distributed, as "
            "alibi_torch.device_mesh makes it"
        )
    if mesh.mesh_dim_names is None:
        raise ValueError(f"the mesh has no names of axes; expected some of {', '.join(AXES)}")
    sizes = _sizes(mesh)
    check_mesh_axes(sizes)
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the mesh of {_written(sizes)} has {mesh.size()} of {dist.get_world_size()} "
            "processes; expected all of them"
        )
    return sizes


def _sizes(mesh: DeviceMesh) -> dict[str, int]:
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def _require_processes() -> None:
    if not dist.is_initialized():
        raise ValueError(
            "there is no group of processes; start them by torchrun, and call "
            "torch.distributed.init_process_group() first"
        )


def _written(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def _check_rules(config: ALiBiConfig, sizes: Mapping[str, int], rules: Rules | None) -> None:
    known = resolved_rules(sizes, rules)
    standard = resolved_rules(sizes)
    for axis, names in known.items():
        may_be_whole = axis in _MAY_BE_WHOLE
        if names != standard[axis] and not (may_be_whole and not names):
            raise ValueError(
                f"a rule divides {axis} over {', '.join(names) or 'no axis'}, which PyTorch models "
                f"cannot; expected {', '.join(standard[axis]) or 'no axis'}"
                + (" or None" if may_be_whole else "")
            )
    check_sharding(config, sizes, rules)
    if known["kv_heads"] and not known["heads"]:
        raise ValueError(
            "a rule keeps the heads whole and divides the kv_heads that they read; give kv_heads "
            "None too"
        )
    tensor, group = sizes.get("tensor", 1), config.num_heads // config.kv_heads
    own = config.num_heads // tensor
    if known["heads"] and not known["kv_heads"] and own % group and group % own:
        raise ValueError(
            f"each of {tensor} devices has {own} of the heads, of which {group} share keys; "
            "expected a multiple or a divisor of these: take another size of the axis tensor"
        )


def _check_model(model: PretrainedModule, mesh: DeviceMesh) -> None:
    parameters = dict(model.named_parameters())
    if model.mesh is not None:
        raise ValueError("the model is divided over a mesh already; load it anew to divide it")
    for name, each in parameters.items():
        if each.device.type not in (mesh.device_type, "meta"):
            raise ValueError(
                f"{name} is on {each.device} and the mesh is of {mesh.device_type}; move the "
                f"model first: model.to({mesh.device_type!r})"
            )
    dtypes = {str(each.dtype).removeprefix("torch.") for each in parameters.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"the weights are {' and '.join(sorted(dtypes))}, which FSDP cannot gather together; "
            "load the model with dtype=torch.float32"
        )


def _with_every_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The same devices along all of `AXES`, in their order."""
    names = mesh.mesh_dim_names or ()
    if names == AXES:
        return mesh
    order = [names.index(axis) for axis in AXES if axis in names]
    shape = [_sizes(mesh).get(axis, 1) for axis in AXES]
    ranks = mesh.mesh.permute(order).reshape(shape)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=AXES)


def _of_weights(mesh: DeviceMesh) -> DeviceMesh:
    """The same devices as weights know them: those of "sequence" are more of "data"."""
    if mesh["sequence"].size() == 1:
        return mesh
    ranks = mesh.mesh.movedim(AXES.index("sequence"), 1).flatten(0, 1)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("data", "fsdp", "tensor"))


# The axis "tensor"


def _divide_computation(
    model: nn.Module, mesh: DeviceMesh, sizes: Mapping[str, int], rules: Rules | None
) -> None:
    config: Any = model.config
    divided = {row.name: _placement(row, sizes, rules) for row in parameter_table(config)}
    for name, placement in divided.items():
        owner, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(name)
        placed = distribute_tensor(parameter.detach(), mesh, (placement,), src_data_rank=None)
        module.register_parameter(leaf, nn.Parameter(placed, parameter.requires_grad))
    for name, module in model.named_modules():
        weight = divided.get(f"{name}.weight")
        if weight is not None:
            leaf = name.rpartition(".")[2]
            ends = _ends(leaf, weight)
            _connect(module, mesh, *ends, gathers=leaf in _NORMS_OVER_HEADS)
        elif name.endswith((".attn", ".ffn")):
            # Here once, so that the gradients of the maps inside are summed before they are told.
            _connect(module, mesh, Replicate(), None)
    known = resolved_rules(sizes, rules)
    if known["heads"]:
        for layer in _transformer(model).layers:
            _divide_heads(layer.attn, mesh, are_keys_whole=not known["kv_heads"])


def _placement(row: Parameter, sizes: Mapping[str, int], rules: Rules | None) -> Placement:
    axes = torch_axes(row, sizes, rules)
    return next((Shard(i) for i, names in enumerate(axes) if "tensor" in names), Replicate())


def _ends(leaf: str, weight: Placement) -> tuple[Placement, Placement]:
    """How the input and the output of a module are divided whose weight is divided like this."""
    if not weight.is_shard():
        return Replicate(), Replicate()
    if leaf in _NORMS_OVER_HEADS:
        return Shard(-1), Shard(-1)
    if leaf in ("token_embedding", "lm_head"):
        return Replicate(), Replicate()
    return (Replicate(), Shard(-1)) if weight.is_shard(0) else (Shard(-1), Replicate())


def _connect(
    module: nn.Module, mesh: DeviceMesh, before: Placement, after: Any, *, gathers: bool = False
) -> None:
    """Let a module compute with DTensors, between ordinary tensors that are divided like this."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        x = _distributed(args[0], mesh, before)
        return (x.redistribute(placements=(Replicate(),)) if gathers else x, *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:  # noqa: ARG001
        return _distributed(output, mesh, after).redistribute(placements=(after,)).to_local()

    module.register_forward_pre_hook(enter)
    if after is not None:
        module.register_forward_hook(leave)


def _distributed(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    if isinstance(x, DTensor):
        return x
    return DTensor.from_local(x, mesh, (placement,), run_check=False)


def _divide_heads(attention: Attention, mesh: DeviceMesh, *, are_keys_whole: bool) -> None:
    """Let a device compute its own heads; where keys are whole, it takes those that these read."""
    config, rank = attention.config, mesh.get_local_rank()
    own = config.num_heads // mesh.size()
    attention.heads = slice(rank * own, (rank + 1) * own)
    attention.reset_slopes()
    if not config.output_projection:

        def gather(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
            divided = DTensor.from_local(output, mesh, (Shard(-1),), run_check=False)
            return divided.full_tensor()

        attention.register_forward_hook(gather)
    if are_keys_whole:
        group, width = config.num_heads // config.kv_heads, config.head_dim
        first, last = rank * own // group, ((rank + 1) * own - 1) // group

        def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
            whole = DTensor.from_local(output, mesh, (Replicate(),), run_check=False)
            # The gradients are of this device's heads only, until they are summed.
            local = whole.to_local(grad_placements=(Partial(),))
            return local[..., first * width : (last + 1) * width]

        for last_of in (attention.key_norm if config.qk_norm else attention.key, attention.value):
            last_of.register_forward_hook(take)


# The axes "data" and "fsdp"


def _divide_storage(
    model: nn.Module,
    mesh: DeviceMesh,
    sizes: Mapping[str, int],
    rules: Rules | None,
    compute_dtype: str,
) -> None:
    config: Any = model.config
    dims = dict(_divided_dims(model, config, sizes, rules))

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dims[parameter])

    # Outputs of DTensors' `to_local` are views; nobody writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # The root too is divided again after a call: its parameters are what optimizers are made of.
    options: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": placement}
    options["reshard_after_forward"] = True
    if compute_dtype != "float32":
        options["mp_policy"] = _rounding(config, compute_dtype)
    modules: list[Any] = [*_transformer(model).layers, model]
    for module in modules:
        fully_shard(module, **options)
        # Sums, not means: losses are divided by the number of targets of all.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _rounding(config: ALiBiConfig, dtype: str) -> MixedPrecisionPolicy:
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype={dtype!r} is not known; expected one of {', '.join(COMPUTE_DTYPES)}"
        )
    if config.slopes == "learned":
        raise ValueError(
            "compute_dtype='bfloat16' and learned slopes, which are never rounded, but FSDP rounds "
            "all weights of a block; compute in float32, or over the axis tensor only"
        )
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _divided_dims(
    model: nn.Module, config: ALiBiConfig, sizes: Mapping[str, int], rules: Rules | None
) -> Iterator[tuple[nn.Parameter, int]]:
    """The axis of each parameter that FSDP divides: "embed", or the only one of a vector.

    Vectors are few numbers, and FSDP keeps nothing whole.
    """
    for row in parameter_table(config):
        axes = torch_axes(row, sizes, rules)
        dim = next((i for i, names in enumerate(axes) if "fsdp" in names), 0)
        yield model.get_parameter(row.name), dim


def _transformer(model: Any) -> Any:
    return model if hasattr(model, "layers") else model.transformer
