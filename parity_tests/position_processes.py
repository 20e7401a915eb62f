"""What processes compute that share the positions of sequences, for `test_torch_mesh`.

Each compares what it has with what it computes alone, and raises AssertionError where they differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig, Recipe, slopes
from alibi_spec.bounds import model_windows
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from alibi_spec.parameters import initial_parameters
from alibi_torch import ALiBiLM, ALiBiTransformer, Trainer
from alibi_torch.dispatch import attention_within
from alibi_torch.divided import whole
from alibi_torch.kernels import neighbours
from alibi_torch.positions import Positions
from alibi_torch.sharding import device_mesh, parallelize
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.mesh_processes import on_a_mesh

BUDGET = BUDGETS["float64", "cpu"]
OWN, BATCH, WIDTH = 48, 2, 8
# Of four heads of keys: queries that need no neighbour, one, two or three of them, and all.
STEEPNESS = (80.0, 90.0, 4.0, 3.0, 0.9, 0.8, 0.01, 1.0)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"causal": False, "distance": "signed"},
    {"distance": "bfloat16"},
    {"dropout": 0.2},
    {"causal": False, "dropout": 0.2, "implementation": "blockwise"},
    {"implementation": "blockwise", "scale": 0.1},
    {"implementation": "aten_flash"},
)


def on_meshes(sizes: Mapping[Path, Mapping[str, int]], names: tuple[str, ...]) -> None:
    """One after the other, to start processes once: `on_a_mesh` in each folder, and all below."""
    for folder, each in sizes.items():
        on_a_mesh(each, folder, names, trains=False)
    check_positions()


def check_positions() -> None:
    """All of it, by the processes of a group."""
    mesh = device_mesh({"sequence": dist.get_world_size()})
    positions = Positions.of(mesh)
    assert positions is not None
    for options, has_masks in itertools.product(OPTIONS, (False, True)):
        _check_attention(positions, options, has_masks)
    padding = torch.arange(OWN * positions.count).expand(BATCH, -1) < 5
    for options in (
        {},
        {"implementation": "blockwise"},
        {"dropout": 0.2},
        {"attention_mask": ~padding},
    ):
        _check_windows(positions, options)
    _check_a_far_key(positions)
    _check_calls_of_models(mesh)
    _check_gradients_of_whole_logits(mesh)
    _check_dropout(mesh)
    _check_windows_of_models(mesh)
    if dist.get_world_size() == 4:
        _check_windows_of_models(device_mesh({"sequence": 2, "tensor": 2}))


def _arrays(positions: Positions) -> tuple[Any, dict[str, Any]]:
    """Whole queries, keys, values and slopes, and masks."""
    rng, seq = np.random.default_rng(0), OWN * positions.count
    arrays = [rng.standard_normal((BATCH, heads, seq, WIDTH)) for heads in (8, 4, 4)]
    tensors = [*map(torch.from_numpy, arrays), torch.tensor(STEEPNESS, dtype=torch.float64)]
    masks = {
        "attention_mask": torch.from_numpy(rng.random((BATCH, seq)) < 0.8),
        "segment_ids": torch.from_numpy(np.sort(rng.integers(0, 3, (BATCH, seq)), axis=1)),
    }
    return tensors, masks


def _attended(positions: Positions | None, windows: Any, arrays: Any, options: Any) -> list[Any]:
    """Values, and gradients of the sum of their squares; of this process's part."""
    order = [x.requires_grad_() for x in arrays]
    given: Any = {"causal": True, "implementation": "auto", "distance": "absolute", "dropout": 0.0}
    given |= dict.fromkeys(("scale", "attention_mask", "segment_ids")) | options
    # The one has no gradient of the slopes, the other rounds it.
    if given["implementation"] == "aten_flash" or given["distance"] == "bfloat16":
        order[3] = order[3].detach()
    generator = torch.Generator().manual_seed(5)
    attended = attention_within(windows, positions, *order, **given, dropout_rng=generator)
    attended.square().sum().backward()
    return [attended.detach(), *(x.grad for x in order if x.requires_grad)]


def _part(x: torch.Tensor, positions: Positions) -> torch.Tensor:
    """This process's of [batch, heads, seq, …] or [batch, seq]; all of slopes."""
    if x.ndim == 1:
        return x.clone()
    x = x.transpose(1, 2) if x.ndim == 4 else x
    x = positions.own(x)
    return (x.transpose(1, 2) if x.ndim == 4 else x).clone()


