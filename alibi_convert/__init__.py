"""Checkpoints between formats and frameworks, driven by tables, with only NumPy and safetensors."""

from alibi_convert.carrying import open_optimizer, save_optimizer
from alibi_convert.checkpoint import Checkpoint, flax_to_torch, open_checkpoint, torch_to_flax
from alibi_convert.conversion import convert
from alibi_convert.errors import CheckpointError, MismatchError
from alibi_convert.hub import resolve
from alibi_convert.optimizers import optax_to_torch, torch_to_optax
from alibi_convert.planning import Plan, plan
from alibi_convert.report import Report, inspect
from alibi_convert.tokenizer import load_tokenizer

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
    "open_optimizer",
    "optax_to_torch",
    "plan",
    "resolve",
    "save_optimizer",
    "torch_to_flax",
    "torch_to_optax",
]
