"""Every intermediate that the parity proof compares, under the reference model's names."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax import Array
from jaxtyping import Float, Integer, Num

from alibi_flax.model import ALiBiLM, ALiBiTransformer, Attention, AttentionMask, Block, FeedForward
from alibi_flax.stacking import unstacked


def trace(
    model: ALiBiLM | ALiBiTransformer,
    params: dict[str, Any],
    inputs: Num[Array, "batch seq *d_model"],
    attention_mask: AttentionMask | None = None,
    token_type_ids: Integer[Array, "batch seq"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Run the model and return its intermediates, in order of computation.

    Returns:
        "embedding"; per layer i "layers.i.biased_logits" [batch, heads, seq, seq], "layers.i.attn"
        and "layers.i.ffn" (the residual branches) and "layers.i"; then "output", and "logits" of a
        model with a head. Names and values are those of `alibi_spec.reference_forward`.

    Raises:
        ValueError: as for the model's own call.
    """
    values: dict[str, Float[Array, "..."]] = {}

    def record(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        is_call = context.method_name == "__call__"
        if is_call and isinstance(context.module, ALiBiTransformer):
            values["embedding"] = args[0]
        output = call(*args, **kwargs)
        if not is_call:
            return output
        module: nn.Module = context.module
        name = ".".join(part.replace("layers_", "layers.") for part in module.path)
        name = name.removeprefix("transformer.")
        if isinstance(module, Attention):
            values[name.replace("attn", "biased_logits")] = module.biased_logits(*args[:4])
        if isinstance(module, Attention | FeedForward | Block):
            values[name] = output
        if isinstance(module, ALiBiTransformer):
            values["output"] = output
        return output

    with nn.intercept_methods(record):
        # With recomputation or a scan the intermediates would be tracers.
        plain: Any = model.clone(recompute=False, scan_layers=False)
        optional = {"token_type_ids": token_type_ids} if isinstance(model, ALiBiLM) else {}
        result = plain.apply({"params": unstacked(params)}, inputs, attention_mask, **optional)
    if isinstance(model, ALiBiLM) and model.config.head != "none":
        values["logits"] = result
    return values
