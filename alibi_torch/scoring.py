"""How likely a model finds the tokens of a text (SPEC.md §13)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from alibi_spec.checks import check_scoring, require_vocabulary
from alibi_torch.divided import require_gathered
from alibi_torch.model import ALiBiLM, AttentionMask, checked_tokens

CHUNK = 256  # positions whose logits are in memory at once


@torch.no_grad()
def token_log_probabilities(
    model: ALiBiLM,
    tokens: Integer[Tensor, "batch seq"],
    attention_mask: AttentionMask | None = None,
) -> Float[Tensor, "batch targets"]:
    """log p of every token but the first, given those before it: float32 (float64).

    The last token is not read. Logits are never held for more than a few positions at a time.

    Raises:
        ValueError: as for the model's own call; an encoder, fewer than two tokens, or a
            model that FSDP has divided.
    """
    require_gathered(model.mesh, "token_log_probabilities")
    check_scoring(model.config.causal, model.config.head, tokens.shape)
    tokens = checked_tokens(tokens, require_vocabulary(model.config.vocab_size))
    mask = None if attention_mask is None else attention_mask[:, :-1]
    hidden = model.transformer(model.embed(tokens[:, :-1]), mask)
    found = []
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        targets = tokens[:, start + 1 : start + 1 + CHUNK]
        logits = model.head(hidden[:, start : start + targets.shape[1]])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(wide.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0])
    return torch.cat(found, dim=1)
