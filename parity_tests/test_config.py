"""The configuration: defaults, validation, JSON; and the slopes that follow from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import alibi_spec
from alibi_spec import ALiBiConfig
from alibi_spec.biases import interpolation
from parity_tests.cases import CONFIGS, each_config
from parity_tests.compare import assert_bitwise

SEED_FIELDS = {
    "num_layers": 6,
    "d_model": 256,
    "num_heads": 8,
    "max_len": 256,
    "dropout": 0.1,
    "causal": True,
    "expansion_factor": 1,
}


def test_first_fields_are_the_seeds() -> None:
    fields = dataclasses.fields(ALiBiConfig)[: len(SEED_FIELDS)]
    assert {field.name: field.default for field in fields} == SEED_FIELDS
    assert ALiBiConfig(*SEED_FIELDS.values()) == ALiBiConfig()


def test_jaketae_is_the_seed() -> None:
    config = ALiBiConfig.jaketae(d_model=96, num_heads=6)
    assert config.scale == 1 / math.sqrt(96)
    assert (config.slopes, config.distance) == ("geometric", "signed")
    assert (config.output_projection, config.final_norm, config.attention_bias) == (False,) * 3
    assert (config.dropout, config.probability_dropout) == (0.1, 0.0)
    assert ALiBiConfig.jaketae(final_norm=True).final_norm


@pytest.mark.parametrize(
    ("said", "canonical"),
    [
        ({"num_kv_heads": 8}, {}),
        ({"num_kv_heads": 4}, {"num_kv_heads": 4}),
        ({"attention_scale": 1 / math.sqrt(32)}, {}),
        ({"attention_dropout": 0.1}, {}),
        ({"attention_dropout": 0.0}, {"attention_dropout": 0.0}),
        ({"feed_forward_dim": 1024}, {"expansion_factor": 4}),
        ({"feed_forward_dim": 512, "expansion_factor": 3}, {"expansion_factor": 2}),
        ({"feed_forward_dim": 500, "expansion_factor": 3}, {"feed_forward_dim": 500}),
    ],
)
def test_equal_models_compare_equal(said: dict[str, Any], canonical: dict[str, Any]) -> None:
    """Whatever is said that others imply; and what follows an option goes on following it."""
    config, plain = ALiBiConfig(**said), ALiBiConfig(**canonical)
    assert config == plain
    assert hash(config) == hash(plain)
    assert config.to_dict() == plain.to_dict() == ALiBiConfig().to_dict() | canonical
    width = canonical.get("feed_forward_dim", 256 * canonical.get("expansion_factor", 1))
    assert config.ffn_dim == width
    assert dataclasses.replace(config, dropout=0.3).probability_dropout == canonical.get(
        "attention_dropout", 0.3
    )


def test_every_option_is_documented() -> None:
    """In the class's own help, once each."""
    listed = str(ALiBiConfig.__doc__).split("Attributes:")[1]
    for field in dataclasses.fields(ALiBiConfig):
        assert listed.count(f"\n        {field.name}: ") == 1


