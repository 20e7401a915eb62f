"""Every intermediate that the parity proof compares, under the reference model's names."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Integer, Num
from torch import Tensor

from alibi_torch.model import ALiBiLM, ALiBiTransformer, AttentionMask
from alibi_torch.positions import require_whole_positions


def trace(
    model: ALiBiLM | ALiBiTransformer,
    inputs: Num[Tensor, "batch seq *d_model"],
    attention_mask: AttentionMask | None = None,
    token_type_ids: Integer[Tensor, "batch seq"] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Run the model and return its intermediates, in order of computation.

    Returns:
        "embedding"; per layer i "layers.i.biased_logits" [batch, heads, seq, seq], "layers.i.attn"
        and "layers.i.ffn" (the residual branches) and "layers.i"; then "output", and "logits" of a
        model with a head. Names and values are those of `alibi_spec.reference_forward`. Of a model
        on a mesh, biased logits are of this device's heads.

    Raises:
        ValueError: as for the model's own call; positions that are divided over devices.
    """
    require_whole_positions(model.mesh, "trace")
    values: dict[str, Float[Tensor, "..."]] = {}
    transformer = model.transformer if isinstance(model, ALiBiLM) else model
    handles = []

    def record(module: Any, name: str) -> None:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if name.endswith(".attn"):
                values[name.replace("attn", "biased_logits")] = module.biased_logits(*args)
            values[name] = output

        handles.append(module.register_forward_hook(hook))

    layers: Any = transformer.layers
    for index, layer in enumerate(layers):
        record(layer.attn, f"layers.{index}.attn")
        record(layer.ffn, f"layers.{index}.ffn")
        record(layer, f"layers.{index}")
    record(transformer, "output")

    def before(module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG001
        values["embedding"] = args[0]

    handles.append(transformer.register_forward_pre_hook(before))
    try:
        optional = {"token_type_ids": token_type_ids} if isinstance(model, ALiBiLM) else {}
        result = model(inputs, attention_mask, **optional)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(model, ALiBiLM) and model.config.head != "none":
        values["logits"] = result
    return values
