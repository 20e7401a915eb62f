"""Which tokens a masked language model finds likely in masked places (SPEC.md §15)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from alibi_spec.checks import check_filling, require_vocabulary
from alibi_spec.filling import masked_positions
from alibi_torch.divided import require_gathered
from alibi_torch.model import ALiBiLM, AttentionMask


@dataclass(frozen=True)
class Filled:
    """The result of `fill_masks`: a row for each mask, in reading order.

    Attributes:
        positions: the sequence and the place of each mask.
        tokens: the likeliest first; of equally likely ones the lower id first.
        probabilities: of these tokens: float32 (float64).
    """

    positions: Int[Tensor, "masks 2"]
    tokens: Int[Tensor, "masks top_k"]
    probabilities: Float[Tensor, "masks top_k"]


@torch.no_grad()
def fill_masks(
    model: ALiBiLM,
    tokens: Integer[Tensor, "batch seq"],
    mask_token_id: int,
    *,
    attention_mask: AttentionMask | None = None,
    top_k: int = 5,
) -> Filled:
    """The likeliest tokens of every masked place, each place by itself.

    Logits are held for the masked places alone.

    Args:
        tokens: with `mask_token_id` where a token is to be found.
        attention_mask: 0 for padding on either side, 1 elsewhere; a mask in padding is passed over.
        top_k: how many tokens of each place.

    Raises:
        ValueError: as for the model's own call; a decoder, a model without a head or in training
            mode, no mask, `mask_token_id` or `top_k` outside the vocabulary, or a model that FSDP
            has divided.
    """
    config = model.config
    vocab_size = require_vocabulary(config.vocab_size)
    require_gathered(model.mesh, "fill_masks")
    check_filling(config.causal, config.head, vocab_size, mask_token_id, top_k)
    if model.training:
        raise ValueError("the model is in training mode, with dropout; call model.eval() first")
    hidden = model.transformer(model.embed(tokens), attention_mask)
    visible = None if attention_mask is None else attention_mask.numpy(force=True)
    found = masked_positions(tokens.numpy(force=True), mask_token_id, visible)
    positions = torch.from_numpy(found).to(hidden.device)
    return Filled(positions, *_likeliest(model, hidden, positions, top_k))


def _likeliest(
    model: ALiBiLM,
    hidden: Float[Tensor, "batch seq embed"],
    positions: Int[Tensor, "masks 2"],
    top_k: int,
) -> tuple[Int[Tensor, "masks top_k"], Float[Tensor, "masks top_k"]]:
    logits = model.head(hidden[positions[:, 0], positions[:, 1]][None])[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not `topk`, which takes equal logits in any order.
    tokens = wide.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return tokens, wide.softmax(dim=1).gather(1, tokens)
