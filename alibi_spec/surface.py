"""The public signatures that both backends must offer: names, kinds and defaults, nothing else.

No backend imports this file; `parity_tests/test_surface.py` holds both against it.
"""

from __future__ import annotations

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


def generate(model: Any, prompt: Any, max_new_tokens: int) -> Any: ...


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


PUBLIC = (
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "attention",
    "attention_implementations",
    "attention_plan",
    "biased_logits",
    "generate",
    "model_plans",
    "trace",
)
