"""How much of a model's attention will be computed: the plan of every layer for given inputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Integer, Num
from torch import Tensor

from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.checks import check_plannable
from alibi_torch.dispatch import AttentionPlan, attention_plan
from alibi_torch.model import ALiBiLM, ALiBiTransformer, AttentionMask
from alibi_torch.positions import require_whole_positions


def model_plans(
    model: ALiBiLM | ALiBiTransformer,
    inputs: Num[Tensor, "batch seq *d_model"],
    attention_mask: AttentionMask | None = None,
    token_type_ids: Integer[Tensor, "batch seq"] | None = None,
    *,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> list[AttentionPlan]:
    """Run the model and return `attention_plan` of every layer, first layer first.

    Raises:
        ValueError: as for the model's own call and for `attention_plan`; the model's bias has no
            plan, or its positions are divided over devices.
    """
    require_whole_positions(model.mesh, "model_plans")
    check_plannable(model.config.distance, model.config.causal)
    plans: list[AttentionPlan] = []

    def record(module: Any, args: tuple[Any, ...]) -> None:
        inputs: Any = module.attention_inputs(*args)
        del inputs["value"], inputs["distance"]
        plans.append(attention_plan(**inputs, tolerance=tolerance, block_size=block_size))

    transformer = model.transformer if isinstance(model, ALiBiLM) else model
    layers: Any = transformer.layers
    optional = {"token_type_ids": token_type_ids} if isinstance(model, ALiBiLM) else {}
    handles = [layer.attn.register_forward_pre_hook(record) for layer in layers]
    try:
        with torch.no_grad():
            model(inputs, attention_mask, **optional)
    finally:
        for handle in handles:
            handle.remove()
    return plans
