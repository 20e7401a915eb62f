"""The state of optimizers crosses between torch and optax bit by bit, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alibi_torch
from alibi_convert import (
    CheckpointError,
    flax_to_torch,
    optax_to_torch,
    torch_to_flax,
    torch_to_optax,
)
from alibi_convert.optimizers.torch_state import from_torch, to_torch
from alibi_convert.rules import flax_tree
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec.budgets import AGREEMENTS
from alibi_spec.parameters import parameter_names
from parity_tests.cases import CONFIGS, each_config
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.optimizer_states import (
    CONFIG,
    LABELS,
    MATRICES,
    NAMES,
    ROWS,
    VECTORS,
    as_params,
    assert_same_dict,
    assert_same_state,
    drawn,
)

STEPS = 3


# Numbers that float32 holds: what optax injects has the params' dtype.
BETAS = {"lr": 2.0**-9, "betas": (0.75, 0.875)}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {**BETAS, "eps": 2.0**-20, "weight_decay": 0.25},
    "Adam": {**BETAS, "eps": 2.0**-20},
    "SGD": {"lr": 0.125, "momentum": 0.75},
    "nesterov": {"lr": 0.125, "momentum": 0.75, "nesterov": True},
    "plain": {"lr": 0.125},
    "Lion": {**BETAS, "weight_decay": 0.25},
}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, with the state and the options of lion-pytorch."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (beta1 * average + (1 - beta1) * p.grad).sign()
                p -= lr * (update + group["weight_decay"] * p)
                average.mul_(beta2).add_(p.grad, alpha=1 - beta2)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    **dict.fromkeys(("SGD", "nesterov", "plain"), torch.optim.SGD),
    "Lion": Lion,
}


def trained(name: str, parameters: Any = None, dtype: Any = torch.float32) -> torch.optim.Optimizer:
    """An optimizer after three steps, of a model's parameters."""
    given = parameters or model(dtype).parameters()
    optimizer = MAKERS[name](given, **OPTIONS[name])
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(STEPS):
        torch.manual_seed(step)
        for parameter in numbered:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def model(dtype: Any = torch.float32) -> alibi_torch.ALiBiLM:
    torch.manual_seed(9)
    return alibi_torch.ALiBiLM(CONFIG).to(dtype)


def adamw(**options: Any) -> optax.GradientTransformation:
    return optax.adamw(2.0**-9, 0.75, 0.875, 2.0**-20, weight_decay=0.25, **options)


DECAYS = {"learning_rate": 2.0**-9, "b1": 0.75, "b2": 0.875, "eps": 2.0**-20, "weight_decay": 0.25}
TX: dict[str, Callable[[], Any]] = {
    "AdamW": adamw,
    "Adam": lambda: optax.adam(2.0**-9, 0.75, 0.875, 2.0**-20),
    "SGD": lambda: optax.sgd(0.125, 0.75),
    "nesterov": lambda: optax.sgd(0.125, 0.75, nesterov=True),
    "plain": lambda: optax.sgd(0.125),
    "Lion": lambda: optax.lion(2.0**-9, 0.75, 0.875, weight_decay=0.25),
}


def falling(step: Any) -> Any:
    return 0.5 / (1 + step)


def injected(**options: Any) -> Any:
    return optax.inject_hyperparams(optax.adamw, static_args="mask")(**DECAYS | options)


WRAPPED: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip(1.0), adamw(), optax.scale(1.0)),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("count", adamw())),
    "schedule": lambda: optax.chain(adamw(), optax.scale_by_schedule(falling)),
    "mask of decay": lambda: adamw(mask=MATRICES),
    "partition": lambda: optax.partition({"matrices": adamw(), "vectors": adamw()}, LABELS),
    "masks": lambda: optax.chain(
        optax.masked(optax.scale_by_adam(), MATRICES),
        optax.masked(optax.scale_by_adam(), VECTORS),
    ),
    "accumulation": lambda: optax.MultiSteps(adamw(), 2),
    "injected": lambda: injected(mask=MATRICES),
    "injected schedule": lambda: injected(learning_rate=falling),
    "if finite": lambda: optax.apply_if_finite(adamw(), 3),
    "all": lambda: optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {
                    "matrices": injected(learning_rate=falling),
                    "vectors": optax.chain(injected(), optax.scale_by_schedule(falling)),
                },
                LABELS,
            ),
        ),
        4,
    ),
}
ALL = TX | WRAPPED
each_wrapper = pytest.mark.parametrize("wrapper", ALL)