@each_config
def test_json_round_trip(config_name: str) -> None:
    config = CONFIGS[config_name]
    assert ALiBiConfig.from_json(config.to_json()) == config
    assert hash(ALiBiConfig.from_dict(config.to_dict())) == hash(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 is not valid; expected an integer of at least 1"),
        ({"num_heads": 7}, r"num_heads=7 does not divide d_model=256; .*e\.g\. 8"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_layers": True}, "num_layers=True"),
        ({"d_model": 256.0}, r"d_model=256\.0"),
        ({"dropout": -0.1}, r"dropout=-0\.1 is not valid; expected a number in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"attention_dropout": 2}, "attention_dropout=2"),
        ({"causal": 1}, "causal=1 is not valid; expected True or False"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"slopes": "linear"}, "slopes='linear' is not valid; expected one of"),
        ({"slopes": (0.5,)}, "slopes has 1 values for num_heads=8; pass one slope per head"),
        ({"slopes": (-1.0,) * 8}, "slopes="),
        ({"slopes": ()}, r"slopes=\(\) is not valid"),
        ({"slopes": ((0.5,) * 8,) * 2}, "slopes has 2 tuples for num_layers=6; pass one tuple per"),
        ({"slopes": ((0.5,) * 8,) * 5 + ((0.5,),)}, "slopes has 1 values for num_heads=8"),
        ({"slopes": ((0.5,), 0.5)}, "slopes="),
        ({"slopes": {0.5, 0.25}, "num_heads": 2}, "slopes={.*} is not valid"),  # in which order?
        ({"slopes": np.array(0.5)}, "slopes=0.5 is not valid"),
        ({"slopes": "learned", "distance": "bfloat16"}, "no gradient through the rounding of"),
        ({"bias_max": 0}, "bias_max=0"),
        (
            {"bias_max": 2000, "slopes": "geometric"},
            r"bias_max=2000.* expected a number in \(0, 100\]",
        ),
        ({"bias_max": 10**400}, "bias_max=1000"),
        ({"d_model": 10**12}, "d_model=1000000000000"),
        ({"d_model": 2**31 - 1, "num_heads": 2**30}, "does not divide"),
        ({"slopes": (1e300,) * 8}, "slopes="),
        ({"distance": "squared"}, "distance='squared'"),
        ({"attention_scale": math.inf}, "attention_scale=inf"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"init_std": "small"}, "init_std='small'"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=8"),
        ({"norm": "rms"}, "norm='rms' has no bias; set norm_bias=False"),
        ({"norm": "batch"}, r"norm='batch' is not valid; expected one of \('layer', 'rms'\)"),
        ({"norm_placement": "post", "final_norm": True}, "ends in a norm already; set final_norm"),
        ({"head": "masked_lm", "tie_embeddings": False}, "set tie_embeddings=True"),
        ({"activation": np.array(["gelu", "relu"])}, "activation=array"),
        ({"activation": "tanh"}, "activation='tanh' is not valid; expected one of"),
        ({"qkv_clip": 0}, "qkv_clip=0 is not valid; expected None or a number above 0"),
        ({"adaptive_cutoffs": (), "vocab_size": 9}, r"adaptive_cutoffs=\(\)"),
        ({"adaptive_cutoffs": (3, 3), "vocab_size": 9}, "do not rise from 0 to vocab_size=9"),
        ({"adaptive_cutoffs": (3, 9), "vocab_size": 9}, "do not rise from 0 to vocab_size=9"),
        ({"adaptive_cutoffs": (3,), "vocab_size": 9, "head": "none"}, "need head='linear'"),
        ({"num_head": 4}, "unknown option 'num_head' in the configuration; did you mean num_heads"),
        ({"n_heads": 4}, "unknown option 'n_heads' in the configuration; did you mean num_heads"),
        ({"hidden_size": 4}, "unknown option 'hidden_size' .* did you mean d_model"),
        ({"colour": 4}, "unknown option 'colour' in the configuration; known: num_layers, "),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    for make in (ALiBiConfig.from_dict, lambda values: ALiBiConfig(**values)):
        with pytest.raises(ValueError, match=message):
            make(values)
    with pytest.raises(ValueError, match=message):
        ALiBiConfig.jaketae(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
        ("[" * 99_999, "not valid"),
        ('{"x": 1}', "unknown option"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALiBiConfig.from_json(text)


def test_numpy_numbers_become_plain_ones() -> None:
    """A float64 scale must not widen a float32 model, and JSON must be able to hold it."""
    config = ALiBiConfig(
        num_heads=np.int64(8),
        attention_scale=np.float64(0.25),
        norm_eps=np.float32(0.5),
        slopes=alibi_spec.slopes(8),
    )
    values = config.to_dict()
    assert {type(values[name]) for name in ("attention_scale", "norm_eps")} == {float}
    assert type(config.num_heads) is int
    assert {type(slope) for slope in config.slopes} == {float}
    assert ALiBiConfig.from_json(config.to_json()) == config


def test_slopes_of_the_paper() -> None:
    assert_bitwise(alibi_spec.slopes(8), np.float32(2.0) ** -np.arange(1, 9, dtype=np.float32), "8")
    twelve = [2.0**-k for k in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert_bitwise(alibi_spec.slopes(12), np.array(twelve).astype(np.float32), "12")
    assert_bitwise(alibi_spec.slopes(1), np.array([2.0**-8], dtype=np.float32), "1")


@pytest.mark.parametrize("bias_max", [8.0, 16.0, 5.5])
@pytest.mark.parametrize("num_heads", range(1, 72))
def test_slopes_are_those_of_mpt(num_heads: int, bias_max: float) -> None:
    """MPT's formula, which reaches the paper's list from the next larger power of two."""
    power = 2 ** math.ceil(math.log2(num_heads))
    longer = [2.0 ** -(bias_max * k / power) for k in range(1, power + 1)]
    expected = (longer[1::2] + longer[0::2])[:num_heads] if power != num_heads else longer
    assert_bitwise(
        alibi_spec.slopes(num_heads, bias_max), np.array(expected).astype(np.float32), "slopes"
    )


def test_interpolation_begins_where_training_ended() -> None:
    config = ALiBiConfig(slope_interpolation=512)
    assert [interpolation(config, seq) for seq in (1, 512, 1024, 768)] == [1, 1, 0.5, 2 / 3]
    assert interpolation(ALiBiConfig(), 10**6) == 1


@pytest.mark.parametrize(("num_heads", "bias_max"), [(0, 8.0), (4, 0.0), (4, math.nan)])
def test_bad_slopes(num_heads: int, bias_max: float) -> None:
    with pytest.raises(ValueError, match="is not valid; expected"):
        alibi_spec.slopes(num_heads, bias_max)
