"""The state of an optax transformation, read and filled (SPEC.md §17)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.optimizers.optax_tree import (
    COUNT,
    KIND_OF,
    OPTIONS,
    START,
    TALLY,
    Field,
    fields,
    rebuilt,
)
from alibi_convert.optimizers.state import (
    KINDS,
    Group,
    OptimizerState,
    check_state,
    scalar,
    whole,
)
from alibi_convert.rules import (
    check_shapes,
    flax_tree,
    leaves_by_path,
    to_flax_layout,
    torch_view,
)
from alibi_convert.tensors import LazyTensor, Tensors, as_numpy
from alibi_spec import ALiBiConfig, Parameter, parameter_table
from alibi_spec.parameters import parameter_names

# Fields that must be zero, and what to do where they are not.
_MENDS = {
    "MultiStepsState": "go on to the end of the accumulation, where mini_step is 0",
    "ApplyIfFiniteState": "convert its inner_state alone",
}
# Hyperparameters of optax's optimizers: option of a param group, and place in it.
_HYPERPARAMETERS: Mapping[str, tuple[str, int | None]] = {
    "learning_rate": ("lr", None),
    "b1": ("betas", 0),
    "b2": ("betas", 1),
    "eps": ("eps", None),
    "weight_decay": ("weight_decay", None),
    "momentum": ("momentum", None),
}
SHARED_OPTIONS = tuple(dict.fromkeys(word for word, _ in _HYPERPARAMETERS.values()))
_ONLY_IN_TORCH = {
    "maximize": "optax minimises; minimise the negative objective and set maximize=False",
    "dampening": "optax.trace has none; scale the gradients in tx and set dampening=0",
}
_MAX_COUNT = 2**31 - 1


def from_optax(opt_state: Any, config: ALiBiConfig) -> OptimizerState:
    """The neutral form of an optax state, typed, or as dicts and lists; moments are not read yet.

    Raises:
        CheckpointError: of another model, or in a state that torch has no word for.
    """
    found = list(fields(opt_state, "opt_state"))
    _require_start(found)
    owned = _owned(found, config)
    kind = _kind(found, owned)
    moments: dict[str, dict[str, LazyTensor]] = {word: {} for word in KINDS[kind].moments}
    for field in found:
        for row, leaf in owned.get(field.path, ()):
            if row.name in moments[field.role]:
                raise _twice(field, row.name)
            moments[field.role][row.name] = torch_view(row, leaf)
    order = parameter_names(config)
    ordered = {
        word: Tensors({name: tensors[name] for name in order if name in tensors})
        for word, tensors in moments.items()
    }
    groups = _groups(_injected(found, owned, order), order)
    return check_state(OptimizerState(kind, _step(found, ordered), ordered, groups), config)


def _require_start(found: Iterable[Field]) -> None:
    for field in found:
        if field.role == START and any(
            np.any(as_numpy(leaf)) for leaf in _leaves(field.value).values()
        ):
            raise CheckpointError(
                f"{field.path} is not zero, and torch has no word for it; {_MENDS[field.state]}"
            )


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree like the params, in which parts may be masked."""
    return leaves_by_path(_unmasked(tree))