def as_after(step: int, state: Any, seed: int = 0) -> Any:
    """A fresh state with moments, counts and hyperparameters as they might be after some steps."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, value: jax.Array) -> jax.Array:
        keys = jax.tree_util.keystr(path)
        if any(word in keys for word in ("mini_step", "acc_grads", "finite", "eps_root")):
            return value
        if value.dtype == jnp.int32:
            return jnp.asarray(step, jnp.int32)
        return jnp.asarray(rng.uniform(0.1, 0.9, value.shape), value.dtype)

    return jax.tree_util.tree_map_with_path(leaf, state)


@each_config
def test_the_order_is_that_of_the_model(config_name: str) -> None:
    config = CONFIGS[config_name]
    kind = alibi_torch.ALiBiTransformer if config.vocab_size is None else alibi_torch.ALiBiLM
    names = [name for name, _ in kind(config).named_parameters()]
    assert names == list(parameter_names(config))


@each_wrapper
def test_from_torch_and_back(wrapper: str) -> None:
    name = wrapper if wrapper in TX else "AdamW"
    saved = trained(name).state_dict()
    state = torch_to_optax(saved, CONFIG, ALL[wrapper]())
    assert_same_dict(optax_to_torch(state, CONFIG, like=saved), saved)


@each_wrapper
def test_from_optax_and_back(wrapper: str) -> None:
    tx = ALL[wrapper]()
    state = as_after(5, tx.init(as_params(drawn(0))))
    saved = optax_to_torch(state, CONFIG)
    assert_same_state(torch_to_optax(saved, CONFIG, tx), state)
    assert ("step" in saved) == (wrapper == "Lion")


def test_each_moment_is_where_it_belongs() -> None:
    """By the table, and by the public conversion of parameters."""
    saved = trained("AdamW").state_dict()
    adam = torch_to_optax(saved, CONFIG, adamw())[0]
    for tree, word in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        by_name = {name: saved["state"][i][word] for i, name in enumerate(NAMES)}
        expected = torch_to_flax(by_name, CONFIG)
        assert_same_state(tree, jax.tree.map(jnp.asarray, expected))
    assert adam.count.dtype == jnp.int32
    assert int(adam.count) == STEPS


@pytest.mark.parametrize("name", TX)
def test_the_next_update_is_the_same(name: str) -> None:
    """One more step on both sides, and then one more after the way back, in float64."""
    torch_model = model(torch.float64)
    optimizer = trained(name, list(torch_model.parameters()), torch.float64)
    tx = TX[name]()
    state = torch_to_optax(optimizer.state_dict(), CONFIG, tx)
    update = jax.jit(tx.update)
    for seed in range(2):
        gradients, before = drawn(seed, np.float64), weights(torch_model)
        params = as_params(before)
        updates, state = update(as_params(gradients), state, params)
        for key, parameter in torch_model.named_parameters():
            parameter.grad = as_torch(gradients[key])
        optimizer.step()
        found = flax_to_torch(updates, CONFIG)
        for key, after in weights(torch_model).items():
            change = after - before[key]
            assert_within(as_numpy(found[key]), change, AGREEMENTS["optimizer"].relative, key)
        optimizer.load_state_dict(optax_to_torch(state, CONFIG, like=optimizer.state_dict()))


def weights(torch_model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: as_numpy(p).copy() for name, p in torch_model.named_parameters()}


def test_a_torch_optimizer_loads_it() -> None:
    """And goes on with a counter of each parameter's own, and the rate that was injected."""
    saved = optax_to_torch(after(5, injected()), CONFIG)
    optimizer = torch.optim.AdamW(model().parameters(), lr=1.0)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {6.0}


def after(step: int, tx: Any, seed: int = 0) -> Any:
    return as_after(step, tx.init(as_params(drawn(0))), seed)


