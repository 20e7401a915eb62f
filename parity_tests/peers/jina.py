"""What the four kinds of Jina's encoders compute."""

from __future__ import annotations

import numpy as np

from parity_tests.peers.encoders import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Encoder,
    Shapes,
    embedding_shapes,
    linear_shapes,
    norm_shapes,
)
from parity_tests.peers.published import Arrays, gelu


def shapes(kind: str) -> Shapes:
    found = embedding_shapes()
    for layer in LAYERS:
        for name in ("query", "key", "value"):
            found |= linear_shapes(f"{layer}.attention.self.{name}")
        found |= linear_shapes(f"{layer}.attention.output.dense")
        found |= norm_shapes(f"{layer}.attention.output.LayerNorm")
        if kind == "qk-norm":
            found |= norm_shapes(f"{layer}.attention.self.layer_norm_q")
            found |= norm_shapes(f"{layer}.attention.self.layer_norm_k")
            found |= norm_shapes(f"{layer}.layer_norm_1") | norm_shapes(f"{layer}.layer_norm_2")
            found[f"{layer}.mlp.up_gated_layer.weight"] = (2 * HIDDEN, WIDTH)
            found |= linear_shapes(f"{layer}.mlp.down_layer", WIDTH, HIDDEN)
        elif kind == "original":
            found |= linear_shapes(f"{layer}.intermediate.dense", HIDDEN, WIDTH)
            found |= linear_shapes(f"{layer}.output.dense", WIDTH, HIDDEN)
            found |= norm_shapes(f"{layer}.output.LayerNorm")
        else:
            found[f"{layer}.mlp.gated_layers.weight"] = (2 * HIDDEN, WIDTH)
            found |= linear_shapes(f"{layer}.mlp.wo", WIDTH, HIDDEN)
            found |= norm_shapes(f"{layer}.mlp.layernorm")
    return found


def forward(kind: str, arrays: Arrays, tokens: np.ndarray, types: np.ndarray) -> np.ndarray:
    """The published forward pass for one sequence."""
    model = Encoder(arrays)
    x = model.embed(tokens, types)
    for layer in LAYERS:
        query, key, value = (
            model.linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value")
        )
        if kind == "qk-norm":
            query = model.norm(query, f"{layer}.attention.self.layer_norm_q")
            key = model.norm(key, f"{layer}.attention.self.layer_norm_k")
        attended = model.attend(x, query, key, value, layer)  # normalised, x added to it
        x = model.norm(x + attended, f"{layer}.layer_norm_1") if kind == "qk-norm" else attended
        if kind == "qk-norm":
            fused = model.linear(x, f"{layer}.mlp.up_gated_layer", has_bias=False)
            hidden = fused[:, :HIDDEN] * gelu(fused[:, HIDDEN:])
            output, norm = f"{layer}.mlp.down_layer", f"{layer}.layer_norm_2"
        elif kind == "original":
            hidden = gelu(model.linear(x, f"{layer}.intermediate.dense"))
            output, norm = f"{layer}.output.dense", f"{layer}.output.LayerNorm"
        else:
            fused = model.linear(x, f"{layer}.mlp.gated_layers", has_bias=False)
            gate = fused[:, :HIDDEN]
            hidden = gelu(gate) if kind == "geglu" else np.maximum(gate, 0)
            hidden = hidden * fused[:, HIDDEN:]
            output, norm = f"{layer}.mlp.wo", f"{layer}.mlp.layernorm"
        x = model.norm(model.linear(hidden, output) + x, norm)
    return model.predict(x, "bias") if "cls.predictions.bias" in arrays else x
