"""What the published BERT-like encoders share, for their tests: shapes and formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.peers import published
from parity_tests.peers.published import Arrays, attention, gelu, layer_norm

Shapes = dict[str, tuple[int, ...]]

SMALL: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 53,
    "type_vocab_size": 2,
    "hidden_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 23,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
}
WIDTH, HIDDEN, VOCAB = (SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
LAYERS = [f"bert.encoder.layer.{index}" for index in range(SMALL["num_hidden_layers"])]
SLOPES = published.slopes(SMALL["num_attention_heads"])
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, published.SEQ))
TYPES = np.random.default_rng(2).integers(0, 2, (3, published.SEQ))


def norm_shapes(name: str) -> Shapes:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def linear_shapes(name: str, rows: int = WIDTH, columns: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def embedding_shapes() -> Shapes:
    return {
        "bert.embeddings.word_embeddings.weight": (VOCAB, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
        **norm_shapes("bert.embeddings.LayerNorm"),
    }


def head_shapes(bias: str) -> Shapes:
    return {
        **linear_shapes("cls.predictions.transform.dense"),
        **norm_shapes("cls.predictions.transform.LayerNorm"),
        f"cls.predictions.{bias}": (VOCAB,),
    }


def pooler_shapes() -> Shapes:
    return linear_shapes("bert.pooler.dense")


class Encoder:
    """The operations of a published forward pass, by the names of its parameters."""

    def __init__(self, arrays: Arrays, eps: float = 1e-12) -> None:
        self.arrays = arrays
        self.eps = eps

    def linear(self, x: np.ndarray, name: str, has_bias: bool = True) -> np.ndarray:
        product = x @ self.arrays[f"{name}.weight"].T
        return product + self.arrays[f"{name}.bias"] if has_bias else product

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"], self.eps)

    def embed(self, tokens: np.ndarray, types: np.ndarray) -> np.ndarray:
        words = self.arrays["bert.embeddings.word_embeddings.weight"][tokens]
        kinds = self.arrays["bert.embeddings.token_type_embeddings.weight"][types]
        return self.norm(words + kinds, "bert.embeddings.LayerNorm")

    def attend(
        self, x: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, layer: str
    ) -> np.ndarray:
        attended = attention(query, key, value, SLOPES, causal=False)
        output = self.linear(attended, f"{layer}.attention.output.dense")
        return self.norm(output + x, f"{layer}.attention.output.LayerNorm")

    def predict(self, x: np.ndarray, bias: str) -> np.ndarray:
        x = gelu(self.linear(x, "cls.predictions.transform.dense"))
        x = self.norm(x, "cls.predictions.transform.LayerNorm")
        words = self.arrays["bert.embeddings.word_embeddings.weight"]
        return x @ words.T + self.arrays[f"cls.predictions.{bias}"]
