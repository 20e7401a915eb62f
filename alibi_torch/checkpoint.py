"""Checkpoints in and out of the torch models; the only file here that knows `alibi_convert`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from alibi_convert.checkpoint import open_checkpoint
from alibi_convert.store import replacing, write_folder
from alibi_convert.tensors import Tensors, as_torch
from alibi_spec import ALiBiConfig, parameter_table


class PretrainedModule(nn.Module):
    """A module that comes from, and goes to, checkpoints that both backends read."""

    config: ALiBiConfig

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
        config: ALiBiConfig | None = None,
        allow_pt: bool = False,
        implementation: str = "auto",
    ) -> Self:
        """Open any checkpoint that `alibi inspect` recognises, in evaluation mode.

        Tensors go to the device one by one; the host never holds more than one of them besides.

        Args:
            path: a checkpoint folder of ours or of a known family, a .safetensors, .pt or .msgpack
                file, or the id of a folder on the Hugging Face hub.
            dtype: of the parameters, but for learned slopes, which never become narrower than
                float32; None keeps the checkpoint's.
            device: where the parameters go.
            config: for files that do not carry a configuration.
            allow_pt: read pickled state dicts, with torch's weights_only unpickler.
            implementation: of attention: "auto" or one of `attention_implementations()`.

        Raises:
            CheckpointError: a ValueError: missing, foreign, truncated or incomplete.
            ValueError: the checkpoint is of the other model class, or the implementation is not
                known.
        """
        checkpoint = open_checkpoint(path, config=config, allow_pt=allow_pt)
        with torch.device("meta"):
            model = cls(checkpoint.config, implementation=implementation)
        rows = {row.name: row for row in parameter_table(checkpoint.config)}
        wider = None if dtype is None else torch.promote_types(dtype, torch.float32)
        state = {
            name: as_torch(array).to(device, wider if rows[name].is_wide else dtype)
            for name, array in checkpoint.tensors.items()
        }
        model.load_state_dict(state, assign=True)
        return model.to(device).eval()  # slopes follow, which are in no checkpoint

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`, for both backends.

        Args:
            folder: a path that does not exist yet.
            overwrite: replace a checkpoint that is there.

        Raises:
            CheckpointError: a ValueError: the folder exists, or holds other files.
        """
        tensors: dict[str, Any] = self.state_dict()
        with replacing(Path(folder), overwrite) as temporary:
            temporary.mkdir()
            write_folder(temporary, self.config, Tensors.of(tensors))
