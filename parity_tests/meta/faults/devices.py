"""Plausible mistakes on several devices: heads, biases, sums, norms, parts of batches."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "every device has the slopes of the first heads",
        "alibi_torch/sharding.py",
        "attention.heads = slice(rank * own, (rank + 1) * own)",
        "attention.heads = slice(0, own)",
        "test_torch_mesh.py -k two_devices",
    ),
    Mutant(
        "the output's bias is added by every device",
        "alibi_torch/sharding.py",
        "        module.register_parameter(leaf, nn.Parameter(placed",
        """        if leaf == "bias" and placement.is_replicate():
            placed = DTensor.from_local(parameter.detach(), mesh, (Partial(),))
        module.register_parameter(leaf, nn.Parameter(placed""",
        "test_torch_mesh.py -k two_devices",
    ),
    Mutant(
        "the norm of this device's gradients",
        "alibi_torch/divided.py",
        "_sum(torch.stack(norms).square().sum(), mesh, mesh.mesh_dim_names).sqrt()",
        "torch.stack(norms).square().sum().sqrt()",
        "test_torch_mesh.py -k two_devices",
    ),
    Mutant(
        "gradients that several devices have count as often",
        "alibi_torch/divided.py",
        "/ math.sqrt(_copies(each))",
        "/ 1",
        "test_torch_mesh.py -k two_devices",
    ),
    Mutant(
        "whole keys: those of the first heads",
        "alibi_torch/sharding.py",
        "local[..., first * width : (last + 1) * width]",
        "local[..., : (last + 1 - first) * width]",
        "test_torch_mesh.py -k 'tokens and tensor-whole'",
    ),
    Mutant(
        "whole keys: gradients of this device's heads only",
        "alibi_torch/sharding.py",
        "whole.to_local(grad_placements=(Partial(),))",
        "whole.to_local()",
        "test_torch_mesh.py -k 'tokens and tensor-whole'",
    ),
    Mutant(
        "the mean of the devices' gradients",
        "alibi_torch/sharding.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        "test_torch_mesh.py -k 'tokens and fsdp-gated'",
    ),
    Mutant(
        "every device computes the first part of a batch",
        "alibi_torch/divided.py",
        "array[number * size : (number + 1) * size]",
        "array[:size]",
        "test_torch_mesh.py -k 'tokens and fsdp-gated'",
    ),
    Mutant(
        "the loss of this device's part",
        "alibi_torch/training.py",
        "    total = summed(total, model.mesh)\n",
        "",
        "test_torch_mesh.py -k 'test_training and fsdp'",
    ),
    Mutant(
        "the same dropout in every part of a batch",
        "alibi_torch/training.py",
        "np.array([0, 0, 0, place(model.mesh)[0]], np.uint64)",
        "np.zeros(4, np.uint64)",
        "test_torch_mesh.py -k dropout",
    ),
    Mutant(
        "FSDP divides the first axis of everything",
        "alibi_torch/sharding.py",
        'next((i for i, names in enumerate(axes) if "fsdp" in names), 0)',
        "0",
        "test_torch_mesh.py -k keeps",
    ),
    Mutant(
        "axes of a mesh renamed, not moved",
        "alibi_torch/sharding.py",
        "mesh.mesh.permute(order).reshape(shape)",
        "mesh.mesh.reshape(shape)",
        "test_torch_mesh.py -k any_order",
    ),
    Mutant(
        "a process that waits for another one in vain says what torch says",
        "alibi_train/processes.py",
        "(is_lost or any(word in text.lower() for word in _LOST))",
        "is_lost",
        "test_torch_mesh.py -k killed",
    ),
    Mutant(
        "every process of a run prints",
        "alibi_cli/commands/train.py",
        "if not is_first(mesh):",
        "if False:",
        "test_torch_mesh.py -k fewer",
    ),
    Mutant(
        "two tensors gathered at once",
        "alibi_torch/checkpoint.py",
        "        with one_at_a_time:\n            return as_numpy(whole(arrays[_told(name)]))",
        "        return as_numpy(whole(arrays[_told(name)]))",
        "test_torch_mesh.py -k two_devices",
    ),
    Mutant(
        "a batch that the devices do not divide, computed by all of them",
        "alibi_flax/training.py",
        "    if mesh is not None:  # what its",
        "    if mesh is None and batch is None:  # what its",
        "test_sharding.py -k does_not_divide",
    ),
)
