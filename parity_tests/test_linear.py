"""Linear maps of the PyTorch backend are right whichever library computes them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_torch import ALiBiLM, generate
from alibi_torch import linear as module
from alibi_torch.linear import Packed, is_fused, linear, packed_weights
from alibi_torch.model import ACTIVATION_FUNCTIONS, FeedForward, Linear
from parity_tests.compare import assert_within

IN, OUT = 512, 300
LIMIT = BUDGETS["float32", "cpu"].forward


def _drawn(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


X, WEIGHT, BIAS = _drawn(2, 3, IN), _drawn(OUT, IN), _drawn(OUT)
CALLS: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {
    "a step": (_drawn(1, 1, IN), WEIGHT, BIAS),
    "rows": (X, WEIGHT, BIAS),
    "no bias": (X, WEIGHT, None),
    "no rows": (_drawn(0, 3, IN), WEIGHT, BIAS),
    "rows that lie apart": (_drawn(2, 7, IN)[:, ::3], WEIGHT, BIAS),
    "columns that lie apart": (_drawn(3, IN, 2).mT, WEIGHT, BIAS),
    "transposed weight": (X, _drawn(IN, OUT).T, BIAS),
    "a view of a weight": (X, _drawn(2 * OUT, IN)[OUT:], BIAS),
    "wider weight": (X, WEIGHT.double(), BIAS.double()),
    "wider bias": (X, WEIGHT, BIAS.double()),
    "small": (_drawn(4, 8), _drawn(6, 8), _drawn(6)),
}


@pytest.mark.parametrize("case", CALLS)
def test_numbers(case: str) -> None:
    x, weight, bias = CALLS[case]
    exact = x.double().numpy() @ weight.double().numpy().T
    exact = exact + (0 if bias is None else bias.double().numpy())
    dtype = "float64" if "wider" in case else "float32"
    with torch.no_grad():
        found = linear(x, weight, bias)
    assert_within(found.numpy(), exact, LIMIT, case, dtype=dtype)


def test_which_calls_onednn_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those in which nothing but numbers is asked for."""
    monkeypatch.setattr(module, "_is_x86", lambda: True)
    is_for = module._is_for_onednn
    assert not is_for(X, WEIGHT, BIAS), "gradients may be asked for"
    with torch.no_grad():
        assert is_for(X, WEIGHT, BIAS)
        assert is_for(X, torch.nn.Parameter(WEIGHT), None)
        for case in ("no rows", "transposed weight", "wider weight", "wider bias", "small"):
            assert not is_for(*CALLS[case]), case
        assert not is_for(X.bfloat16(), WEIGHT.bfloat16(), None)
        assert not is_for(X.to("meta"), WEIGHT.to("meta"), None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_for(X, WEIGHT, BIAS)
            assert linear(X, WEIGHT, BIAS).dtype == torch.bfloat16
        monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
        assert not is_for(X, WEIGHT, BIAS)


def test_other_machines_have_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_x86", lambda: False)
    with torch.no_grad():
        assert not module._is_for_onednn(X, WEIGHT, BIAS)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own use of it
def test_derivatives_and_transforms() -> None:
    """The operator of oneDNN has none of these, and must not be given them under no_grad."""
    exact = X @ WEIGHT.T + BIAS
    with torch.no_grad():
        mapped = vmap(linear, in_dims=(0, None, None))(X, WEIGHT, BIAS)
        per_weight = vmap(linear, in_dims=(None, 0, None))(X, WEIGHT[None], BIAS)[0]
        per_bias = vmap(linear, in_dims=(None, None, 0))(X, WEIGHT, torch.stack([BIAS, 2 * BIAS]))
        for name, tangents in (("x", (X, 0 * WEIGHT)), ("weight", (0 * X, WEIGHT))):
            results: Any = jvp(lambda x, w: linear(x, w, BIAS), (X, WEIGHT), tangents)
            assert_within(results[1].numpy(), (exact - BIAS).numpy(), LIMIT, f"tangent of {name}")
        with forward_ad.dual_level():
            found = linear(forward_ad.make_dual(X, X), WEIGHT, BIAS)
            tangent: Any = forward_ad.unpack_dual(found).tangent
        assert_within(tangent.numpy(), (exact - BIAS).numpy(), LIMIT, "forward mode")
    assert_within(mapped.numpy(), exact.numpy(), LIMIT, "vmap over rows")
    for row, expected in zip(per_bias, (exact, exact + BIAS), strict=True):
        assert_within(row.numpy(), expected.numpy(), LIMIT, "vmap over biases")
    assert_within(per_weight.numpy(), exact.numpy(), LIMIT, "vmap over weights")
    weight = WEIGHT.clone().requires_grad_()
    linear(X, weight, BIAS).sum().backward()
    gradient = X.sum(dim=(0, 1)).expand(OUT, IN)
    summed: Any = weight.grad
    assert_within(summed.numpy(), gradient.numpy(), LIMIT, "gradient")


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_recorders_see_an_ordinary_linear_map() -> None:
    """Counters of operations, traces and compiled graphs."""
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            linear(X, WEIGHT, BIAS)
        assert counter.get_total_flops() == 2 * 6 * IN * OUT
        graph: Any = torch.export.export(_Map(), (X,)).graph
        assert "mkldnn" not in str(graph)
        traced: Any = torch.jit.trace(_Map(), X, check_trace=False)
        assert "mkldnn" not in str(traced.graph)
        state = {"weight": WEIGHT + 1}
        found = functional_call(_Map(), state, X)
    expected = X @ (WEIGHT + 1).T
    assert_within(found.numpy(), expected.numpy(), LIMIT, "functional_call")


ON_X86 = pytest.mark.skipif(not module._is_x86(), reason="weights are packed on x86 only")


@ON_X86
@pytest.mark.parametrize("case", ["a step", "rows", "rows that lie apart", "a view of a weight"])
def test_packed_numbers(case: str) -> None:
    x, weight, bias = CALLS[case]
    exact = x.double().numpy() @ weight.double().numpy().T + BIAS.double().numpy()
    with torch.no_grad():
        packed = Packed.of(weight)
        assert packed.serves(x, weight) == (case != "a step")
        found = linear(x, weight, bias, packed)
    assert_within(found.numpy(), exact, LIMIT, case, dtype="float32")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: model.token_embedding.weight.mul_(2),
    "loaded": lambda model: model.load_state_dict(
        {k: 2 * v for k, v in model.state_dict().items()}
    ),
    "rounded": lambda model: model.half().float(),
    "another parameter": lambda model: setattr(
        model.token_embedding, "weight", torch.nn.Parameter(2 * model.token_embedding.weight)
    ),
}


