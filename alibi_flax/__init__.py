"""Transformers with ALiBi attention in Flax linen; `alibi_torch` is the mirror image."""

from alibi_flax.cache import KVCache
from alibi_flax.checkpoint import from_pretrained, save_pretrained
from alibi_flax.dispatch import (
    AttentionPlan,
    attention,
    attention_implementations,
    attention_plan,
    biased_logits,
)
from alibi_flax.encoding import encode
from alibi_flax.filling import Filled, fill_masks
from alibi_flax.generation import Generated, generate, stream
from alibi_flax.model import ALiBiLM, ALiBiTransformer
from alibi_flax.plans import model_plans
from alibi_flax.scoring import token_log_probabilities
from alibi_flax.sharding import partition_specs
from alibi_flax.tracing import trace
from alibi_spec import ALiBiConfig

__all__ = [
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "AttentionPlan",
    "Filled",
    "Generated",
    "KVCache",
    "attention",
    "attention_implementations",
    "attention_plan",
    "biased_logits",
    "encode",
    "fill_masks",
    "from_pretrained",
    "generate",
    "model_plans",
    "partition_specs",
    "save_pretrained",
    "stream",
    "token_log_probabilities",
    "trace",
]
