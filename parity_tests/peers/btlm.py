"""What BTLM's and Jais' code computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from parity_tests.peers.published import Arrays, attention, layer_norm, silu


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], width)}
    for index in range(config["n_layer"]):
        layer = f"transformer.h.{index}"
        found |= {f"{layer}.ln_{n}.{leaf}": (width,) for n in "12" for leaf in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, hidden),
            ("mlp.c_fc2", width, hidden),
            ("mlp.c_proj", hidden, width),
        ):
            if name != "mlp.c_fc2" or config["activation_function"] == "swiglu":
                found |= {
                    f"{layer}.{name}.weight": (rows, columns),
                    f"{layer}.{name}.bias": (columns,),
                }
    found |= {f"transformer.ln_f.{leaf}": (width,) for leaf in ("weight", "bias")}
    if not config.get("tie_word_embeddings", True):
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def forward(
    config: dict[str, Any], slopes: np.ndarray, arrays: Arrays, tokens: np.ndarray
) -> np.ndarray:
    """The published forward pass for one sequence; Conv1D is x W + b with W stored [in, out]."""

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return x @ arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], 1e-5)

    width = config["n_embd"]
    head_dim = width // config["n_head"]
    by_head_dim = config.get("mup_scale_qk_dot_by_d", config.get("scale_qk_dot_by_d", False))
    scale = head_dim ** (-1.0 if by_head_dim else -0.5)
    x = arrays["transformer.wte.weight"][tokens]
    x = x * config.get("mup_embeddings_scale", config.get("embeddings_scale", 1.0))
    for index in range(config["n_layer"]):
        layer = f"transformer.h.{index}"
        query, key, value = np.split(conv(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn"), 3, 1)
        attended = attention(query, key, value, slopes, causal=True, scale=scale)
        x = x + conv(attended, f"{layer}.attn.c_proj")
        normed = norm(x, f"{layer}.ln_2")
        hidden = conv(normed, f"{layer}.mlp.c_fc")
        if config["activation_function"] == "swiglu":
            hidden = hidden * silu(conv(normed, f"{layer}.mlp.c_fc2"))
        else:  # gelu_new
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            hidden = 0.5 * hidden * (1 + np.tanh(inner))
        x = x + conv(hidden, f"{layer}.mlp.c_proj")
    head = "lm_head" if "lm_head.weight" in arrays else "transformer.wte"
    logits = norm(x, "transformer.ln_f") @ arrays[f"{head}.weight"].T
    factor = config.get("mup_output_alpha", 1.0) * config.get("mup_width_scale", 1.0)
    return logits * config.get("width_scale", factor)
