"""The libraries that run foreign checkpoints themselves, where they can be trusted to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.extras import is_installed

# Family -> the attention of transformers that is right: Falcon's eager one applies ALiBi twice.
_ATTENTION = {"bloom": "eager", "mpt": "eager", "falcon": "sdpa"}

# What transformers' MPT computes whatever its configuration says.
_MPT_ALWAYS = {
    "activation": "gelu",
    "attention_bias": False,
    "bias_max": 8.0,
    "ffn_bias": False,
    "gated_ffn": False,
    "kv_heads": None,  # num_heads
    "logit_scale": 1.0,
    "norm": "layer",
    "norm_bias": False,
    "qk_norm": False,
}


def why_no_peer(checkpoint: Checkpoint) -> str | None:
    """Why nobody but us can run this checkpoint here, or None."""
    family, config = checkpoint.family, checkpoint.config
    if family not in _ATTENTION:
        return f"no library runs {family} checkpoints"
    if not checkpoint.path.is_dir():
        return "transformers reads folders alone"
    for module in ("transformers", "torch"):
        if not is_installed(module):
            return f"{module} is not installed"
    if family == "mpt":
        always = _MPT_ALWAYS | {"kv_heads": config.num_heads}
        ignored = [name for name, value in always.items() if getattr(config, name) != value]
        if config.ffn_dim != 4 * config.d_model:
            ignored.append("feed_forward_dim")
        if ignored:
            return f"transformers' MPT ignores {', '.join(ignored)}"
    return None


def peer_outputs(
    checkpoint: Checkpoint, tokens: np.ndarray, attention_mask: np.ndarray, dtype: str
) -> np.ndarray:
    """Logits [batch, seq, vocab] of transformers' own model on the CPU."""
    import torch
    import transformers

    with _without_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=getattr(torch, dtype),
            attn_implementation=_ATTENTION[checkpoint.family],
            local_files_only=True,
        ).eval()
    with torch.no_grad():
        inputs = torch.from_numpy(tokens), torch.from_numpy(attention_mask)
        return model(input_ids=inputs[0], attention_mask=inputs[1]).logits.numpy()


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
