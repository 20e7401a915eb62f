"""Checkpoints in and out of the torch models; the only file here that knows `alibi_convert`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from alibi_convert.checkpoint import Reading, open_checkpoint
from alibi_convert.tensors import DTYPES, LazyTensor, Tensors, as_numpy, as_torch
from alibi_convert.writing.origin import Origin, origin_of, save_folder
from alibi_spec import ALiBiConfig, parameter_table
from alibi_torch.divided import placed_like, whole


class PretrainedModule(nn.Module):
    """A module that comes from, and goes to, checkpoints that both backends read."""

    config: ALiBiConfig
    origin: Origin | None = None  # the checkpoint that it was loaded from
    mesh: Any = None  # the DeviceMesh that `alibi_torch.sharding.parallelize` divided it over
    gathered_dtype: str | None = None  # that FSDP rounds the weights to; None without it
    gathers_positions: bool = True  # from the devices among which they are divided

    def __init__(self, config: ALiBiConfig, *, implementation: str = "auto") -> None:
        super().__init__()
        self.config, self.implementation = config, implementation

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        implementation: str = "auto",
        mesh: Any = None,
        rules: Any = None,
        **reading: Unpack[Reading],
    ) -> Self:
        """Open any checkpoint that `alibi inspect` recognises, in evaluation mode.

        Tensors go to the device one by one; the host holds at most one more at a time.

        Args:
            path: a checkpoint folder of ours or of a known family, a .safetensors, .pt, .msgpack or
                .gguf file, or the id of a folder on the Hugging Face hub.
            dtype: of the parameters, except learned slopes, which never become narrower than
                float32; None keeps the checkpoint's.
            device: where the parameters go.
            implementation: of attention: "auto" or one of `attention_implementations()`.
            mesh, rules: divide the model, as `alibi_torch.sharding.parallelize` does; a process
                keeps only its own part of each tensor. Then `device` does not count.
            reading: config, allow_pt, …: as for `alibi_convert.open_checkpoint`.

        Raises:
            CheckpointError: a ValueError: missing, foreign, truncated or incomplete.
            ValueError: the checkpoint is of the other model class, or the implementation is not
                known.
        """
        checkpoint = open_checkpoint(path, **reading)
        with torch.device("meta"):
            model = cls(checkpoint.config, implementation=implementation)
        model.load_tensors(checkpoint.tensors, dtype, device, mesh, rules)
        model.origin = origin_of(checkpoint)
        return model.eval()

    def load_tensors(
        self,
        tensors: Tensors,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mesh: Any = None,
        rules: Any = None,
        compute_dtype: str = "float32",
    ) -> None:
        """Give a model without data its parameters, one by one.

        Arguments are those of `from_pretrained` and `alibi_torch.sharding.parallelize`.
        """
        rows = {row.name: row for row in parameter_table(self.config)}
        wider = None if dtype is None else torch.promote_types(dtype, torch.float32)

        def read(name: str) -> Tensor:
            return as_torch(tensors[name]).to(dtype=wider if rows[name].is_wide else dtype)

        if mesh is None:
            self.load_state_dict({name: read(name).to(device) for name in tensors}, assign=True)
        else:
            from alibi_torch.sharding import parallelize

            device = mesh.device_type
            parallelize(self.to(dtype), mesh, rules, compute_dtype=compute_dtype)
            like = {name: self.get_parameter(name) for name in tensors}
            state = {name: placed_like(like[name], read(name), device) for name in tensors}
            self.load_state_dict(state, assign=True)
        self.to(device)  # moves the fixed slopes, which no checkpoint holds

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`, for both backends.

        Copies the companions (tokenizer, …) of the checkpoint that the model was loaded from.
        Of a model on a mesh every process calls this, and the first one writes; each holds one
        whole tensor at a time.

        Args:
            folder: a path that does not exist yet.
            overwrite: replace the model in a checkpoint's folder; its other files stay.

        Raises:
            CheckpointError: a ValueError: the folder exists, or holds other files.
        """
        tensors: dict[str, Any] = self.state_dict()

        def write(tensors: Tensors) -> None:
            save_folder(Path(folder), self.config, tensors, self.origin, overwrite)

        if self.mesh is None:
            write(Tensors.of(tensors))
        else:
            with_gathered(tensors, write)


def with_gathered(arrays: Mapping[str, Any], use: Callable[[Tensors], None]) -> None:
    """Call `use` in the first process, with tensors that are gathered each time they are read.

    The others help until it is done. Every process holds one whole tensor at a time. An error of
    the first is raised in all.

    Args:
        arrays: of torch, the same names in every process; some may be divided.
        use: may read them in any order.
    """

    one_at_a_time = threading.Lock()  # several files may be written, by several threads

    def read(name: str) -> Any:
        with one_at_a_time:
            return as_numpy(whole(arrays[_told(name)]))

    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            use(Tensors({name: _header(array, name, read) for name, array in arrays.items()}))
        except Exception as raised:  # told to the others, and raised below
            error = raised
        _told(error)
    else:
        while isinstance(asked := _told(), str):
            whole(arrays[asked])
        error = asked
    if error is not None:
        raise error


def _told(message: Any = None) -> Any:
    """What the first process says, in every process."""
    box = [message]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _header(array: Tensor, name: str, read: Callable[[str], Any]) -> LazyTensor:
    dtype = DTYPES[str(array.dtype).removeprefix("torch.")]
    return LazyTensor(tuple(array.shape), dtype, lambda: read(name))
