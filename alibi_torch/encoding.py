"""One vector for each sequence (SPEC.md §14)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alibi_spec.batching import batches_by_length
from alibi_spec.pooling import check_pooling
from alibi_torch.divided import require_gathered
from alibi_torch.model import ALiBiLM


@torch.no_grad()
def encode(
    model: ALiBiLM,
    sequences: Sequence[Sequence[int]],
    *,
    pooling: str = "mean",
    normalize: bool = True,
    batch_size: int = 32,
) -> Float[Tensor, "sequences embed"]:
    """The pooled hidden states of each sequence, in the order given: float32 (float64).

    Args:
        sequences: tokens, of any lengths; those of like length are read together.
        pooling: "mean" of all positions, the first ("cls") or the "last".
        normalize: scale each vector to length 1.
        batch_size: sequences that are read together.

    Raises:
        ValueError: a model in training mode, a sequence without tokens, an unknown option, or a
            model that FSDP has divided.
    """
    check_pooling(pooling, batch_size)
    require_gathered(model.mesh, "encode")
    if model.training:
        raise ValueError("the model is in training mode, with dropout; call model.eval() first")
    device = model.token_embedding.weight.device
    vectors = torch.zeros(len(sequences), model.config.d_model, device=device)
    limit = model.config.slope_interpolation
    for places, tokens, lengths in batches_by_length(sequences, batch_size, limit):
        visible = torch.arange(tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
        visible = visible.to(device)
        x = model.embed(torch.from_numpy(tokens).to(device))
        found = _pooled(model.transformer(x, visible), visible, pooling)
        found = F.normalize(found, dim=1, eps=0.0) if normalize else found
        vectors = vectors.to(found.dtype)
        vectors[torch.from_numpy(places).to(device)] = found
    return vectors


def _pooled(
    hidden: Float[Tensor, "batch seq embed"], visible: Bool[Tensor, "batch seq"], pooling: str
) -> Float[Tensor, "batch embed"]:
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    lengths = visible.sum(dim=1)
    if pooling == "mean":
        total = torch.where(visible[..., None], hidden, 0.0).sum(dim=1)
        return total / lengths[:, None]
    row = torch.arange(len(hidden), device=hidden.device)
    return hidden[row, 0 if pooling == "cls" else lengths - 1]