def _unmasked(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return np.asarray(tree) if isinstance(tree, int | float) else tree
    return {
        key: _unmasked(child)
        for key, child in tree.items()
        if not (child is None or (isinstance(child, tuple) and not child))
    }


# The parameters whose moments a field holds, and what it holds of each, by the path of the field.
Owned = Mapping[str, Sequence[tuple[Parameter, Any]]]


def _owned(found: Iterable[Field], config: ALiBiConfig) -> Owned:
    """The moments in fields, held against the parameter table.

    Raises:
        CheckpointError: names or shapes are those of another model.
    """
    rows = {row.flax_path: row for row in parameter_table(config)}
    owned = {}
    for field in found:
        if not field.is_moment:
            continue
        leaves = _leaves(field.value)
        if () in leaves:
            raise CheckpointError(
                f"{field.path} is one array, expected a tree like the params; optax.flatten, which "
                "makes it, is not converted: leave it out"
            )
        expected = {"/".join(path): rows[path].flax_shape for path in leaves if path in rows}
        try:
            check_shapes(expected, {"/".join(path): leaf.shape for path, leaf in leaves.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{field.path}: {error}") from None
        owned[field.path] = [(rows[path], leaf) for path, leaf in leaves.items()]
    return owned


def _kind(found: Iterable[Field], owned: Owned) -> str:
    """The one kind of all moments; a state without any is that of SGD without momentum."""
    first: dict[str, str] = {}
    for field in found:
        if owned.get(field.path):
            first.setdefault(KIND_OF[field.state], field.path)
    if len(first) > 1:
        raise CheckpointError(
            f"the state holds moments of {' and of '.join(f'{k} ({p})' for k, p in first.items())},"
            " and an optimizer of torch those of one kind; convert each of them alone, by the part "
            "of the state that holds it"
        )
    return next(iter(first), "sgd")


def _twice(field: Field, name: str) -> CheckpointError:
    return CheckpointError(
        f"{field.path} is a second {field.role} of {name}, and torch keeps one; take one of "
        "them out of the transformation"
    )


def _step(found: Iterable[Field], moments: Mapping[str, Tensors]) -> int | None:
    """How many updates were made: every count must say the same."""
    counts = {field.path: field for field in found if field.role in (COUNT, TALLY)}
    steps = {path: whole(path, field.value) for path, field in counts.items()}
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{path} is {step}" for path, step in steps.items())
        raise CheckpointError(
            f"counts differ, and torch has one step: {listed}; set them to the number of updates"
        )
    step = next(iter(steps.values()), None)
    is_sure = step or any(field.role == COUNT for field in counts.values())
    # A tally that began when the state came from torch, which had none.
    return step if is_sure or not _any_moment(moments) else None


def _any_moment(moments: Mapping[str, Tensors]) -> bool:
    return any(np.any(array) for tensors in moments.values() for array in tensors.values())


def _injected(
    found: Sequence[Field], owned: Owned, order: Sequence[str]
) -> list[tuple[Field, list[str]]]:
    """The fields with hyperparameters, and the parameters that each is for.

    That is those whose moments are inside, or where there are none, those without moments.
    """
    names = {path: [row.name for row, _ in rows] for path, rows in owned.items()}
    with_moments = {name for each in names.values() for name in each}
    others = [name for name in order if name not in with_moments]
    injected = []
    for field in found:
        if field.role == OPTIONS:
            inside = field.path.removesuffix("hyperparams")
            own = {name for path in names if path.startswith(inside) for name in names[path]}
            injected.append((field, [name for name in order if name in own] or others))
    return injected


def _groups(
    injected: Iterable[tuple[Field, list[str]]], order: tuple[str, ...]
) -> tuple[Group, ...]:
    """One group of all parameters, or where hyperparameters differ, one for each set of them."""
    options: dict[str, dict[str, Any]] = {}
    for field, names in injected:
        injected_here = _torch_options(field)
        for name in names:
            known = options.setdefault(name, {})
            for word in known.keys() & injected_here.keys():
                if known[word] != injected_here[word]:
                    raise CheckpointError(
                        f"{field.path} holds a second {word} for {name}, and torch has one; inject "
                        "it once"
                    )
            known |= injected_here
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name in order:
        if name in options:
            groups.setdefault(repr(options[name]), ([], options[name]))[0].append(name)
    if len(groups) < 2:
        return (Group(order, next((each for _, each in groups.values()), {})),)
    return tuple(Group(tuple(names), each) for names, each in groups.values())


def _torch_options(field: Field) -> dict[str, Any]:
    """Hyperparameters as options; those that torch does not know keep their names."""
    if not isinstance(field.value, Mapping):
        raise CheckpointError(f"{field.path} is no mapping; expected hyperparameters by name")
    values = {
        name: scalar(f"{field.path}[{name!r}]", value)
        for name, value in sorted(field.value.items(), key=str)
    }
    if values.pop("eps_root", 0):
        raise CheckpointError(f"{field.path} has eps_root, which torch lacks; set it to 0")
    if "b1" in values or "b2" in values:
        values["betas"] = values.pop("b1", None), values.pop("b2", None)
        if None in values["betas"]:
            raise CheckpointError(f"{field.path} has one of b1 and b2; inject both or neither")
    return {_HYPERPARAMETERS.get(name, (name,))[0]: value for name, value in values.items()}


def to_optax(
    state: OptimizerState,
    config: ALiBiConfig,
    tx: Any,
    *,
    like: Any = None,
    place: Callable[[Parameter, np.ndarray], Any] | None = None,
) -> Any:
    """The state of a transformation, filled; arguments as for `torch_to_optax`.

    Args:
        like: a state of `tx` to fill; None makes one of zeros.
        place: of a parameter and a moment in the torch layout: what to put in its place, before
            the next is read; None is an array of JAX.

    Raises:
        CheckpointError: the transformation keeps other things than the state has.
        ValueError: `tx` is no transformation.
    """
    if not callable(getattr(tx, "init", None)):
        raise ValueError(f"tx is a {type(tx).__name__}, expected an optax.GradientTransformation")
    check_state(state, config)
    _require_said(state)
    template = tx.init(_params(state, config)) if like is None else like
    found = list(fields(template, "tx.init(params)"))
    owned = _owned(found, config)
    _require_wanted(state, found, owned)
    options = {
        field.path: state.options(names)
        for field, names in _injected(found, owned, parameter_names(config))
    }

    def filled(field: Field) -> Any:
        if field.is_moment:
            return _filled(field, state, config, place or _as_array)
        if field.role in (COUNT, TALLY):
            return _counted(field, state.step)
        return _optioned(field, options[field.path]) if field.role == OPTIONS else field.value

    return rebuilt(template, filled, "tx.init(params)")


def _require_said(state: OptimizerState) -> None:
    """Raise CheckpointError for what optax has no word for."""
    import jax

    for group in state.groups:
        for word, mend in _ONLY_IN_TORCH.items():
            if group.options.get(word):
                raise CheckpointError(f"{word}={group.options[word]} has no match: {mend}")
    dtypes = {header.dtype for each in state.moments.values() for header in each.headers.values()}
    if np.dtype(np.float64) in dtypes and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            'the moments are float64; expected jax.config.update("jax_enable_x64", True) before, '
            "or JAX_ENABLE_X64=1 in the environment"
        )


def _params(state: OptimizerState, config: ALiBiConfig) -> dict[str, Any]:
    """Zeros like the params, in the dtypes of the moments."""
    import jax.numpy as jnp

    headers = state.moments[KINDS[state.kind].moments[-1]].headers
    default = next((header.dtype for header in headers.values()), np.dtype(np.float32))
    zeros = {
        row.name: np.broadcast_to(
            np.zeros((), headers[row.name].dtype if row.name in headers else default), row.shape
        )
        for row in parameter_table(config)
    }

    def leaf(row: Parameter, array: np.ndarray) -> Any:
        return jnp.zeros(row.flax_shape, array.dtype)

    return flax_tree(Tensors.of(zeros), config, leaf)


def _require_wanted(state: OptimizerState, found: Sequence[Field], owned: Owned) -> None:
    """The moments of the transformation are those of the state, each once."""
    wanted = _kind(found, owned)
    names: dict[str, set[str]] = {}
    for field in found:
        for row, _ in owned.get(field.path, ()):
            if row.name in names.setdefault(field.role, set()):
                raise _twice(field, row.name)
            names[field.role].add(row.name)
    if names and wanted != state.kind:
        raise CheckpointError(
            f"tx keeps moments of the kind {wanted}, and the state is of {state.kind}; give the "
            "transformation of that kind"
        )
    needed = next(iter(names.values()), set())
    for name in state.names:
        if name not in needed:
            raise CheckpointError(
                f"{name} has {', '.join(state.moments)}, for which tx has no place; give the "
                "transformation that trains it"
            )
    missing = needed - set(state.names)
    if state.names and missing and KINDS[state.kind].has_step:
        raise CheckpointError(
            f"{min(missing)} was never updated in torch, where its first update would be one of "
            "step 1, and optax has one count for all; leave it out of tx (optax.partition with "
            "optax.set_to_zero)"
        )


def _as_array(row: Parameter, moment: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(to_flax_layout(row, moment))


def _filled(
    field: Field,
    state: OptimizerState,
    config: ALiBiConfig,
    place: Callable[[Parameter, np.ndarray], Any],
) -> Any:
    """A moment's tree; zeros stay where torch has not made the moment yet."""
    import jax

    rows = {row.flax_path: row for row in parameter_table(config)}
    tensors = state.moments[field.role]

    def leaf(path: tuple[Any, ...], zeros: jax.Array) -> jax.Array:
        row = rows[tuple(str(key.key) for key in path)]
        if row.name not in tensors:
            return zeros
        dtype = tensors.headers[row.name].dtype
        if dtype != zeros.dtype:
            raise CheckpointError(
                f"{field.role} of {row.name} is {dtype}, and tx keeps {zeros.dtype}; give tx "
                "that dtype (mu_dtype, accumulator_dtype)"
            )
        return place(row, tensors[row.name])

    return jax.tree_util.tree_map_with_path(leaf, field.value)


def _counted(field: Field, step: int | None) -> Any:
    import jax.numpy as jnp

    if step is None and field.role == COUNT:
        raise CheckpointError(
            f"{field.path} counts updates, which this state of torch does not; pass step="
        )
    if (step or 0) > _MAX_COUNT:
        raise CheckpointError(f"optax counts in int32, which has no {step:,}")
    return jnp.asarray(step or 0, field.value.dtype)


def _optioned(field: Field, options: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters, with the values of the state where it has one."""
    import jax.numpy as jnp

    def value(name: str, own: Any) -> Any:
        word, place = _HYPERPARAMETERS.get(name, (name, None))
        if options.get(word) is None:
            return own
        found = options[word] if place is None else options[word][place]
        return jnp.asarray(found, own.dtype)

    return {name: value(name, own) for name, own in field.value.items()}
