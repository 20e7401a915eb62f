"""Transformers with ALiBi attention in PyTorch; `alibi_flax` is the mirror image."""

from alibi_spec import ALiBiConfig
from alibi_torch.attention import attention, attention_implementations, biased_logits
from alibi_torch.generate import generate
from alibi_torch.model import ALiBiLM, ALiBiTransformer
from alibi_torch.trace import trace

__all__ = [
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "attention",
    "attention_implementations",
    "biased_logits",
    "generate",
    "trace",
]
