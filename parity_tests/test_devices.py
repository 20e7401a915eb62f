"""What each device must show, in both backends: every level of the conformance kit, and generation.

`make test-gpu` and `make test-tpu` run it where such a device is. On the CPU `make test` runs the
kit in test_conformance.py, and this is for the record (`make test-cpu`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import alibi_flax
import alibi_torch
from alibi_convert import torch_to_flax
from alibi_spec import ALiBiConfig
from alibi_spec.conformance import LEVELS
from alibi_spec.parameters import initial_parameters
from alibi_verify.conformance import conformance
from alibi_verify.conforming import Flax, Torch
from parity_tests.compare import assert_bitwise
from parity_tests.device_report import DeviceReport
from parity_tests.implementations import IMPLEMENTATIONS, Implementation, absences

each_device = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.slow if each.platform == "cpu" else ())
        for each in IMPLEMENTATIONS
    ],
)


def device_of(implementation: Implementation) -> str:
    """What the backend calls the device; the test is skipped where it is absent."""
    if implementation.name in absences():
        pytest.skip(absences()[implementation.name])
    return implementation.name.partition("-")[2]


@each_device
@pytest.mark.parametrize("level", LEVELS)
def test_the_kit(implementation: Implementation, level: str, record_property: Any) -> None:
    device = device_of(implementation)
    make = Torch if implementation.name.startswith("torch") else Flax
    result = conformance(make("float32", device), [level])
    errors = [each.error for each in result.outcomes if each.error is not None]
    record_property("error", max(errors, default=None))
    record_property("limit", max((each.limit or 0.0 for each in result.outcomes), default=None))
    assert [outcome for outcome in result.outcomes if outcome.status != "ok"] == []
    assert result.levels == {level: "conforms"}


CONFIG = ALiBiConfig(
    **{"num_layers": 2, "d_model": 24, "num_heads": 3, "num_kv_heads": 1, "vocab_size": 31},
    **{"max_len": 16, "init_std": 0.3},
)


@each_device
@pytest.mark.parametrize("do_sample", [False, True])
def test_generation(implementation: Implementation, do_sample: bool) -> None:
    """The tokens of torch on the CPU, from unequal prompts, past the length of the model."""
    device = device_of(implementation)
    arrays = initial_parameters(CONFIG, 0)
    tokens = np.random.default_rng(0).integers(0, 31, (3, 9))
    mask = (np.arange(9) >= np.array([[0], [4], [7]])).astype(np.int64)
    options: dict[str, Any] = {"do_sample": do_sample, "top_p": 0.9 if do_sample else None}
    exact = of_torch(arrays, tokens, mask, "cpu", options)
    if implementation.name.startswith("torch"):
        found = of_torch(arrays, tokens, mask, device, options)
    else:
        model = alibi_flax.ALiBiLM(CONFIG)
        with jax.default_device(jax.devices(device)[0]), alibi_flax.full_precision():
            params = jax.tree.map(jax.numpy.asarray, torch_to_flax(arrays, CONFIG))
            prompt, visible = (jax.numpy.asarray(each) for each in (tokens, mask))
            generated = alibi_flax.generate(
                model, params, prompt, 20, attention_mask=visible, seed=5, **options
            )
            found = np.asarray(generated.tokens)
    assert_bitwise(found.astype(np.int64), exact, "tokens")


def of_torch(
    arrays: Any, tokens: np.ndarray, mask: np.ndarray, device: str, options: dict[str, Any]
) -> np.ndarray:
    model = alibi_torch.ALiBiLM(CONFIG)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    prompt, visible = (torch.from_numpy(each).to(device) for each in (tokens, mask))
    with alibi_torch.full_precision():
        generated = alibi_torch.generate(
            model.eval().to(device), prompt, 20, attention_mask=visible, seed=5, **options
        )
    return generated.tokens.numpy(force=True)


def test_the_report_says_what_became_of_each_test(tmp_path: Path) -> None:
    """One row for each test, also for one that was skipped before it was called."""
    report = DeviceReport(tmp_path / "folder" / "report.json")
    for name, when, outcome in (
        ("good", "setup", "passed"),
        ("good", "call", "passed"),
        ("good", "teardown", "passed"),
        ("bad", "setup", "passed"),
        ("bad", "call", "failed"),
        ("absent", "setup", "skipped"),
    ):
        phase: Any = pytest.TestReport(
            *(f"parity_tests/file.py::{name}", ("", 0, ""), {}, outcome, None, when),
            user_properties=[("error", 0.5)],
            duration=2.0,
        )
        report.pytest_runtest_logreport(phase)
    report.pytest_sessionfinish()
    written = json.loads(report.file.read_text(encoding="utf-8"))
    outcomes = {"good": "passed", "bad": "failed", "absent": "skipped"}
    assert written["tests"] == [
        {"test": f"file.py::{name}", "outcome": outcome, "seconds": 2.0, "error": 0.5}
        for name, outcome in outcomes.items()
    ]
    assert written["absent"] == absences()
    assert written["devices"]["jax"]
