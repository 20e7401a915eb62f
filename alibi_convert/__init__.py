"""Checkpoints between formats and frameworks, driven by tables; NumPy and safetensors alone."""

from alibi_convert.checkpoint import Checkpoint, flax_to_torch, open_checkpoint, torch_to_flax
from alibi_convert.convert import convert, inspect
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.hub import resolve
from alibi_convert.plan import Plan, plan
from alibi_convert.report import Report
from alibi_convert.tokenizer import load_tokenizer
from alibi_convert.verify import verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MismatchError",
    "Plan",
    "Report",
    "convert",
    "flax_to_torch",
    "inspect",
    "load_tokenizer",
    "open_checkpoint",
    "plan",
    "resolve",
    "torch_to_flax",
    "verify",
]
