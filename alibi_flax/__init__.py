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
from alibi_flax.precision import full_precision
from alibi_flax.scoring import token_log_probabilities
from alibi_flax.sharding import batch_sharding, parameter_sharding, partition_specs, shardings
from alibi_flax.stacking import stacked, unstacked
from alibi_flax.tracing import trace
from alibi_flax.training import Trainer, adamw, clip_gradients, loss, train_step
from alibi_spec import ALiBiConfig, Metrics, Recipe

__all__ = [
    "ALiBiConfig",
    "ALiBiLM",
    "ALiBiTransformer",
    "AttentionPlan",
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
    "batch_sharding",
    "biased_logits",
    "clip_gradients",
    "encode",
    "fill_masks",
    "from_pretrained",
    "full_precision",
    "generate",
    "loss",
    "model_plans",
    "parameter_sharding",
    "partition_specs",
    "save_pretrained",
    "shardings",
    "stacked",
    "stream",
    "token_log_probabilities",
    "trace",
    "train_step",
    "unstacked",
]
