"""Transformers with ALiBi attention in PyTorch; `alibi_flax` is the mirror image."""

from alibi_spec import ALiBiConfig, Metrics, Recipe
from alibi_torch.cache import KVCache
from alibi_torch.dispatch import (
    AttentionPlan,
    attention,
    attention_implementations,
    attention_plan,
    biased_logits,
)
from alibi_torch.encoding import encode
from alibi_torch.filling import Filled, fill_masks
from alibi_torch.generation import Generated, generate, stream
from alibi_torch.model import ALiBiLM, ALiBiTransformer
from alibi_torch.plans import model_plans
from alibi_torch.precision import full_precision
from alibi_torch.scoring import token_log_probabilities
from alibi_torch.tracing import trace
from alibi_torch.training import Trainer, adamw, clip_gradients, loss, train_step

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
]
