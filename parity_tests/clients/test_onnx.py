"""Models exported to ONNX run in onnxruntime, for batches and lengths that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from alibi_spec.budgets import BUDGETS
from alibi_torch import ALiBiLM
from parity_tests.compare import assert_within
from parity_tests.families import redraw
from parity_tests.test_transformers import CONFIGS, OTHERS

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter, about itself
LIMIT = BUDGETS["float32", "cpu"].forward
EVERY = CONFIGS | OTHERS
NAMES = ["lm-tied", "bloom-like", "grouped", "gated-rms", "masked-lm", "falcon", "learned"]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, tmp_path: Path) -> None:
    model = ALiBiLM(EVERY[name], implementation="dense")
    redraw(model)
    rng = np.random.default_rng(0)

    def inputs(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = np.ones((batch, seq), np.int64)
        mask[0, : seq // 4] = 0
        tokens = rng.integers(0, EVERY[name].vocab_size or 0, (batch, seq))
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    axes = {0: Dim("batch"), 1: Dim("seq")}
    program: Any = torch.onnx.export(
        model,
        inputs(2, 20),
        dynamo=True,
        dynamic_shapes=(axes, axes),
        input_names=["tokens", "attention_mask"],
        output_names=["logits"],
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch, seq in ((2, 20), (3, 300), (1, 7)):
        tokens, mask = inputs(batch, seq)
        given = {"tokens": tokens.numpy(), "attention_mask": mask.numpy()}
        (found,) = session.run(None, given)
        with torch.no_grad():
            exact = model(tokens, mask).numpy()
        real = mask.numpy() == 1
        assert_within(np.asarray(found)[real], exact[real], LIMIT, f"{batch} x {seq}")
