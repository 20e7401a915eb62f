"""What MosaicBERT's code computes."""

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


def shapes() -> Shapes:
    found = embedding_shapes()
    for layer in LAYERS:
        found |= linear_shapes(f"{layer}.attention.self.Wqkv", 3 * WIDTH)
        found |= linear_shapes(f"{layer}.attention.output.dense")
        found |= norm_shapes(f"{layer}.attention.output.LayerNorm")
        found[f"{layer}.mlp.gated_layers.weight"] = (2 * HIDDEN, WIDTH)
        found |= linear_shapes(f"{layer}.mlp.wo", WIDTH, HIDDEN)
        found |= norm_shapes(f"{layer}.mlp.layernorm")
    return found


def forward(has_head: bool, arrays: Arrays, tokens: np.ndarray, types: np.ndarray) -> np.ndarray:
    """The published forward pass for one sequence."""
    model = Encoder(arrays)
    x = model.embed(tokens, types)
    for layer in LAYERS:
        fused = model.linear(x, f"{layer}.attention.self.Wqkv")
        query, key, value = np.split(fused, 3, axis=1)
        x = model.attend(x, query, key, value, layer)
        fused = model.linear(x, f"{layer}.mlp.gated_layers", has_bias=False)
        hidden = gelu(fused[:, :HIDDEN]) * fused[:, HIDDEN:]
        x = model.norm(model.linear(hidden, f"{layer}.mlp.wo") + x, f"{layer}.mlp.layernorm")
    return model.predict(x, "decoder.bias") if has_head else x
