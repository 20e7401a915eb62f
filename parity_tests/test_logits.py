"""Biased logits: bit for bit the specification's, wherever float32 arithmetic is exact."""

from __future__ import annotations

import numpy as np
import pytest

import alibi_spec
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig
from alibi_spec.exact import exact_attention
from parity_tests.cases import CONFIGS, each_config
from parity_tests.compare import assert_bitwise
from parity_tests.implementations import Implementation, each_implementation

HEAD_COUNTS = (1, 2, 3, 5, 7, 8, 12, 16, 71)


@each_implementation()
@each_config
def test_exact_logits(implementation: Implementation, config_name: str) -> None:
    """Projections, scale, bias and masks of a whole attention layer, in one comparison of bits."""
    case = exact_attention(CONFIGS[config_name], batch=3, seq=300)
    found = implementation.create().exact_logits(case)
    assert_bitwise(found, case.biased_logits, implementation.name)


@each_implementation()
def test_exact_logits_of_a_long_sequence(implementation: Implementation) -> None:
    case = exact_attention(ALiBiConfig(d_model=64, num_heads=2), batch=1, seq=3000)
    found = implementation.create().exact_logits(case)
    assert_bitwise(found, case.biased_logits, implementation.name)


def test_exact_cases_are_not_trivial() -> None:
    """Heads differ, the mask hides keys on both sides, and the bias reaches every distance."""
    case = exact_attention(CONFIGS["encoder"], batch=3, seq=300)
    logits = case.biased_logits
    assert np.isneginf(logits[0, :, :, :100]).all()
    assert np.isneginf(logits[-1, :, :, -75:]).all()
    assert np.isfinite(logits[1]).all()
    assert len(np.unique(logits[1])) > 1000
    assert (logits[1, 0] != logits[1, 1]).mean() > 0.9


def test_exact_cases_refuse_what_would_round() -> None:
    with pytest.raises(ValueError, match="bits, float32 has 24"):
        exact_attention(ALiBiConfig(d_model=32, num_heads=8), batch=1, seq=140_000)


@pytest.mark.parametrize("distance", ["absolute", "signed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads", HEAD_COUNTS)
def test_bias_is_bitwise_for_every_head_count(num_heads: int, causal: bool, distance: str) -> None:
    """With zero queries nothing but the bias is left: one product, rounded once, everywhere."""
    slopes = alibi_spec.slopes(num_heads)
    query_len, key_len = 40, 301
    expected = np.broadcast_to(
        alibi_spec.bias(slopes, query_len, key_len, distance), (1, num_heads, query_len, key_len)
    )
    visible = alibi_spec.visible_keys(query_len, key_len, causal)
    expected = np.where(visible, expected, np.float32(-np.inf))
    options = {"causal": causal, "distance": distance}
    for name, logits in _zero_query_logits(slopes, query_len, key_len, options).items():
        assert_bitwise(logits, expected, name)


def _zero_query_logits(
    slopes: np.ndarray, query_len: int, key_len: int, options: dict
) -> dict[str, np.ndarray]:
    import jax.numpy as jnp
    import torch

    import alibi_flax
    import alibi_torch

    heads = len(slopes)
    torch_logits = alibi_torch.biased_logits(
        torch.zeros(1, heads, query_len, 4),
        torch.ones(1, heads, key_len, 4),
        torch.from_numpy(slopes),
        **options,
    )
    flax_logits = alibi_flax.biased_logits(
        jnp.zeros((1, query_len, heads, 4), jnp.float32),
        jnp.ones((1, key_len, heads, 4), jnp.float32),
        jnp.asarray(slopes),
        **options,
    )
    return {"torch": as_numpy(torch_logits), "flax": np.asarray(flax_logits)}
