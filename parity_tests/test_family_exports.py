"""Any configuration is written to a family and read back the same, or a field of it is named."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from alibi_convert import CheckpointError
from alibi_convert.families import FAMILIES, Family, Source, export_tensors, import_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, model_slopes
from parity_tests.compare import assert_bitwise
from parity_tests.exports import draw
from parity_tests.random_configurations import options

GATED = {"gated_ffn": True, "activation": "silu"}
BERT = {
    "causal": False,
    "norm_placement": "post",
    "final_norm": False,
    "embedding_norm": True,
    "embedding_dropout": 0.1,
    "type_vocab_size": 3,
    "norm_eps": 1e-12,
    "head": "masked_lm",
    "gated_ffn": True,
}
# What makes a model one of the family's; everything else is at our defaults.
OWN: dict[str, dict[str, Any]] = {
    "bloom": {"expansion_factor": 4, "activation": "gelu_tanh", "embedding_norm": True},
    "mpt": {},
    "falcon": {"distance": "bfloat16"},
    "btlm": GATED,
    "jais": GATED,
    "baichuan": {
        **GATED,
        **{"tie_embeddings": False, "attention_bias": False, "ffn_bias": False},
        **{"norm": "rms", "norm_bias": False},
    },
    "mosaicbert": BERT,
    "jina": BERT,
    "jina-original": {**BERT, "gated_ffn": False, "activation": "relu"},
    "jina-qk-norm": {**BERT, "qk_norm": True, "attention_output_norm": True},
}
FOLDERS = {family.name: family for family in FAMILIES if family.write_config and not family.suffix}
SIZES = ("num_layers", "num_heads", "d_model", "num_kv_heads", "slopes")  # only together
DROPOUTS = ("dropout", "attention_dropout", "embedding_dropout")  # Baichuan has no place for them


def of_family(name: str, **fields: Any) -> ALiBiConfig:
    sizes = {"num_layers": 2, "d_model": 6, "num_heads": 3, "vocab_size": 11}
    return ALiBiConfig(**sizes | OWN[name] | fields)


@st.composite
def relatives(draw: st.DrawFn) -> tuple[Family, ALiBiConfig]:
    """A family, and a model that differs from its own in a few options."""
    name, other = draw(st.sampled_from(sorted(OWN))), draw(options())
    free = [each for each in other if each not in SIZES]
    changed = draw(st.lists(st.sampled_from([*free, "sizes"]), max_size=2, unique=True))
    names = [*changed, *(SIZES if "sizes" in changed else ())]
    try:
        config = of_family(name, **{each: other[each] for each in names if each != "sizes"})
    except ValueError:  # two options that contradict one another
        hypothesis.reject()
    return FOLDERS[name], config


def test_every_family_takes_part() -> None:
    assert set(OWN) == set(FOLDERS)


@pytest.mark.parametrize("name", OWN)
def test_its_own_models(name: str) -> None:
    assert_read_back(FOLDERS[name], of_family(name))


@hypothesis.settings(deadline=None, max_examples=80, derandomize=True)
@hypothesis.given(relatives())
def test_any_model(case: tuple[Family, ALiBiConfig]) -> None:
    family, config = case
    refusal = why_not(family, config)
    if refusal is None:
        assert_read_back(family, config)
        return
    named = re.match(rf"{family.name} cannot express (\w+)=", refusal)
    assert named, refusal
    assert named[1] in ALiBiConfig.__dataclass_fields__


def why_not(family: Family, config: ALiBiConfig) -> str | None:
    assert family.write_config is not None
    try:
        family.write_config(config)
    except CheckpointError as error:
        return str(error)
    return None


def assert_read_back(family: Family, config: ALiBiConfig) -> None:
    """The same configuration and the same bits."""
    assert family.write_config is not None
    foreign = json.loads(json.dumps(family.write_config(config)))
    arrays = draw(config)
    exported = export_tensors(family, config, Tensors.of(arrays))
    source = Source(foreign, Tensors.of(dict(exported)))
    assert next(each for each in FAMILIES if each.recognises(source)) is family
    found = family.read_config(source)
    assert np.array_equal(model_slopes(found), model_slopes(config))
    unsaid = {"slopes": "paper", "bias_max": 8.0} if family.name in ("btlm", "jais") else {}
    unsaid |= dict.fromkeys(DROPOUTS, 0.0) if family.name == "baichuan" else {}
    assert dataclasses.replace(found, **unsaid) == dataclasses.replace(config, **unsaid)
    imported = import_tensors(family, found, source)
    assert set(imported.tensors) == set(arrays)
    for name, array in arrays.items():
        assert_bitwise(imported.tensors[name], array, name)