def _model() -> ALiBiLM:
    torch.manual_seed(0)
    config = ALiBiConfig(num_layers=1, d_model=512, num_heads=4, vocab_size=300)
    return ALiBiLM(config).eval()


@ON_X86
@torch.no_grad()
def test_packed_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """All large maps of a model are packed, within the block only; copies of it are not."""
    served: list[bool] = []
    serves = Packed.serves
    monkeypatch.setattr(
        *(Packed, "serves"), lambda *call: served.append(serves(*call)) or served[-1]
    )
    model, tokens = _model(), torch.arange(12).reshape(4, 3)
    expected, plain = model(tokens), generate(model, tokens, 5).tokens
    assert served == []
    with packed_weights(model):
        model(tokens)
        assert served == [True] * 7  # four of attention, two of the feed-forward part, the head
        assert_within(model(tokens).numpy(), expected.numpy(), LIMIT, "logits")
        assert torch.equal(generate(model, tokens, 5).tokens, plain)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(getattr(each, "packed", None) is None for each in other.modules())
        with packed_weights(model):
            pass
        assert model.token_embedding.packed is not None
    assert all(getattr(each, "packed", None) is None for each in model.modules())


@ON_X86
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_packed_weights_that_change(change: str) -> None:
    """They are no longer used."""
    tokens, exact = torch.arange(12).reshape(4, 3), _model()
    CHANGES[change](exact)
    model = _model()
    with packed_weights(model):
        CHANGES[change](model)
        assert_within(model(tokens).numpy(), exact(tokens).numpy(), LIMIT, change)


