"""Our models as state dicts of jaketae/alibi; what is read of them stands in test_seed.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.families import export_tensors
from alibi_convert.families.jaketae import FAMILY
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.test_seed import seed_state


@pytest.mark.parametrize(("num_heads", "causal"), [(4, True), (6, True), (3, False)])
def test_round_trip(tmp_path: Path, num_heads: int, causal: bool) -> None:
    """Every tensor and buffer bitwise, and nothing else."""
    save_file(seed_state(num_heads, causal), tmp_path / "seed.safetensors")
    before = load_file(tmp_path / "seed.safetensors")
    checkpoint = open_checkpoint(tmp_path / "seed.safetensors")
    assert FAMILY.write_config(checkpoint.config) == {}
    exported = export_tensors(FAMILY, checkpoint.config, checkpoint.tensors)
    assert set(exported) == set(before)
    for name, array in before.items():
        assert_bitwise(exported[name], array, name)
    contiguous = {name: np.ascontiguousarray(array) for name, array in exported.items()}
    save_file(contiguous, tmp_path / "again.safetensors")
    assert open_checkpoint(tmp_path / "again.safetensors").config == checkpoint.config


JAKETAE = ALiBiConfig.jaketae(num_layers=2, d_model=36, num_heads=6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_scale": None}, "attention_scale=None; this model would need 0.16"),
        ({"distance": "absolute"}, "distance='absolute'; this model would need 'signed'"),
        ({"slopes": "paper"}, "slopes='paper'"),
        ({"final_norm": True}, "final_norm=True"),
        ({"output_projection": True}, "output_projection=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.2}, "attention_dropout=0.2"),
        ({"vocab_size": 50}, "vocab_size=50"),
        ({"feed_forward_dim": 50}, "feed_forward_dim=50"),
        ({"activation": "relu"}, "activation='relu'"),
    ],
)
def test_what_it_cannot_express(fields: dict[str, Any], message: str) -> None:
    assert FAMILY.write_config(JAKETAE) == {}
    with pytest.raises(CheckpointError, match=f"jaketae cannot express {message}"):
        FAMILY.write_config(dataclasses.replace(JAKETAE, **fields))


def test_what_training_alone_needs_is_left_out() -> None:
    assert FAMILY.write_config(dataclasses.replace(JAKETAE, dropout=0.3, init_std=0.1)) == {}