def test_options_that_optax_does_not_know() -> None:
    """Torch's defaults, or those of `like`; only SGD's momentum is left out, as 0 would drop it."""
    (group,) = optax_to_torch(after(5, adamw()), CONFIG)["param_groups"]
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert group == defaults | {"params": list(range(len(NAMES)))}
    (group,) = optax_to_torch(after(5, TX["SGD"]()), CONFIG)["param_groups"]
    assert "momentum" not in group
    (group,) = optax_to_torch(after(5, TX["plain"]()), CONFIG)["param_groups"]
    assert group["momentum"] == 0
    like = trained("SGD").state_dict()["param_groups"]
    assert optax_to_torch(after(5, TX["SGD"]()), CONFIG, like=like)["param_groups"] == like


def test_injected_options_come_first() -> None:
    """Before those of `like`, but for groups of it that have no weight decay."""
    state = after(5, injected())
    rate = float(state.hyperparams["learning_rate"])
    decay = float(state.hyperparams["weight_decay"])
    optimizer = trained("AdamW", split(model(), named=True))
    saved = optax_to_torch(state, CONFIG, like=optimizer.state_dict())
    assert [group["lr"] for group in saved["param_groups"]] == [rate, rate]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [decay, 0]
    back = torch_to_optax(saved, CONFIG, injected())
    assert_same_state(back, state)


def test_hyperparameters_that_torch_lacks_stay_in_the_group() -> None:
    def clipped(learning_rate: Any, limit: Any) -> Any:
        return optax.chain(optax.clip(limit), optax.adam(learning_rate))

    tx = optax.inject_hyperparams(clipped)(learning_rate=0.1, limit=2.0)
    state = after(5, tx)
    saved = optax_to_torch(state, CONFIG)
    assert saved["param_groups"][0]["limit"] == float(state.hyperparams["limit"])
    assert_same_state(torch_to_optax(saved, CONFIG, tx), state)


def split(of: torch.nn.Module, named: bool) -> list[dict[str, Any]]:
    """The usual two groups: matrices, and the rest without weight decay."""
    pairs = list(of.named_parameters())
    return [
        {
            "params": [
                pair if named else pair[1] for pair in pairs if (pair[1].ndim > 1) is is_matrix
            ],
            **({} if is_matrix else {"weight_decay": 0.0}),
        }
        for is_matrix in (True, False)
    ]


@pytest.mark.parametrize("named", [True, False])
def test_several_groups(named: bool) -> None:
    """Their names are in them, or their shapes tell them."""
    optimizer = trained("AdamW", split(of := model(), named))
    saved = optimizer.state_dict()
    adam = torch_to_optax(saved, CONFIG, adamw())[0]
    moments = flax_to_torch(adam.mu, CONFIG)
    for name, parameter in of.named_parameters():
        assert_bitwise(
            as_numpy(moments[name]), as_numpy(optimizer.state[parameter]["exp_avg"]), name
        )
    if named:
        back = optax_to_torch((adam,), CONFIG, like=saved)
        assert_same_dict(back, saved)


def test_names_without_a_wrapper() -> None:
    saved = trained("AdamW").state_dict()
    names = [f"module._orig_mod.{name}" for name in NAMES]
    group = saved["param_groups"][0] | {"param_names": names}
    expected = torch_to_optax(saved, CONFIG, adamw())
    assert_same_state(torch_to_optax(saved | {"param_groups": [group]}, CONFIG, adamw()), expected)
    assert_same_state(torch_to_optax(saved, CONFIG, adamw(), names=names), expected)
    by_name = {
        "state": {NAMES[number]: entry for number, entry in saved["state"].items()},
        "param_groups": [saved["param_groups"][0] | {"params": list(reversed(NAMES))}],
    }
    assert_same_state(torch_to_optax(by_name, CONFIG, adamw()), expected)