def test_models_that_cannot_be_packed() -> None:
    with torch.inference_mode():
        of_inference = _model()
    for model in (_model().double(), _model().to("meta"), of_inference):
        with (
            pytest.raises(ValueError, match="no weight of this model can be packed: expected"),
            packed_weights(model),
        ):
            pass


def _feed_forward(activation: str) -> FeedForward:
    torch.manual_seed(0)
    sizes: Any = {"num_layers": 1, "d_model": 384, "num_heads": 4, "activation": activation}
    return FeedForward(ALiBiConfig(**sizes)).eval()


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@torch.no_grad()
def test_activations(activation: str) -> None:
    """Computed with the map before them they are the same, of numbers that are not finite too."""
    ffn, x = _feed_forward(activation), 3 * _drawn(2, 5, 384)
    for row, number in enumerate((math.nan, math.inf, -math.inf, 1e38)):
        x[1, row, row] = number
    assert is_fused(x, ffn.fc1.weight, ffn.fc1.bias, ffn.activation) == (
        module._is_x86() and activation.startswith("gelu")
    )
    expected = ffn.activation(F.linear(x.double(), ffn.fc1.weight.double(), ffn.fc1.bias.double()))
    found, ordinary = ffn._activated(x), [*range(5), 9]
    found, expected = found.flatten(0, 1), expected.float().flatten(0, 1)
    assert_within(found[ordinary].numpy(), expected[ordinary].numpy(), LIMIT, activation)
    assert torch.equal(found.isnan(), ffn.activation(ffn.fc1(x)).flatten(0, 1).isnan())


@pytest.mark.parametrize(
    "observer", ["hook", "pre-hook", "hook of all modules", "forward", "class"]
)
@torch.no_grad()
def test_what_observers_see(observer: str) -> None:
    """The results of the map, before the activation."""
    ffn, x, seen = _feed_forward("gelu"), _drawn(2, 5, 384), []
    fc1: Any = ffn.fc1
    mapped, expected = F.linear(x, fc1.weight, fc1.bias), ffn(x)

    def note(_module: object, _inputs: object, result: torch.Tensor) -> None:
        if _module is fc1:
            seen.append(result)

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(fc1).forward(fc1, x))
        return seen[-1]

    hook: Any = None
    if observer == "hook":
        hook = fc1.register_forward_hook(note)
    elif observer == "pre-hook":
        hook = fc1.register_forward_pre_hook(lambda fc1, inputs: note(fc1, None, mapped) or inputs)
    elif observer == "hook of all modules":
        hook = torch.nn.modules.module.register_module_forward_hook(note)
    elif observer == "forward":
        fc1.forward = noted
    else:
        ffn.fc1 = _Noting(fc1, seen)
    try:
        found = ffn(x)
    finally:
        if hook is not None:
            hook.remove()
    assert len(seen) == 1
    assert_within(seen[0].numpy(), mapped.numpy(), LIMIT, "what is seen")
    assert_within(found.numpy(), expected.numpy(), LIMIT, "results")


class _Noting(Linear):
    """A map as another library wraps it."""

    def __init__(self, wrapped: Linear, seen: list[torch.Tensor]) -> None:
        super().__init__(wrapped.in_features, wrapped.out_features)
        self.load_state_dict(wrapped.state_dict())
        self.seen = seen

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen.append(super().forward(input))
        return self.seen[-1]


class _Map(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)
