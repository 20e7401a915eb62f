"""How much of a model's attention will be computed: the plan of every layer for given inputs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax import Array
from jaxtyping import Integer, Num

from alibi_flax.dispatch import AttentionPlan, attention_plan
from alibi_flax.model import ALiBiLM, ALiBiTransformer, Attention, AttentionMask
from alibi_flax.stacking import unstacked
from alibi_spec.certificate import BLOCK_SIZE
from alibi_spec.checks import check_plannable


def model_plans(
    model: ALiBiLM | ALiBiTransformer,
    params: dict[str, Any],
    inputs: Num[Array, "batch seq *d_model"],
    attention_mask: AttentionMask | None = None,
    token_type_ids: Integer[Array, "batch seq"] | None = None,
    *,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> list[AttentionPlan]:
    """Run the model and return `attention_plan` of every layer, first layer first.

    Raises:
        ValueError: as for the model's own call and for `attention_plan`; or the model's bias has
            no plan.
    """
    check_plannable(model.config.distance, model.config.causal)
    plans: list[AttentionPlan] = []

    def record(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module: nn.Module = context.module
        if isinstance(module, Attention) and context.method_name == "__call__":
            inputs: Any = module.attention_inputs(*args[:4])
            del inputs["value"], inputs["distance"]
            plans.append(attention_plan(**inputs, tolerance=tolerance, block_size=block_size))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        # With recomputation or a scan the arguments would be tracers.
        plain: Any = model.clone(recompute=False, scan_layers=False)
        optional = {"token_type_ids": token_type_ids} if isinstance(model, ALiBiLM) else {}
        plain.apply({"params": unstacked(params)}, inputs, attention_mask, **optional)
    return plans