def _compare(positions: Positions, windows: Any, arrays: Any, options: Any, what: str) -> None:
    own = [_part(x, positions) for x in arrays]
    some = {
        name: _part(x, positions) if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    found = _attended(positions, windows, own, some)
    exact = _attended(None, None, [x.clone() for x in arrays], options)
    if len(found) == 5:
        dist.all_reduce(found[4])
    for number, (actual, expected) in enumerate(zip(found, exact, strict=True)):
        limit = BUDGET.gradient if number else BUDGET.forward
        part = _part(expected, positions).numpy()
        name = f"{what}: {f'gradient {number}' if number else 'values'}"
        assert_within(actual.numpy(), part, limit, name, floor=float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def _check_attention(positions: Positions, options: Any, has_masks: bool) -> None:
    arrays, masks = _arrays(positions)
    given = options | (masks if has_masks else {})
    _compare(positions, None, arrays, given, f"{options} {has_masks=}")


def _check_windows(positions: Positions, options: Any) -> None:
    """Nothing is sent but what windows reach, and the gradients of that return."""
    arrays, _ = _arrays(positions)
    windows = (1, 1, 20, 20, 2 * OWN, 2 * OWN, -1, 40)
    hops = [min(each, positions.count - 1) for each in (0, 1, 2, positions.count)]
    after, before = positions.count - 1 - positions.number, positions.number
    pair = BATCH * OWN * 2 * WIDTH * 8
    with _counted() as sent:
        _compare(positions, windows, arrays, options, f"windows with {[*options]}")
    nbytes = [pair * sum(min(each, there) for each in hops) for there in (after, before)]
    of_masks = [BATCH * OWN * min(max(hops), after)] * ("attention_mask" in options)
    assert sent == [nbytes[0], *of_masks, nbytes[1]]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes that this process sends, of each exchange."""
    sent, exchange = [], neighbours._exchange

    def counted(positions: Any, outgoing: Any, incoming: Any) -> None:
        sent.append(sum(x.nbytes for x in outgoing.values()))
        exchange(positions, outgoing, incoming)

    neighbours._exchange = counted
    try:
        yield sent
    finally:
        neighbours._exchange = exchange


def _check_a_far_key(positions: Positions) -> None:
    """A key outweighs its distance, and its device is not asked for it: no number is right."""
    for broken in (False, True):
        query = torch.ones(1, 2, OWN, 4, dtype=torch.float64)
        key, value = torch.full_like(query, 0.1), torch.ones_like(query)
        if positions.number == 0:
            (value if broken else key)[:, 1, OWN // 2] = math.nan if broken else 500
        options: Any = {"causal": True, "implementation": "auto", "distance": "absolute"}
        options |= dict.fromkeys(("scale", "attention_mask", "segment_ids")) | {"dropout": 0.0}
        steep = torch.tensor([90.0, 90.0])
        found = attention_within((-1, 1), positions, query, key, value, steep, **options)
        assert found[:, 0].isfinite().all()
        is_right = torch.ones(OWN, dtype=torch.bool)
        if broken and positions.number == 0:
            is_right[OWN // 2 :] = False
        if positions.number > 0:
            is_right[:] = False
        assert (found[:, 1].isfinite().all(dim=-1) == is_right).all()


SMALL = ALiBiConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=32, slope_interpolation=9)


def _model(config: ALiBiConfig, windows: Any = None, seed: int = 0) -> ALiBiLM:
    with torch.device("meta"):
        model = ALiBiLM(config, windows=windows)
    model.load_tensors(Tensors.of(initial_parameters(config, seed)))
    return model.eval()


@torch.no_grad()
def _check_calls_of_models(mesh: Any) -> None:
    """Padding, lengths at which slopes are interpolated, a few logits, packed rows."""
    tokens = torch.arange(48).reshape(2, 24) % 32
    packed = {"segment_ids": torch.arange(24).expand(2, -1) // 7}
    several = {"slope_interpolation": None}
    for more, options in (
        ({}, {"attention_mask": torch.arange(24).expand(2, -1) > torch.tensor([[3], [15]])}),
        ({}, {"logits_to_keep": 1}),
        ({}, {"logits_to_keep": 13}),
        (several, packed),
    ):
        config = dataclasses.replace(SMALL, **more)
        model = parallelize(_model(config), mesh)
        actual, exact = (each(tokens, **options).numpy() for each in (model, _model(config)))
        limit = BUDGETS["float32", "cpu"].forward
        assert_within(actual, exact, limit, f"logits with {[*options]}")
    with pytest.raises(ValueError, match="seq of a batch, 23, is not a multiple of the"):
        model(tokens[:, :23])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 12\]"):
        model(tokens, attention_mask=torch.ones(2, 12, dtype=torch.bool))
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, vocab_size=None)
    transformers = [ALiBiTransformer(config).eval() for _ in range(2)]
    transformers[1].load_state_dict(transformers[0].state_dict())
    x = torch.randn(2, 24, 16)
    alone = transformers[0](x).numpy()
    found = parallelize(transformers[1], mesh)(x)
    assert_within(found.numpy(), alone, limit, "hidden states")


def _check_gradients_of_whole_logits(mesh: Any) -> None:
    """Where every process computes the same of them, as in a loop of one's own."""
    tokens = torch.arange(48).reshape(2, 24) % 32
    models = [_model(SMALL).double() for _ in range(2)]
    parallelize(models[1], mesh)
    for model in models:
        model(tokens).square().sum().backward()
    expected, found = (
        {name: whole(cast(Any, each.grad)).numpy() for name, each in model.named_parameters()}
        for model in models
    )
    assert_gradients_within(found, expected, BUDGET.gradient, "of whole logits")


def _check_dropout(mesh: Any) -> None:
    """The numbers of one device are dropped, also where blocks are computed again."""
    options: dict[str, Any] = {"embedding_dropout": 0.2, "attention_bias": False}
    config = dataclasses.replace(SMALL, dropout=0.3, **options)
    recipe = Recipe(steps=3, batch_size=2, recompute=True, epsilon=1e-3)
    tokens = torch.arange(48).reshape(2, 24) % 32
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    models = [_model(config) for _ in range(2)]
    parallelize(models[1], mesh)
    for model in models:
        trainer = Trainer(model, recipe)
        for _ in range(3):
            trainer.step(batch)
    limit = AGREEMENTS["float32 training"].relative
    for name, exact in models[0].named_parameters():
        actual = whole(models[1].get_parameter(name)).detach().numpy()
        assert_within(actual, exact.detach().numpy(), limit, f"{name} with dropout")


def _check_windows_of_models(mesh: Any) -> None:
    """With the windows that weights prove less is sent; with too small ones nothing is right."""
    seq, positions, tensor = 640, Positions.of(mesh), mesh["tensor"]
    assert positions is not None
    config = ALiBiConfig(
        **{"num_layers": 2, "d_model": 64, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 104},
        # The heads that need the most keys are the first.
        **{"dropout": 0.0, "slopes": tuple(map(float, slopes(8)[::-1]))},
    )
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 104, (2, seq)))
    proved = model_windows(config, initial_parameters(config, 0))
    own = seq // positions.count
    with torch.no_grad():
        exact = _model(config)(tokens).numpy()
    model, nbytes = parallelize(_model(config), mesh), {}
    after, far = positions.count - 1 - positions.number, np.full((2, 8), seq)
    few = np.repeat([[seq, 1]] * 2, 4, axis=1)
    for name, windows in (("all", far), ("windows", proved), ("few", few)):
        model.windows = tuple(map(tuple, windows.tolist()))
        with torch.no_grad(), _counted() as sent:
            found = model(tokens).numpy()
        pairs = windows.reshape(2, 4, 2).max(axis=2)  # of each head of keys
        pairs = np.split(pairs, tensor.size(), axis=1)[tensor.get_local_rank()]
        hops = np.minimum(-(-(pairs - 1) // own), after)
        numbers = 2 * own * config.head_dim * 2  # of keys and values of one head and one hop
        assert sent == [int(each) * numbers * 4 for each in hops.sum(axis=1)]
        nbytes[name] = sum(sent)
        if name == "few":  # the first device lacks no key
            assert np.isfinite(found[:, :own]).all()
            assert np.isnan(found[:, own:]).all()
        else:
            assert_within(found, exact, BUDGETS["float32", "cpu"].forward, f"logits with {name}")
    assert after < 2 or nbytes["windows"] < 0.9 * nbytes["all"]
    before = {name: whole(each).detach().clone() for name, each in model.named_parameters()}
    trainer = Trainer(model, Recipe(steps=1, batch_size=2))
    metrics = trainer.step({"tokens": tokens, "targets": tokens.roll(-1, 1)})
    assert metrics.loss.isnan()
    for name, each in model.named_parameters():
        assert_bitwise(whole(each).detach().numpy(), before[name].numpy(), name)
