"""What the paper's fairseq fork computes, and small models of its kinds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from parity_tests.peers import published
from parity_tests.peers.published import Arrays, attention, layer_norm

VOCAB, WIDTH, HIDDEN = 61, 48, 27
SIZES, NARROW = (20, 25, 16), (WIDTH, WIDTH // 4, WIDTH // 16)


def body_shapes(*norms: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index in range(2):
        layer = f"decoder.layers.{index}"
        maps = {f"{layer}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
        maps |= {f"{layer}.fc1": (HIDDEN, WIDTH), f"{layer}.fc2": (WIDTH, HIDDEN)}
        for name, shape in maps.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        norms = (*norms, f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm")
    return found | {f"{norm}.{leaf}": (WIDTH,) for norm in norms for leaf in ("weight", "bias")}


def input_shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for band, (size, narrow) in enumerate(zip(SIZES, NARROW, strict=True)):
        found[f"decoder.embed_tokens.embeddings.{band}.0.weight"] = (size, narrow)
        found[f"decoder.embed_tokens.embeddings.{band}.1.weight"] = (WIDTH, narrow)
    return found


def tied_softmax(arrays: Arrays, ties_projections: bool) -> Arrays:
    """The tensors of an adaptive softmax that shares those of the adaptive input."""
    softmax, bands = "decoder.adaptive_softmax", "decoder.embed_tokens.embeddings"
    own = published.draw({f"{softmax}.head.class_proj.weight": (2, WIDTH)}, arrays_dtype(arrays))
    own[f"{softmax}.head.word_proj.weight"] = arrays[f"{bands}.0.0.weight"]
    for index in range(2):
        projection = arrays[f"{bands}.{index + 1}.1.weight"]
        if not ties_projections:
            projection = np.ascontiguousarray(projection[::-1].T)
        own[f"{softmax}.tail.{index}.0.weight"] = projection
        own[f"{softmax}.tail.{index}.2.weight"] = arrays[f"{bands}.{index + 1}.0.weight"]
    return arrays | own


def separate_softmax(arrays: Arrays) -> Arrays:
    softmax = "decoder.adaptive_softmax"
    shapes: dict[str, tuple[int, ...]] = {f"{softmax}.head.weight": (SIZES[0] + 2, WIDTH)}
    for index in range(2):
        shapes[f"{softmax}.tail.{index}.0.weight"] = (NARROW[index + 1], WIDTH)
        shapes[f"{softmax}.tail.{index}.2.weight"] = (SIZES[index + 1], NARROW[index + 1])
    return arrays | published.draw(shapes, arrays_dtype(arrays))


def arrays_dtype(arrays: Arrays) -> np.dtype:
    return next(iter(arrays.values())).dtype


def embed(arrays: Arrays, tokens: np.ndarray) -> np.ndarray:
    """fairseq's AdaptiveInput: each band looks its tokens up and projects them."""
    if "decoder.embed_tokens.weight" in arrays:
        return arrays["decoder.embed_tokens.weight"][tokens]
    x = np.zeros((len(tokens), WIDTH))
    start = 0
    for band, size in enumerate(SIZES):
        chosen = (start <= tokens) & (tokens < start + size)
        words, projection = (
            arrays[f"decoder.embed_tokens.embeddings.{band}.{part}.weight"] for part in (0, 1)
        )
        x[chosen] = words[tokens[chosen] - start] @ projection.T
        start += size
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def predict(arrays: Arrays, x: np.ndarray, ties_projections: bool) -> np.ndarray:
    """fairseq's AdaptiveSoftmax.get_log_prob, or the logits of an ordinary head."""
    softmax = "decoder.adaptive_softmax"
    if f"{softmax}.tail.0.0.weight" not in arrays:
        return x @ arrays["decoder.output_projection.weight"].T
    if f"{softmax}.head.weight" in arrays:
        head = x @ arrays[f"{softmax}.head.weight"].T
    else:
        names = ("word_proj", "class_proj")
        head = np.concatenate([x @ arrays[f"{softmax}.head.{n}.weight"].T for n in names], axis=1)
    head = log_softmax(head)
    parts = [head[:, : SIZES[0]]]
    for index in range(2):
        projection = arrays[f"{softmax}.tail.{index}.0.weight"]
        narrow = x @ (projection if ties_projections else projection.T)
        words = narrow @ arrays[f"{softmax}.tail.{index}.2.weight"].T
        parts.append(log_softmax(words) + head[:, SIZES[0] + index, None])
    return np.concatenate(parts, axis=1)


def forward(options: dict[str, Any], arrays: Arrays, tokens: np.ndarray) -> np.ndarray:
    """The fork's forward pass for one sequence; its bias is m · j for every query."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], 1e-5)

    slopes = published.slopes(options["decoder_attention_heads"])
    x = embed(arrays, tokens) * (1 if options["no_scale_embedding"] else math.sqrt(WIDTH))
    if options["layernorm_embedding"]:
        x = norm(x, "decoder.layernorm_embedding")
    for index in range(2):
        layer = f"decoder.layers.{index}"
        normed = norm(x, f"{layer}.self_attn_layer_norm")
        query, key, value = (linear(normed, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        attended = attention(query, key, value, slopes, causal=True)
        x = x + linear(attended, f"{layer}.self_attn.out_proj")
        hidden = linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1")
        x = x + linear(np.maximum(hidden, 0), f"{layer}.fc2")
    if "decoder.layer_norm.weight" in arrays:
        x = norm(x, "decoder.layer_norm")
    return predict(arrays, x, options["tie_adaptive_proj"])
