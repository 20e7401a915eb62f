"""The public signatures that both backends must have: names, kinds and defaults.

No backend imports this file; `parity_tests/test_surface.py` holds both against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alibi_spec.certificate import BLOCK_SIZE


def attention(
    query: Any,
    key: Any,
    value: Any,
    slopes: Any,
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Any = None,
    segment_ids: Any = None,
    tolerance: str | float = "dtype",
    implementation: str = "auto",
    distance: str = "absolute",
    dropout: float = 0.0,
    dropout_rng: Any = None,
) -> Any: ...


def biased_logits(
    query: Any,
    key: Any,
    slopes: Any,
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Any = None,
    segment_ids: Any = None,
    distance: str = "absolute",
) -> Any: ...


def attention_implementations() -> tuple[str, ...]: ...


def attention_plan(
    query: Any,
    key: Any,
    slopes: Any,
    *,
    causal: bool = True,
    scale: float | None = None,
    attention_mask: Any = None,
    segment_ids: Any = None,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> Any: ...


def encode(
    model: Any,
    sequences: Any,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    batch_size: int = 32,
) -> Any: ...


def fill_masks(
    model: Any,
    tokens: Any,
    mask_token_id: int,
    *,
    attention_mask: Any = None,
    top_k: int = 5,
) -> Any: ...


def full_precision() -> Any: ...


def generate(
    model: Any,
    tokens: Any,
    max_new_tokens: int,
    *,
    attention_mask: Any = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    prefill_chunk: int = 1024,
    windows: Any = None,
    return_log_probabilities: bool = False,
) -> Any: ...


def stream(
    model: Any,
    tokens: Any,
    max_new_tokens: int,
    *,
    attention_mask: Any = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    prefill_chunk: int = 1024,
    windows: Any = None,
) -> Any: ...


def token_log_probabilities(model: Any, tokens: Any, attention_mask: Any = None) -> Any: ...


def trace(
    model: Any, inputs: Any, attention_mask: Any = None, token_type_ids: Any = None
) -> dict[str, Any]: ...


def model_plans(
    model: Any,
    inputs: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    *,
    tolerance: str | float = "dtype",
    block_size: int = BLOCK_SIZE,
) -> list[Any]: ...


def loss(model: Any, batch: Any) -> Any: ...


def adamw(model: Any, recipe: Any) -> Any: ...


def clip_gradients(parameters: Any, max_norm: float | None) -> Any: ...


def train_step(model: Any, optimizer: Any, batch: Any, recipe: Any) -> Any: ...


class Trainer:
    def __init__(self, model: Any, recipe: Any) -> None: ...

    def step(self, batch: Any) -> Any: ...

    def evaluate(self, batch: Any) -> Any: ...


PUBLIC = (
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "Filled",
    "Generated",
    "KVCache",
    "Metrics",
    "Recipe",
    "Trainer",
    "adamw",
    "attention",
    "attention_implementations",
    "attention_plan",
    "biased_logits",
    "clip_gradients",
    "encode",
    "fill_masks",
    "full_precision",
    "generate",
    "loss",
    "model_plans",
    "stream",
    "token_log_probabilities",
    "trace",
    "train_step",
)