def test_groups_that_the_shapes_do_not_tell() -> None:
    """Here the two first halves and the two second halves; a bias is in each."""
    parameters = list(model().parameters())
    groups = [{"params": parameters[:8]}, {"params": parameters[8:]}]
    saved = trained("AdamW", groups).state_dict()
    with pytest.raises(CheckpointError, match=r"2 param groups without names.*names="):
        torch_to_optax(saved, CONFIG, adamw())
    assert_same_state(
        torch_to_optax(saved, CONFIG, adamw(), names=NAMES),
        torch_to_optax(trained("AdamW").state_dict(), CONFIG, adamw()),
    )
    with pytest.raises(CheckpointError, match=r"2 param groups without names.*names="):
        optax_to_torch(after(5, adamw()), CONFIG, like=saved)
    back = optax_to_torch(after(5, adamw()), CONFIG, like=saved, names=NAMES)
    assert [len(group["params"]) for group in back["param_groups"]] == [8, len(NAMES) - 8]


def test_groups_in_another_order_than_the_model() -> None:
    groups = split(model(), named=False)
    groups[0]["params"].reverse()
    with pytest.raises(CheckpointError, match="not those of the model of this configuration in"):
        torch_to_optax(trained("AdamW", groups).state_dict(), CONFIG, adamw())


def test_groups_of_injected_hyperparameters() -> None:
    saved = optax_to_torch(after(5, ALL["all"]()), CONFIG)
    matrix_names = [name for name in NAMES if len(ROWS[name].shape) > 1]
    first, second = sorted(saved["param_groups"], key=lambda group: -len(group["params"]))
    assert {tuple(matrix_names), tuple(n for n in NAMES if n not in matrix_names)} == {
        tuple(group["param_names"]) for group in (first, second)
    }
    assert first["lr"] != second["lr"]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(NAMES)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float16"])
def test_dtypes(dtype: str) -> None:
    saved = trained("AdamW", dtype=getattr(torch, dtype)).state_dict()
    state = torch_to_optax(saved, CONFIG, adamw())
    assert {
        str(tensor.dtype)
        for name, tensor in flax_to_torch(state[0].mu, CONFIG).items()
        if not ROWS[name].is_wide
    } == {f"torch.{dtype}"}
    assert_same_dict(optax_to_torch(state, CONFIG, like=saved), saved)


def test_two_dtypes() -> None:
    """As optax's `mu_dtype` makes them; the moments are never cast."""
    state = after(5, adamw(mu_dtype=jnp.bfloat16))
    saved = optax_to_torch(state, CONFIG)
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert saved["state"][0]["exp_avg_sq"].dtype == torch.float32
    assert_same_state(torch_to_optax(saved, CONFIG, adamw(mu_dtype=jnp.bfloat16)), state)
    with pytest.raises(CheckpointError, match=r"exp_avg of .* is bfloat16, and tx keeps float32"):
        torch_to_optax(saved, CONFIG, adamw())


def test_float64_needs_jax_to_have_it() -> None:
    saved = trained("AdamW", dtype=torch.float64).state_dict()
    with jax.enable_x64(False), pytest.raises(CheckpointError, match="jax_enable_x64"):
        torch_to_optax(saved, CONFIG, adamw())


def test_what_was_never_stepped() -> None:
    saved = torch.optim.AdamW(model().parameters()).state_dict()
    expected = adamw().init(as_params(drawn(0)))
    assert_same_state(torch_to_optax(saved, CONFIG, adamw()), expected)
    for name in ("SGD", "Lion"):
        fresh = MAKERS[name](model().parameters(), **OPTIONS[name]).state_dict()
        tx = optax.chain(TX[name](), optax.scale_by_schedule(falling))
        assert_same_state(torch_to_optax(fresh, CONFIG, tx), tx.init(as_params(drawn(0))))


def without(saved: dict[str, Any], number: int) -> dict[str, Any]:
    entries = {key: entry for key, entry in saved["state"].items() if key != number}
    return saved | {"state": entries}


def test_parameters_that_were_never_stepped() -> None:
    """Adam counts a parameter's own updates, so that zeros would not be the same; others do not."""
    last = len(NAMES) - 1
    saved = without(trained("AdamW").state_dict(), last)
    with pytest.raises(CheckpointError, match=rf"{NAMES[last]} was never updated .*set_to_zero"):
        torch_to_optax(saved, CONFIG, adamw())
    frozen = {"on": adamw(), "off": optax.set_to_zero()}
    is_on = flax_tree(
        Tensors.of(drawn(0)), CONFIG, lambda r, _: "off" if r.name == NAMES[last] else "on"
    )
    state = torch_to_optax(saved, CONFIG, optax.partition(frozen, is_on))
    assert_same_dict(optax_to_torch(state, CONFIG, like=saved), saved)
    with pytest.raises(CheckpointError, match=rf"{NAMES[last]} has exp_avg.* tx has no place"):
        torch_to_optax(trained("AdamW").state_dict(), CONFIG, optax.partition(frozen, is_on))
    momentum = without(trained("SGD").state_dict(), last)
    trace = torch_to_optax(momentum, CONFIG, TX["SGD"]())[0].trace
    assert not np.any(trace["lm_head"]["kernel"])
    assert NAMES[last] == "lm_head.weight"


