"""Checkpoints on disk for the tests: written, damaged and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from alibi_convert import open_checkpoint
from alibi_convert.formats import FORMATS
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, parameter_table
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_bitwise

CONFIG = CONFIGS["lm-untied"]
OURS = ("alibi", "safetensors", "pt", "msgpack", "orbax")  # formats that hold any model


def write(path: Path, kind: str = "alibi", config: ALiBiConfig = CONFIG, dtype: Any = None) -> Path:
    parameters = draw_parameters(config)
    arrays = {name: array.astype(dtype or array.dtype) for name, array in parameters.items()}
    path = path.with_suffix(FORMATS[kind].suffix)
    FORMATS[kind].write(path, config, Tensors.of(arrays))
    return path


def assert_holds(path: Path, config: ALiBiConfig, dtype: Any = np.float32) -> None:
    checkpoint = open_checkpoint(path, allow_pt=True)
    assert checkpoint.config == config
    assert list(checkpoint.tensors) == [row.name for row in parameter_table(config)]
    for name, array in draw_parameters(config).items():
        assert_bitwise(checkpoint.tensors[name], array.astype(dtype), name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path
