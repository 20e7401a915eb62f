"""Pickled torch state dicts, read by torch's weights_only unpickler alone."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

from alibi_convert.errors import CheckpointError
from alibi_convert.extras import require
from alibi_convert.tensors import Tensors

# What torch.load and the unpickler under it raise for broken files.
UNPICKLING_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    IndexError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_pt(path: Path) -> Tensors:
    """A torch state dict, unpickled with weights_only=True and file-mapped.

    Raises:
        CheckpointError: truncated, not a state dict, or holding more than tensors.
    """
    require("torch", "torch", "reading .pt")
    import torch

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNPICKLING_ERRORS as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to trust it
            cause = "it may hold more than tensors; save the model's state_dict() alone"
        raise CheckpointError(f"{path} is truncated or not a plain state dict: {cause}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds more than tensors ({', '.join(map(str, others[:4]))}); save the "
            "model's state_dict() alone"
        )
    return Tensors.of(state)
