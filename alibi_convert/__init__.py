"""Checkpoints between formats and frameworks, driven by tables; NumPy and safetensors alone."""

from alibi_convert.checkpoint import Checkpoint, flax_to_torch, open_checkpoint, torch_to_flax
from alibi_convert.convert import Report, convert, inspect
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.verify import verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MismatchError",
    "Report",
    "convert",
    "flax_to_torch",
    "inspect",
    "open_checkpoint",
    "torch_to_flax",
    "verify",
]
