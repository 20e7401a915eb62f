"""Linear maps of the PyTorch backend are right whichever library computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from alibi_spec.budgets import BUDGETS
from alibi_torch import linear as module
from alibi_torch.linear import linear
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


class _Map(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)
