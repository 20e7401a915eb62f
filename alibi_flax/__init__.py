"""Transformers with ALiBi attention in Flax linen; `alibi_torch` is the mirror image."""

from alibi_flax.attention import attention, attention_implementations, biased_logits
from alibi_flax.checkpoint import from_pretrained, save_pretrained
from alibi_flax.generate import generate
from alibi_flax.model import ALiBiLM, ALiBiTransformer
from alibi_flax.trace import trace
from alibi_spec import ALiBiConfig

__all__ = [
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "attention",
    "attention_implementations",
    "biased_logits",
    "from_pretrained",
    "generate",
    "save_pretrained",
    "trace",
]
