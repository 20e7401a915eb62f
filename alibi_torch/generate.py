"""Greedy continuation of a prompt."""

from __future__ import annotations

import torch
from jaxtyping import Integer
from torch import Tensor

from alibi_spec.checks import check_generation
from alibi_torch.model import ALiBiLM, checked_tokens


@torch.no_grad()
def generate(
    model: ALiBiLM, prompt: Integer[Tensor, "batch prompt_len"], max_new_tokens: int
) -> Integer[Tensor, "batch total_len"]:
    """The prompt followed by the likeliest next token, `max_new_tokens` times.

    Every step reads the whole sequence again: this is the plain definition, not the fast one. The
    sequence may outgrow `max_len`.

    Raises:
        ValueError: the model is an encoder or in training mode, or the prompt or `max_new_tokens`
            is not valid.
    """
    check_generation(model.config.causal, model.config.head, max_new_tokens)
    if model.training:
        raise ValueError("the model is in training mode, with dropout; call model.eval() first")
    tokens = checked_tokens(prompt, model.token_embedding.num_embeddings)
    for _ in range(max_new_tokens):
        next_token = model(tokens)[:, -1].argmax(dim=-1)
        tokens = torch.cat([tokens, next_token[:, None]], dim=1)
    return tokens
