"""`alibi parity` passes what is right, and names what is wrong: layer, tensor, place and cause."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import alibi_flax
import alibi_torch.model
from alibi_cli.main import main
from alibi_cli.rendering import checkpoint_difference_lines, parity_summary_lines, run_lines
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.biases import geometric_slopes, interpolation
from alibi_spec.budgets import BUDGETS, activation_errors
from alibi_spec.reference import Reference
from alibi_torch.kernels import dense
from alibi_torch.kernels.call import Call, Kernel
from alibi_verify import Parity, Run
from alibi_verify.backends import TorchBackend
from alibi_verify.explanations import ADDED_UP, EXPLANATIONS, Explanation, explain
from alibi_verify.inputs import padding_of, random_inputs
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.checkpoints import write
from parity_tests.families import read_config, redraw, write_folder

HEADS, HEAD_DIM, WIDTH, LENGTH = 6, 4, 24, 24
LIMIT = BUDGETS["float32", "cpu"].forward
SHORT = ["--length", str(LENGTH)]
TORCH, FLAX = ["--implementation", "torch-cpu dense"], ["--implementation", "flax-cpu dense"]


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLOOM of two layers, with embeddings so small that the epsilon of their norm matters."""
    config = BloomConfig(vocab_size=61, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
    model: Any = redraw(BloomForCausalLM(config))
    model.transformer.word_embeddings.weight.data *= 0.05
    folder = tmp_path_factory.mktemp("models") / "bloom"
    model.save_pretrained(folder)
    return folder


def test_every_implementation_of_a_right_model(
    bloom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is run, or named with the reason why not; all errors are shown."""
    assert main(["parity", str(bloom), *SHORT]) == 0
    output = capsys.readouterr().out
    assert f"{bloom} reads 3 × 24 random tokens (seed 0)" in output
    named = [f"torch-cpu {name}" for name in alibi_torch.attention_implementations()]
    named += [f"flax-cpu {name}" for name in alibi_flax.attention_implementations()]
    for name in (*named, "transformers' bloom"):
        assert (
            f"ok   {name}, float32: worst " in output or f"not run: {name} in float32 (" in output
        )
    for name in ("torch-cpu dense", "torch-cpu blockwise", "flax-cpu dense", "flax-cpu blockwise"):
        assert f"ok   {name}, float32: worst " in output
    assert "FAIL" not in output
    assert "cause" not in output
    assert output.splitlines()[-1] == "6 of 6 runs within their budgets"


def test_every_dtype(bloom: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And what the JSON and the picture hold."""
    dtypes, picture = ["float32", "bfloat16", "float16", "float64"], tmp_path / "errors.png"
    command = [
        "parity",
        str(bloom),
        *SHORT,
        *TORCH,
        "--json",
        "--gradients",
        "--plot",
        str(picture),
    ]
    assert main([*command, "--dtype", *dtypes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["passed"]
    assert [run["dtype"] for run in found["runs"]] == dtypes
    exact = reference_forward(*_model_and_inputs(bloom))
    shown = [name for name in exact if name.split(".")[-1] not in ("query", "key", "value")]
    shown = [name for name in shown if not name.endswith("probabilities")]
    for run in found["runs"]:
        budget = BUDGETS[run["dtype"], "cpu"]
        assert list(run["errors"]) == list(run["places"]) == shown
        assert 0 < max(run["errors"].values()) <= run["budget"] == budget.forward
        assert len(run["gradients"]) == len(Parity(bloom).ours.tensors)
        assert next(iter(run["gradients"])) == "transformer.final_norm.bias"
        assert max(run["gradients"].values()) <= run["gradient_budget"] == budget.gradient
        assert run["causes"] == []
    assert main([*command, "--dtype", "float32"]) == 2
    assert f"{picture} exists; pass --overwrite" in capsys.readouterr().err


def _model_and_inputs(folder: Path) -> tuple[ALiBiConfig, Tensors, np.ndarray, np.ndarray]:
    checkpoint = Parity(folder).ours
    inputs = random_inputs(checkpoint.config, 3, LENGTH, np.random.default_rng(0))
    return checkpoint.config, checkpoint.tensors, inputs, padding_of(3, LENGTH)


# Eight planted faults: in the code of a backend, or in a second checkpoint.

_attention_inputs = alibi_torch.model.Attention.attention_inputs
_linear = alibi_torch.model.linear


def _torch_attention(name: str, change: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    def changed(self: Any, *arguments: Any) -> dict[str, Any]:
        inputs: Any = _attention_inputs(self, *arguments)
        return inputs | {name: change(inputs[name])}

    return mock.patch("alibi_torch.model.Attention.attention_inputs", changed)


def _flax_slopes() -> AbstractContextManager[Any]:
    wrong = np.stack([geometric_slopes(HEADS)] * 2)
    return mock.patch("alibi_flax.model.model_slopes", return_value=wrong)


def _narrow_products() -> AbstractContextManager[Any]:
    def narrow(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        return _linear(x.bfloat16().float(), weight.bfloat16().float(), bias)

    return mock.patch("alibi_torch.model.linear", narrow)


def _another_gelu() -> AbstractContextManager[Any]:
    wrong = {"gelu_tanh": torch.nn.functional.gelu}
    return mock.patch.dict("alibi_torch.model.ACTIVATION_FUNCTIONS", wrong)


def _grouped(fused: np.ndarray) -> np.ndarray:
    """Interleaved queries, keys and values, one after the other."""
    parts = fused.reshape(HEADS, 3, HEAD_DIM, -1).swapaxes(0, 1)
    return parts.reshape(fused.shape)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and what is to be said of it."""

    first: str
    words: str
    run: list[str]
    plant: Callable[[], AbstractContextManager[Any]] = nullcontext
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def is_of_b(self) -> bool:
        return bool(self.config or self.tensors)


FAULTS = {
    "scale": Fault(
        "layers.0.biased_logits",
        "the attention scale is applied twice",
        TORCH,
        lambda: _torch_attention("scale", lambda scale: scale**2),
    ),
    "slopes": Fault(
        "layers.0.biased_logits",
        "the slopes are one geometric sequence, right only for a power of two of heads",
        FLAX,
        _flax_slopes,
    ),
    "mask": Fault(
        "layers.0.biased_logits",
        "there is no causal mask",
        TORCH,
        lambda: _torch_attention("causal", lambda causal: not causal),
    ),
    "layout": Fault(
        "layers.1.biased_logits",
        "query, key and value follow one another, but are read as interleaved head by head",
        ["--implementation", "reference", *TORCH],
        tensors={
            "transformer.h.1.self_attention.query_key_value.weight": _grouped,
            "transformer.h.1.self_attention.query_key_value.bias": _grouped,
        },
    ),
    "epsilon": Fault(
        "embedding",
        "the epsilon of the norms is 1e-06",
        ["--implementation", "reference", *FLAX],
        config={"layer_norm_epsilon": 1e-6},
    ),
    "gelu": Fault("layers.0.ffn", "the activation is gelu", TORCH, _another_gelu),
    "transposed": Fault(
        "layers.1.attn",
        "the matrix of attn.output is transposed",
        TORCH,
        tensors={"transformer.h.1.self_attention.dense.weight": lambda array: array.T},
    ),
    "products": Fault(
        "layers.0.biased_logits",
        "the factors of linear maps are rounded to bfloat16",
        TORCH,
        _narrow_products,
    ),
}


def _copy(folder: Path, destination: Path, fault: Fault) -> Path:
    arrays = dict(read_tensors(folder, allow_pt=False))
    changed = {name: change(np.array(arrays[name])) for name, change in fault.tensors.items()}
    return write_folder(destination, read_config(folder) | fault.config, arrays | changed)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str, bloom: Path, tmp_path: Path) -> None:
    """In the text and in the JSON of one run."""
    fault = FAULTS[name]
    parity = Parity(bloom, _copy(bloom, tmp_path / "b", fault) if fault.is_of_b else None)
    implementations = fault.run[1::2]
    with fault.plant():
        runs = list(parity.runs(*_model_and_inputs(bloom)[2:], implementations=implementations))
    assert [run.name for run in runs] == implementations
    for run in runs:
        assert isinstance(run, Run)
        lines = "\n".join(run_lines(run))
        assert lines.startswith(f"FAIL {run.name}, float32: worst ")
        assert f"first past its budget: {fault.first}, most at row " in lines
        assert f"  cause: {fault.words} (with this mistake: " in lines
        found = json.loads(json.dumps(run.to_dict(), allow_nan=False))
        assert (found["passed"], found["first"]) == (False, fault.first)
        cause = found["causes"][0]
        assert (cause["words"], cause["reproduces"]) == (fault.words, True)
        assert cause["error"] <= LIMIT
        earlier = list(run.errors)[: list(run.errors).index(fault.first)]
        assert all(run.errors[each] <= run.budget for each in earlier)


def test_command_of_a_fault(
    bloom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; parameters first; the library of each is run, too."""
    other = _copy(bloom, tmp_path / "b", FAULTS["transposed"])
    names = ["--implementation", "transformers'", "--implementation", "reference"]
    command = ["parity", str(bloom), str(other), *SHORT, *names]
    assert main(command) == 1
    output = capsys.readouterr().out
    name = "transformer.layers.1.attn.output.weight"
    assert f"1 of 37 parameters differ from those of A, {bloom}\n    {name}  552 of 576" in output
    assert "ok   transformers' bloom of A, float32: worst " in output
    assert "FAIL transformers' bloom of B, float32: worst " in output
    assert "cause: not sought, where only logits are seen" in output
    assert main([*command[:5], "--implementation=reference", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    assert found["checkpoints"] == [str(bloom), str(other)]
    assert found["parameters"][name]["elements"] == WIDTH * (WIDTH - 1)
    assert main(["parity", str(bloom), str(bloom), *SHORT, *names[2:]]) == 0
    assert "0 of 37 parameters differ" in capsys.readouterr().out


def test_a_cause_of_its_own(bloom: Path, tmp_path: Path) -> None:
    """What no known mistake explains is explained by B's parameters; one element is enough."""

    def moved(array: np.ndarray) -> np.ndarray:
        array[3, 2] += 1
        return array

    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    other = _copy(bloom, tmp_path / "b", Fault("", "", [], tensors={name: moved}))
    parity = Parity(bloom, other)
    (difference,) = parity.parameters.values()
    assert (difference.elements, difference.size) == (1, 4 * WIDTH**2)
    assert round(difference.largest, 5) == 1
    assert "1 of 2,304 elements, by 1.0e+00" in "\n".join(checkpoint_difference_lines(parity))
    (run,) = parity.runs(*_model_and_inputs(bloom)[2:], implementations=["reference"])
    assert isinstance(run, Run)
    assert run.first == "layers.1.ffn"
    assert [cause.words for cause in run.causes] == ["parameters that have other values in B"]


def test_the_place_of_an_unknown_mistake(bloom: Path) -> None:
    """One token of one sequence, and one head of attention, whose cause nobody knows."""
    forward, logits = alibi_torch.model.FeedForward.forward, alibi_torch.model.biased_logits

    def wrong_token(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        y[1, 5, 7] += 3
        return y

    def wrong_head(**inputs: Any) -> torch.Tensor:
        values = logits(**inputs)
        values[2, 4, 9, 8] += 3
        return values

    def found(target: str, wrong: Any) -> Run:
        with mock.patch(f"alibi_torch.model.{target}", wrong):
            inputs = _model_and_inputs(bloom)[2:]
            (run,) = Parity(bloom).runs(*inputs, implementations=TORCH[1:])
        assert isinstance(run, Run)
        assert run.causes == ()
        assert "  cause: no known mistake explains it" in list(run_lines(run))
        return run

    run = found("FeedForward.forward", wrong_token)
    place = run.places["layers.0.ffn"]
    assert (run.first, place.row, place.position, place.head) == ("layers.0.ffn", 1, 5, None)
    run = found("biased_logits", wrong_head)
    assert run.first == "layers.0.biased_logits"
    assert dataclasses.astuple(run.places[run.first]) == (2, 9, 4, 8)
    assert "most at row 2, position 9, key 8, head 4" in "\n".join(run_lines(run))
    assert [stage for stage, error in run.by_stage.items() if error > LIMIT] == ["0", "1"]


def test_a_kernel_with_a_mistake(bloom: Path) -> None:
    """Its logits are not seen, but its attention is; other kernels are right."""

    def reversed_slopes(call: Call) -> torch.Tensor:
        return dense.attention(dataclasses.replace(call, slopes=call.slopes.flip(0)))

    wrong = {"blockwise": Kernel(reversed_slopes, dense.refuses)}
    with mock.patch.dict("alibi_torch.dispatch.KERNELS", wrong):
        names = ["torch-cpu blockwise", *TORCH[1:]]
        runs = list(Parity(bloom).runs(*_model_and_inputs(bloom)[2:], implementations=names))
    found = {run.name: run for run in runs if isinstance(run, Run)}
    assert [run.passed for run in found.values()] == [False, True]
    run = found["torch-cpu blockwise"]
    assert run.first == "layers.0.attn"
    assert run.causes[0].words == "the slopes of the heads are reversed"


def test_a_wrong_gradient(bloom: Path) -> None:
    """The first of the backward pass is named; activations are right."""
    gradients = TorchBackend.gradients

    def wrong(self: Any, *arguments: Any) -> dict[str, np.ndarray]:
        found = gradients(self, *arguments)
        if arguments[5] == "float32":
            for index in (0, 1):
                found[f"transformer.layers.{index}.ffn.fc2.weight"] *= 1.01
        return found

    with mock.patch.object(TorchBackend, "gradients", wrong):
        inputs = _model_and_inputs(bloom)[2:]
        (run,) = Parity(bloom).runs(*inputs, implementations=TORCH[1:], gradients=True)
    assert isinstance(run, Run)
    assert (run.passed, run.first) == (False, None)
    assert run.first_gradient == "transformer.layers.1.ffn.fc2.weight"
    lines = "\n".join(run_lines(run))
    assert f"first gradient past its budget, from the end: {run.first_gradient}" in lines
    assert list(parity_summary_lines([run], [])) == ["0 of 1 runs within their budgets"]


# The table of explanations

_GATED = dataclasses.replace(
    CONFIGS["gated-rms"],
    d_model=WIDTH,
    num_heads=3,
    feed_forward_dim=WIDTH,
    slope_interpolation=7,
    activation="gelu",
    vocab_size=WIDTH,
    qkv_clip=0.5,
    qk_norm=True,
    logit_scale=0.3,
    norm_eps=1e-4,
    distance="bfloat16",
)
_LAYER = ALiBiConfig(
    num_layers=1,
    d_model=WIDTH,
    num_heads=6,
    vocab_size=61,
    embedding_norm=True,
    attention_scale=0.2,
    activation="silu",
    bias_max=5.0,
    norm_eps=1e-4,
)
TABLE_CONFIGS = (
    _LAYER,
    _GATED,
    dataclasses.replace(_LAYER, causal=False, norm_placement="pre_residual"),
)


@cache
def _setting(number: int) -> tuple[Reference, np.ndarray, dict[str, np.ndarray]]:
    """A model, inputs and the exact trace."""
    config = TABLE_CONFIGS[number]
    parameters = draw_parameters(config)
    parameters["token_embedding.weight"] = parameters["token_embedding.weight"] * 0.1
    inputs, mask = random_inputs(config, 2, 12, np.random.default_rng(3)), padding_of(2, 12)
    trace = reference_forward(config, parameters, inputs, mask)
    model = Reference(config, Tensors.of(parameters), interpolation(config, 12), mask)
    return model, inputs, trace


def _mistaken(
    explanation: Explanation, model: Reference, inputs: np.ndarray, exact: dict[str, np.ndarray]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The tensors that a mistake moves past the budget, with the trace of who makes it."""
    for kind in explanation.kinds:
        is_of_layer = kind not in ("embedding", "output", "logits")
        altered = explanation.alter(model, "transformer.layers.0." if is_of_layer else "")
        if altered is None:
            continue
        altered = dataclasses.replace(altered)
        if kind == "embedding":
            altered.embedding(inputs)
        elif is_of_layer:
            altered.block(exact["embedding"], 0)
        else:
            last = exact[f"layers.{model.config.num_layers - 1}"]
            altered.logits(altered.output(last) if kind == "output" else exact["output"])
        name = {"hidden": "layers.0"}.get(kind, f"layers.0.{kind}" if is_of_layer else kind)
        found = {**exact, **altered.trace}
        if activation_errors(model.config, {name: found[name]}, exact)[name] > LIMIT:
            yield name, found


@pytest.mark.parametrize("explanation", EXPLANATIONS, ids=lambda each: each.words)
def test_every_explanation_is_found(explanation: Explanation) -> None:
    """By who makes this very mistake, in some model; no other mistake is taken for it."""
    shown = (
        (model, inputs, *each)
        for model, inputs, exact in map(_setting, range(len(TABLE_CONFIGS)))
        for each in _mistaken(explanation, model, inputs, exact)
    )
    model, inputs, name, found = next(shown)
    causes = explain(model, inputs, name, found, LIMIT, EXPLANATIONS)
    assert explanation.words in [cause.words for cause in causes]


def test_errors_that_add_up() -> None:
    """A tensor that is right for what came before it is not called wrong."""
    model, inputs, exact = _setting(1)
    moved = dataclasses.replace(model)
    moved.block(exact["layers.0"] * 1.001, 1)
    found = {**exact, **moved.trace, "layers.0": exact["layers.0"] * 1.001}
    (cause,) = explain(model, inputs, "layers.1.attn", found, LIMIT, EXPLANATIONS)
    assert (cause.words, cause.reproduces) == (ADDED_UP, True)


def test_a_cause_that_is_only_like_it() -> None:
    """Reported with how much it explains; what explains less is not reported."""
    model, inputs, exact = _setting(0)
    twice = dataclasses.replace(
        model, config=dataclasses.replace(model.config, attention_scale=0.04)
    )
    twice.block(exact["embedding"], 0)
    name, rng = "layers.0.biased_logits", np.random.default_rng(0)
    for noise, expected in ((1e-4, ["the attention scale is applied twice"]), (1.0, [])):
        moved = twice.trace[name] + noise * rng.standard_normal(twice.trace[name].shape)
        causes = explain(model, inputs, name, {**exact, name: moved}, LIMIT, EXPLANATIONS)
        assert [cause.words for cause in causes] == expected
        assert not any(cause.reproduces or cause.reduction < 10 for cause in causes)


# What is read


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes in rows, the last padded; and texts that cannot be read."""
    config = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1, vocab_size=256)
    folder, text = write(tmp_path / "model", config=config), tmp_path / "a.txt"
    text.write_bytes(b"not quite enough for two rows")
    command = ["parity", str(folder), "--text", str(text), *TORCH]
    assert main([*command, "--length=20"]) == 0
    assert "reads 29 tokens of a.txt, 2 × 20" in capsys.readouterr().out
    assert main([*command, "--batch=1", "--length=10"]) == 0
    assert "reads 10 tokens of a.txt, 1 × 10" in capsys.readouterr().out
    with mock.patch.object(Parity, "runs", return_value=iter(())) as runs:
        assert main([*command, "--length=20"]) == 2  # nothing was run
    tokens, visible = runs.call_args.args
    assert bytes(tokens[visible == 1].tolist()) == text.read_bytes()
    assert visible.sum(axis=1).tolist() == [20, 9]
    text.write_bytes(b"")
    assert main(command) == 2
    assert f"{text} holds no tokens; expected a text" in capsys.readouterr().err
    text.write_text("one two")
    vocabulary = {"one": 0, "two": 300}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "one"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(command) == 2
    assert "has token 300, beyond the vocabulary of 256; the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(("config_name", "last"), [("headless", "output"), ("decoder", "output")])
def test_models_without_logits(
    config_name: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoder without a head, and a bare model that reads embeddings: hidden states."""
    folder = write(tmp_path / "model", config=CONFIGS[config_name])
    assert main(["parity", str(folder), *SHORT, *TORCH, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kind = "embeddings" if config_name == "decoder" else "tokens"
    assert found["inputs"] == f"3 × 24 random {kind} (seed 0)"
    assert list(found["runs"][0]["errors"])[-1] == last
    (text := tmp_path / "text").write_text("any")
    assert main(["parity", str(folder), "--text", str(text), *TORCH]) == 2


def test_what_cannot_be_compared(
    bloom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", config=CONFIGS["lm-tied"])
    assert main(["parity", str(bloom), str(other)]) == 2
    error = capsys.readouterr().err
    assert "is of another architecture than" in error
    assert "num_heads is 3, expected 6; compare each with itself" in error
    heads = _copy(bloom, tmp_path / "heads", Fault("", "", [], config={"n_head": 8}))
    assert main(["parity", str(bloom), str(heads)]) == 2
    assert "num_heads is 8, expected 6; compare each with itself" in capsys.readouterr().err
    assert main(["parity", str(bloom), "--implementation", "torch-cpu flesh"]) == 2
    assert "'torch-cpu flesh' is no implementation here; expected" in capsys.readouterr().err
    assert main(["parity", str(bloom), "--implementation", "torch-cpu flash_attn"]) == 2
    assert "nothing could be run: torch-cpu flash_attn: it runs on CUDA" in capsys.readouterr().err
    assert main(["parity", str(tmp_path / "nothing")]) == 3


def test_narrow_copies(bloom: Path, tmp_path: Path) -> None:
    """A checkpoint that was cast to bfloat16: its parameters are found to be rounded."""
    names = list(read_tensors(bloom, allow_pt=False))
    cast = {name: lambda array: array.astype(ml_dtypes.bfloat16) for name in names}
    other = _copy(bloom, tmp_path / "b", Fault("", "", [], tensors=cast))
    inputs = _model_and_inputs(bloom)[2:]
    (run,) = Parity(bloom, other).runs(*inputs, implementations=["reference"])
    assert isinstance(run, Run)
    assert run.first == "embedding"
    assert run.causes[0].words == "the parameters are rounded to bfloat16"
    (same,) = Parity(bloom, other).runs(*inputs, implementations=["reference"], dtypes=["bfloat16"])
    assert isinstance(same, Run)
    assert same.passed
