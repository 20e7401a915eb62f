"""The named configurations and inputs, hostile ones included."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from alibi_spec import ALiBiConfig, parameter_table

BATCH, SEQ = 3, 300  # past 256, where bfloat16 stops counting

_SMALL: dict[str, Any] = {"num_layers": 2, "d_model": 48, "max_len": 64, "expansion_factor": 2}

# Most have the same widths and three heads: JAX compiles an operator once for each shape.
CONFIGS: dict[str, ALiBiConfig] = {
    "decoder": ALiBiConfig(**_SMALL, num_heads=4),
    "encoder": ALiBiConfig(**_SMALL, num_heads=3, causal=False),
    "lm-tied": ALiBiConfig(**_SMALL, num_heads=3, vocab_size=101),
    "lm-untied": ALiBiConfig(**_SMALL, num_heads=3, vocab_size=101, tie_embeddings=False),
    "odd-heads": ALiBiConfig(num_layers=2, d_model=7 * 5, num_heads=7),
    "one-head": ALiBiConfig(**_SMALL | {"num_layers": 1}, num_heads=1, causal=False, bias_max=3.0),
    "bare": ALiBiConfig(
        **_SMALL,
        num_heads=3,
        attention_bias=False,
        output_projection=False,
        final_norm=False,
        attention_scale=0.3,
    ),
    "own-slopes": ALiBiConfig(**_SMALL, num_heads=3, slopes=(0.0, 0.3, 2.0), norm_eps=1e-3),
    "bloom-like": ALiBiConfig(
        **_SMALL,
        num_heads=3,
        vocab_size=101,
        activation="gelu_tanh",
        norm_placement="pre_residual",
        embedding_norm=True,
    ),
    "grouped": ALiBiConfig(
        **_SMALL,
        num_heads=6,
        vocab_size=101,
        num_kv_heads=2,
        slopes=((0.5, 0.25, 0.1, 0.02, 0.0, 1.0), (0.3, 0.003, 0.7, 1.5, 0.01, 0.04)),
        qkv_clip=1.5,
        qk_norm=True,
        attention_bias=False,
        ffn_bias=False,
        norm_bias=False,
        logit_scale=0.25,
    ),
    "gated-rms": ALiBiConfig(
        num_layers=2,
        d_model=48,
        num_heads=3,
        vocab_size=101,
        tie_embeddings=False,
        norm="rms",
        norm_bias=False,
        gated_ffn=True,
        activation="silu",
        feed_forward_dim=96,
        embedding_scale=3.0,
        slope_interpolation=130,
    ),
    "masked-lm": ALiBiConfig(
        **_SMALL,
        num_heads=3,
        causal=False,
        vocab_size=101,
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        type_vocab_size=2,
        gated_ffn=True,
        head="masked_lm",
    ),
    "headless": ALiBiConfig(
        **_SMALL,
        num_heads=3,
        causal=False,
        vocab_size=101,
        head="none",
        qk_norm=True,
        attention_output_norm=True,
        num_kv_heads=1,
        activation="relu",
        type_vocab_size=3,
    ),
    "adaptive": ALiBiConfig(
        **_SMALL, num_heads=3, vocab_size=101, tie_embeddings=False, adaptive_cutoffs=(20, 60)
    ),
    "learned-slopes": ALiBiConfig(
        **_SMALL, num_heads=3, vocab_size=101, slopes="learned", slope_interpolation=130
    ),
    "rounded-bias": ALiBiConfig(**_SMALL, num_heads=3, distance="bfloat16"),
    "jaketae-decoder": ALiBiConfig.jaketae(num_layers=2, d_model=48, num_heads=4),
    "jaketae-encoder": ALiBiConfig.jaketae(num_layers=2, d_model=48, num_heads=3, causal=False),
}

_LEFT, _EMPTY, _RIGHT = (0, slice(0, 100)), (1, slice(0, SEQ)), (2, slice(SEQ - 70, SEQ))
PADDINGS: dict[str, tuple[tuple[int, slice], ...]] = {  # sequence and positions that are padding
    "unpadded": (),
    "left": (_LEFT,),
    "right": (_RIGHT,),
    "both-and-empty": (_LEFT, _EMPTY, _RIGHT),
}

_ROUNDING = ("lm-tied", "odd-heads", "grouped", "gated-rms", "masked-lm", "learned-slopes")
_ROUNDED_GRADIENTS = ("odd-heads", "grouped", "gated-rms")

each_config = pytest.mark.parametrize("config_name", CONFIGS)
# Every kind of padding at once; each kind alone, and none, for two that differ in all else.
each_padded_config = pytest.mark.parametrize(
    ("config_name", "padding"),
    [
        (config_name, padding)
        for config_name in CONFIGS
        for padding in PADDINGS
        if padding == "both-and-empty" or config_name in ("encoder", "lm-tied")
    ],
)


def _each_narrow_config(shown: Collection[str]) -> pytest.MarkDecorator:
    """In narrow dtypes what differs is the rounding: the other cases are in `make test-all`."""
    cases = [
        pytest.param(
            *(config_name, padding, dtype),
            marks=()
            if padding == "both-and-empty" and config_name in shown
            else (pytest.mark.slow,),
        )
        for config_name in CONFIGS
        for padding in PADDINGS
        for dtype in ("float32", "bfloat16")
        if padding == "both-and-empty" or config_name in ("encoder", "lm-tied")
    ]
    return pytest.mark.parametrize(("config_name", "padding", "dtype"), cases)


each_narrow_config = _each_narrow_config(_ROUNDING)
# The forward pass decides the dtypes.
each_narrow_gradient = _each_narrow_config(_ROUNDED_GRADIENTS)


def draw_parameters(config: ALiBiConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """float32 parameters far from their initial values: no zero bias, no unit norm.

    Weights have the scale that keeps activations near one. For "bfloat16" every value is one that
    bfloat16 can hold, so that what a test measures is the computation.
    """
    rng = np.random.default_rng(0)
    parameters = {}
    for row in parameter_table(config):
        if row.init == "slopes":  # one of them rewards far keys, which nothing forbids
            values = np.where(np.arange(row.shape[0]) == 1, -1e-3, rng.uniform(0, 1, row.shape))
        elif row.init == "ones":
            values = 1 + 0.3 * rng.standard_normal(row.shape)
        elif row.init == "zeros":
            values = 0.3 * rng.standard_normal(row.shape)
        else:
            values = rng.standard_normal(row.shape) / np.sqrt(row.shape[-1])
        parameters[row.name] = _representable(values, dtype)
    return parameters


def draw_inputs(
    config: ALiBiConfig, dtype: str = "float32", batch: int = BATCH, seq: int = SEQ
) -> np.ndarray:
    """Tokens, or float32 embeddings with a mean that fast variance formulas stumble over."""
    rng = np.random.default_rng(1)
    if config.vocab_size is None:
        return _representable(3 + rng.standard_normal((batch, seq, config.d_model)), dtype)
    tokens = rng.integers(0, config.vocab_size, (batch, seq))
    tokens.setflags(write=False)
    return tokens


def draw_mask(padding: str) -> np.ndarray | None:
    """An attention mask [BATCH, SEQ] with the named padding."""
    if not PADDINGS[padding]:
        return None
    mask = np.ones((BATCH, SEQ), dtype=np.int64)
    for sequence, positions in PADDINGS[padding]:
        mask[sequence, positions] = 0
    mask.setflags(write=False)
    return mask


def _representable(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32, read-only, rounded to what `dtype` can hold."""
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    array = values.astype(narrow).astype(np.float32)
    array.setflags(write=False)
    return array
