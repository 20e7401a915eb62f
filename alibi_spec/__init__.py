"""What ALiBi is, in NumPy: configuration, bias, masks, parameters, reference model and budgets."""

from alibi_spec.biases import bias, geometric_slopes, model_slopes, slopes
from alibi_spec.config import ALiBiConfig
from alibi_spec.masks import masked_softmax, visible_keys
from alibi_spec.parameters import Parameter, parameter_table
from alibi_spec.reference import biased_logits, reference_forward
from alibi_spec.training import Metrics, Recipe, masked_lm_batch, next_token_targets

__all__ = [
    "ALiBiConfig",
    "Metrics",
    "Parameter",
    "Recipe",
    "bias",
    "biased_logits",
    "geometric_slopes",
    "masked_lm_batch",
    "masked_softmax",
    "model_slopes",
    "next_token_targets",
    "parameter_table",
    "reference_forward",
    "slopes",
    "visible_keys",
]