def test_steps_that_torch_does_not_count() -> None:
    """Where a rule reads the count it must be given; Lion only keeps one, which may be unknown."""
    saved = trained("SGD").state_dict()
    tx = optax.sgd(falling, 0.75)
    with pytest.raises(CheckpointError, match=r"\[1\]\.count counts updates, .*; pass step="):
        torch_to_optax(saved, CONFIG, tx)
    state = torch_to_optax(saved, CONFIG, tx, step=3)
    assert int(state[1].count) == 3
    back = optax_to_torch(state, CONFIG, like=saved)
    assert back["step"] == 3
    assert_same_state(torch_to_optax(back, CONFIG, tx), state)
    with pytest.raises(CheckpointError, match="updated 3 times or 4 times; leave out step="):
        torch_to_optax(back, CONFIG, tx, step=4)
    optimizer = trained("SGD")
    optimizer.load_state_dict(back)
    assert "step" not in optimizer.state_dict()  # which torch would not keep right
    lion = torch_to_optax(trained("Lion").state_dict(), CONFIG, TX["Lion"]())
    assert int(lion[0].count) == 0
    assert "step" not in optax_to_torch(lion, CONFIG)


def changed(saved: dict[str, Any], number: int, **entry: Any) -> dict[str, Any]:
    return saved | {"state": saved["state"] | {number: saved["state"][number] | entry}}


def with_options(saved: dict[str, Any], **options: Any) -> dict[str, Any]:
    return saved | {"param_groups": [group | options for group in saved["param_groups"]]}


