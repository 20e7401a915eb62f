"""The libraries that run foreign checkpoints themselves, where their result can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.families import Family, Source, family_named
from alibi_convert.formats.shards import read_tensors
from alibi_convert.machine import is_installed
from alibi_convert.tensors import Tensors, as_torch


def why_no_peer(checkpoint: Checkpoint) -> str | None:
    """Why no other library can run this checkpoint here, or None."""
    family = family_named(checkpoint.family)
    if family is None or family.peer is None:
        return f"no library runs {checkpoint.family} checkpoints"
    if not checkpoint.path.is_dir():
        return "transformers reads only folders"
    for module in ("transformers", "torch"):
        if not is_installed(module):
            return f"{module} is not installed"
    if (checkpoint.foreign_config or {}).get("model_type") != family.name:
        return "transformers does not know its model_type"
    ignored = family.peer.ignores(checkpoint.config)
    if ignored:
        return f"transformers' {family.name.upper()} ignores {', '.join(ignored)}"
    return _misunderstood(checkpoint, family)


def peer_outputs(
    checkpoint: Checkpoint, tokens: np.ndarray, attention_mask: np.ndarray, dtype: str
) -> np.ndarray:
    """Logits [batch, seq, vocab] of transformers' own model on the CPU."""
    import torch

    import alibi_torch

    model = _load(checkpoint, getattr(torch, dtype))
    with alibi_torch.full_precision(), torch.no_grad():
        inputs = torch.from_numpy(tokens), torch.from_numpy(attention_mask)
        return model.eval()(input_ids=inputs[0], attention_mask=inputs[1]).logits.numpy()


def _misunderstood(checkpoint: Checkpoint, family: Family) -> str | None:
    """Why transformers would run another model than the folder describes, or None.

    Our table reads the configuration as transformers has parsed it, and must find the same model. A
    model of transformers on the meta device shows which tensors it would use.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    errors = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)
    try:
        theirs = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False, **_untied(checkpoint)
        )
        config = family.read_config(
            Source(theirs.to_dict(), Tensors({}), frozenset(checkpoint.ignored))
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
    except (*errors, StrictDataclassError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"transformers does not read this folder: {cause}"
    if config != checkpoint.config:
        return "transformers reads another configuration in this folder"
    expected = {name for name, _ in model.named_parameters()}
    named = {name for origin in checkpoint.origins.values() for name in origin}
    merged = () if checkpoint.merged is None else checkpoint.merged.changed
    stored = {*read_tensors(checkpoint.path, allow_pt=True), *merged}
    if not (expected <= named <= {*stored, *(f"transformer.{name}" for name in stored)}):
        return "transformers does not know these names of tensors"
    return None


def _load(checkpoint: Checkpoint, dtype: Any) -> Any:
    import transformers

    family = family_named(checkpoint.family)
    attention = None if family is None or family.peer is None else family.peer.attention
    with _without_progress_bars():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_untied(checkpoint),
        )
    model = loaded[0]
    if checkpoint.merged is not None:
        parameters = model.state_dict()
        for name, array in checkpoint.merged.changed.items():
            parameters[name].copy_(as_torch(array))
    return model


def _untied(checkpoint: Checkpoint) -> dict[str, bool]:
    """The option of transformers for a base whose head an adapter has made a layer of its own."""
    is_untied = checkpoint.merged is not None and checkpoint.merged.untied is not None
    return {"tie_word_embeddings": False} if is_untied else {}


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
