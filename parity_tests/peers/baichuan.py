"""What Baichuan's code computes, and a small model."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.peers import published
from parity_tests.peers.published import Arrays, attention, silu

SMALL: dict[str, Any] = {
    "model_type": "baichuan",
    "vocab_size": 53,
    "hidden_size": 40,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "model_max_length": 64,
    "rms_norm_eps": 1e-3,
}


def shapes() -> dict[str, tuple[int, ...]]:
    width, hidden, vocab = (
        SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for index in range(SMALL["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.self_attn.W_pack.weight": (3 * width, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.post_attention_layernorm.weight": (width,),
            f"{layer}.mlp.gate_proj.weight": (hidden, width),
            f"{layer}.mlp.up_proj.weight": (hidden, width),
            f"{layer}.mlp.down_proj.weight": (width, hidden),
        }
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight


def forward(has_norm_head: bool, arrays: Arrays, tokens: np.ndarray) -> np.ndarray:
    """The published forward pass for one sequence."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ arrays[f"{name}.weight"].T

    slopes = published.slopes(SMALL["num_attention_heads"])
    x = arrays["model.embed_tokens.weight"][tokens]
    for index in range(SMALL["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        normed = rms_norm(x, arrays[f"{layer}.input_layernorm.weight"])
        query, key, value = np.split(linear(normed, f"{layer}.self_attn.W_pack"), 3, axis=1)
        attended = attention(query, key, value, slopes, causal=True)
        x = x + linear(attended, f"{layer}.self_attn.o_proj")
        normed = rms_norm(x, arrays[f"{layer}.post_attention_layernorm.weight"])
        gate = silu(linear(normed, f"{layer}.mlp.gate_proj"))
        x = x + linear(gate * linear(normed, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = arrays["lm_head.weight"]
    if has_norm_head:
        head = head / np.sqrt((head**2).sum(axis=1, keepdims=True))
    return rms_norm(x, arrays["model.norm.weight"]) @ head.T