def test_torch_states_that_are_refused() -> None:
    saved = trained("AdamW").state_dict()
    first, second = NAMES[:2]
    other = replace(CONFIG, d_model=12)
    for wrong, config, message in (
        ({"model": 1}, CONFIG, "its state is not as expected; give what the .*state_dict"),
        ({"state": {0: 1}, "param_groups": []}, CONFIG, "its state is not as expected"),
        ({"state": {}, "param_groups": []}, CONFIG, "its param_groups is not as expected"),
        ({"state": {}, "param_groups": [{"lr": 1}]}, CONFIG, "its param_groups is not as"),
        (with_options(saved, params=[[0]]), CONFIG, "its param_groups is not as expected"),
        (with_options(saved, params=[0] * len(NAMES)), CONFIG, "its param_groups is not as"),
        (with_options(saved, param_names=["a"]), CONFIG, "its param_groups is not as expected"),
        (changed(saved, 0, exp_avg="much"), CONFIG, "exp_avg of parameter 0 is a str, expected a"),
        (
            changed(saved, 0, step=torch.ones(2)),
            CONFIG,
            f"step of {first} is a Tensor, expected one number",
        ),
        (with_options(saved, amsgrad=True), CONFIG, "max_exp_avg_sq.*only amsgrad=False"),
        (changed(saved, 0, max_exp_avg_sq=torch.ones(1)), CONFIG, f"{first} has max_exp_avg_sq"),
        (changed(saved, 1, exp_avg=None), CONFIG, f"{second} lacks exp_avg;"),
        (changed(saved, 1, step=torch.tensor(4.0)), CONFIG, f"{first} was .* 3 .*{second} 4 times"),
        (
            changed(saved, 0, step=torch.tensor(2.5)),
            CONFIG,
            f"step of {first} is 2.5, expected a whole",
        ),
        (with_options(saved, maximize=True), CONFIG, "maximize=True .*minimise the negative"),
        (saved, replace(CONFIG, num_layers=2), "has 21 parameters, and there are 38 names.*config"),
        (saved, other, r"exp_avg: .*expected \[7, 12\]"),
        (changed(saved, 0, exp_avg=torch.zeros(1, 2)), CONFIG, r"exp_avg: .*is \[1, 2\]"),
        (
            changed(saved, 0, exp_avg=torch.zeros(ROWS[first].shape, dtype=torch.int32)),
            CONFIG,
            f"exp_avg of {first} is int32; expected one of float16",
        ),
        (saved | {"state": saved["state"] | {99: saved["state"][0]}}, CONFIG, "the parameter 99"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            torch_to_optax(wrong, config, adamw())
    with pytest.raises(CheckpointError, match="has 21 parameters, and there are 2 names"):
        torch_to_optax(saved, CONFIG, adamw(), names=["a", "b"])
    with pytest.raises(CheckpointError, match="1 unexpected"):
        torch_to_optax(saved, CONFIG, adamw(), names=["other", *NAMES[1:]])
    with pytest.raises(CheckpointError, match="named twice"):
        torch_to_optax(saved, CONFIG, adamw(), names=[NAMES[1], *NAMES[1:]])
    momentum = with_options(trained("SGD").state_dict(), dampening=0.5)
    with pytest.raises(CheckpointError, match=r"dampening=0\.5 .*scale the gradients in tx"):
        torch_to_optax(momentum, CONFIG, TX["SGD"]())


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "ASGD", "Muon"])
def test_other_optimizers_of_torch_are_refused(name: str) -> None:
    """RAdam and Muon keep what Adam and SGD keep, and do something else with it."""
    parameters = [p for p in model().parameters() if p.ndim == 2]
    saved = getattr(torch.optim, name)(parameters).state_dict()
    with pytest.raises(CheckpointError, match=r"options .* is not known; expected torch's AdamW"):
        torch_to_optax(saved, CONFIG, adamw())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax.amsgrad(0.1), r"\[0\] is a ScaleByAmsgradState, .*correction of its bias"),
        (lambda: optax.adafactor(0.1), r"is a FactoredState, .*factored"),
        (lambda: optax.rmsprop(0.1), r"\[0\] is a ScaleByRmsState, .*known are EmptyState"),
        (lambda: optax.flatten(optax.adam(0.1)), r"\.mu is one array.*optax\.flatten"),
        (lambda: optax.chain(TX["SGD"](), adamw()), r"of sgd .*trace\) and of adam .*mu\),"),
        (lambda: optax.chain(adamw(), adamw()), r"\[1\]\[0\]\.mu is a second exp_avg of "),
    ],
)
def test_optax_states_that_are_refused(make: Callable[[], Any], message: str) -> None:
    tx = make()
    state = tx.init(as_params(drawn(0)))
    with pytest.raises(CheckpointError, match=message):
        optax_to_torch(state, CONFIG)
    with pytest.raises(CheckpointError, match=message):
        torch_to_optax(trained("AdamW").state_dict(), CONFIG, tx)


def test_optax_states_at_times_that_torch_cannot_say() -> None:
    state = after(5, WRAPPED["accumulation"]())
    for change in ({"mini_step": 1}, {"acc_grads": as_params(drawn(1))}):
        wrong = state._replace(**jax.tree.map(jnp.asarray, change))
        with pytest.raises(CheckpointError, match=r"is not zero, .*go on to the end of the accum"):
            optax_to_torch(wrong, CONFIG)
    wrong = after(5, WRAPPED["if finite"]())._replace(total_notfinite=jnp.asarray(1))
    with pytest.raises(CheckpointError, match=r"total_notfinite is not zero, .*its inner_state"):
        optax_to_torch(wrong, CONFIG)
    adam, *others = after(5, adamw())
    counts = (adam, optax.ScaleByScheduleState(jnp.asarray(6)))
    with pytest.raises(CheckpointError, match=r"\[0\]\.count is 5, opt_state\[1\]\.count is 6"):
        optax_to_torch(counts, CONFIG)
    odd = adam._replace(count=jnp.asarray(2**24 + 1))
    with pytest.raises(CheckpointError, match="float32, which has no 16,777,217"):
        optax_to_torch((odd, *others), CONFIG)
    even = adam._replace(count=jnp.asarray(2**24 + 2))
    assert float(optax_to_torch((even, *others), CONFIG)["state"][0]["step"]) == 2**24 + 2
    rooted = optax.inject_hyperparams(optax.adamw)(0.1, eps_root=1e-3)
    with pytest.raises(CheckpointError, match="has eps_root, which torch lacks"):
        optax_to_torch(rooted.init(as_params(drawn(0))), CONFIG)
    twice = WRAPPERS["injected"](WRAPPERS["injected"](adamw()))
    with pytest.raises(CheckpointError, match=r"a second lr for .*; inject it once"):
        optax_to_torch(after(5, twice), CONFIG)
    with pytest.raises(CheckpointError, match=r"(?s)^opt_state\[0\]\.mu: .*expected \[7, 12\]"):
        optax_to_torch((adam, *others), replace(CONFIG, d_model=12))


