"""What ALiBi is, in NumPy: configuration, bias, masks, parameters, reference model and budgets."""

from alibi_spec.biases import bias, geometric_slopes, model_slopes, slopes
from alibi_spec.config import ALiBiConfig
from alibi_spec.masks import masked_softmax, visible_keys
from alibi_spec.parameters import Parameter, parameter_table
from alibi_spec.reference import biased_logits, reference_forward

__all__ = [
    "ALiBiConfig",
    "Parameter",
    "bias",
    "biased_logits",
    "geometric_slopes",
    "masked_softmax",
    "model_slopes",
    "parameter_table",
    "reference_forward",
    "slopes",
    "visible_keys",
]