def test_transformations_of_another_kind() -> None:
    for name, other in (("AdamW", "SGD"), ("SGD", "AdamW"), ("Lion", "AdamW"), ("plain", "Lion")):
        with pytest.raises(CheckpointError, match=r"tx keeps moments of the kind (sgd|adam|lion)"):
            torch_to_optax(trained(name).state_dict(), CONFIG, TX[other]())
    with pytest.raises(CheckpointError, match="has exp_avg, exp_avg_sq, for which tx has no place"):
        torch_to_optax(trained("AdamW").state_dict(), CONFIG, TX["plain"]())
    with pytest.raises(CheckpointError, match="of the kind adam, and like= of sgd"):
        optax_to_torch(after(5, adamw()), CONFIG, like=trained("SGD").state_dict())


def test_options_that_differ_within_one_transformation() -> None:
    groups = split(model(), named=True)
    groups[1]["lr"] = 0.5
    saved = trained("AdamW", groups).state_dict()
    with pytest.raises(CheckpointError, match=r"lr is 0\.00195\d+ for .* and 0\.5 for .*partition"):
        torch_to_optax(saved, CONFIG, injected())
    torch_to_optax(saved, CONFIG, adamw())
    parts = optax.partition({"matrices": injected(), "vectors": injected()}, LABELS)
    state = torch_to_optax(saved, CONFIG, parts)
    assert float(state.inner_states["vectors"].inner_state.hyperparams["learning_rate"]) == 0.5
    assert_same_dict(optax_to_torch(state, CONFIG, like=saved), saved)


@st.composite
def transformations(draw: Any, kind: str) -> Any:
    """A chain that keeps one kind of moment once, in wrappers, with schedules around it."""
    tx = TX[kind]()
    for wrapper in draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4, unique=True)):
        tx = WRAPPERS[wrapper](tx)
    return tx


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "clip": lambda tx: optax.chain(optax.clip(1.0), tx),
    "schedule": lambda tx: optax.chain(tx, optax.scale_by_schedule(falling)),
    "masked": lambda tx: optax.masked(tx, MATRICES),
    "partition": lambda tx: optax.partition({"matrices": tx, "vectors": tx}, LABELS),
    "partly": lambda tx: optax.partition({"matrices": tx, "vectors": optax.set_to_zero()}, LABELS),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.scale(learning_rate))
    )(learning_rate=0.5),
    "accumulated": lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
    "if finite": lambda tx: optax.apply_if_finite(tx, 2),
    "named": lambda tx: optax.named_chain(("trace", tx), ("mu", optax.scale(0.5))),
}


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(sorted(TX)), st.integers(1, 2**24), st.integers(0, 99))
def test_any_chain_of_wrappers(data: Any, kind: str, step: int, seed: int) -> None:
    tx = data.draw(transformations(kind))
    state = after(step, tx, seed)
    if kind == "plain" and "learning_rate" in str(state):
        return  # nothing says whose
    saved = optax_to_torch(state, CONFIG)
    assert_same_state(torch_to_optax(saved, CONFIG, tx), state)


def test_the_neutral_form_keeps_all_options() -> None:
    """From torch to torch nothing else is needed."""
    for name in MAKERS:
        saved = trained(name, split(model(), named=True) if name == "AdamW" else None).state_dict()
        assert_same_dict(to_torch(from_torch(saved, CONFIG), CONFIG), saved)
