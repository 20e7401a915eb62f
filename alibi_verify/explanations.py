"""Why an implementation leaves its budget: known mistakes, each tried on the float64 reference.

The first tensor that is wrong is computed again, from what the implementation itself had before it,
by the reference with one thing altered. What then comes out as observed is the likely cause.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from alibi_spec import ALiBiConfig, slopes
from alibi_spec.biases import DISTANCES, geometric_slopes, relative_position
from alibi_spec.budgets import activation_deviations
from alibi_spec.config import ACTIVATIONS, NORM_PLACEMENTS
from alibi_spec.reference import Reference
from alibi_verify.inputs import narrowed

ADDED_UP = "no step by itself: each is within the budget, and errors of several layers add up"
LIKE = 10.0  # how many times smaller a cause that is only like what happened leaves the error
_ALIKE = 2.0  # causes whose errors differ by less than this factor cannot be told apart

# Kinds of tensors: the last words of their names.
_ATTENTION = ("biased_logits", "attn")
_BLOCK = (*_ATTENTION, "ffn", "hidden")
EVERY_KIND = ("embedding", *_BLOCK, "output", "logits")

Arrays = Mapping[str, np.ndarray]
_Alter = Callable[[Reference, str], Reference | None]  # a model, and the prefix of its layer
_Changes = Callable[[ALiBiConfig], dict[str, Any]]
_Slopes = Callable[[np.ndarray, ALiBiConfig], np.ndarray]


@dataclass(frozen=True)
class Cause:
    """An explanation that was found.

    Attributes:
        words: what is wrong.
        error: of the first tensor past its budget, against the reference with this mistake.
        reduction: how many times smaller the root mean square of the deviations is against it.
        reproduces: whether the error is within the budget; otherwise it is only like this.
    """

    words: str
    error: float
    reduction: float
    reproduces: bool


@dataclass(frozen=True)
class Explanation:
    """One known mistake.

    Attributes:
        words: what is wrong.
        kinds: the last words of the tensors that can be wrong first.
        alter: the reference with the mistake, for a layer whose parameters have this prefix; None
            where the mistake is impossible or changes nothing.
    """

    words: str
    kinds: tuple[str, ...]
    alter: _Alter


def kind_of(name: str) -> str:
    """The last word of the name of a tensor; "hidden" for "layers.3", the result of a layer."""
    last = name.rpartition(".")[2]
    return "hidden" if last.isdigit() else last


def explain(
    model: Reference,
    inputs: np.ndarray,
    name: str,
    found: Arrays,
    budget: float,
    explanations: Iterable[Explanation],
) -> tuple[Cause, ...]:
    """The likely causes of the first tensor past its budget, the likeliest first.

    Args:
        model: the reference, not run.
        inputs: of the whole model.
        name: of that tensor.
        found: every tensor of the implementation.
        budget: error that is allowed.
        explanations: what is tried.

    Returns:
        `ADDED_UP`, if nothing is wrong with this tensor by itself. Otherwise what reproduces it
        within the budget; several, if they do so alike. Otherwise the one that leaves the least, if
        that is at least `LIKE` times less; or nothing.
    """
    with np.errstate(all="ignore"):  # of what overflowed
        before = _deviations(model, inputs, name, found)
        if before.max(initial=0.0) <= budget:
            return (Cause(ADDED_UP, float(before.max()), 1.0, True),)
        causes = []
        for each in explanations:
            altered = (
                each.alter(model, _prefix(model, name)) if kind_of(name) in each.kinds else None
            )
            if altered is not None:
                after = _deviations(altered, inputs, name, found)
                error, reduction = float(after.max(initial=0.0)), _size(before) / _size(after)
                causes.append(Cause(each.words, error, reduction, error <= budget))
    exact = [cause for cause in causes if cause.reproduces]
    if exact:
        least = min(cause.error for cause in exact)
        return tuple(cause for cause in exact if cause.error <= _ALIKE * least)
    like = [cause for cause in causes if cause.reduction >= LIKE]
    return tuple(sorted(like, key=lambda cause: -cause.reduction)[:1])


def _deviations(model: Reference, inputs: np.ndarray, name: str, found: Arrays) -> np.ndarray:
    """How far a tensor is from what the model makes of the tensors before it."""
    model = replace(model)  # with an empty trace
    if name == "embedding":
        model.embedding(inputs)
    elif name == "output":
        model.output(_wide(found[f"layers.{model.config.num_layers - 1}"]))
    elif name == "logits":
        model.logits(_wide(found["output"]))
    else:
        index = int(name.split(".")[1])
        x = _wide(found["embedding" if index == 0 else f"layers.{index - 1}"])
        (model.attended if kind_of(name) in _ATTENTION else model.block)(x, index)
    return activation_deviations(model.config, name, found[name], model.trace)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _size(deviations: np.ndarray) -> float:
    """Root mean square; at least one rounding, so that it can divide."""
    return max(float(np.sqrt((deviations**2).mean())), float(np.finfo(np.float64).eps))


def _prefix(model: Reference, name: str) -> str:
    """What the names of a layer's parameters begin with; of the whole model's, nothing."""
    root = "" if model.config.vocab_size is None else "transformer."
    return f"{root}{'.'.join(name.split('.')[:2])}." if name.startswith("layers.") else ""


# How to alter: each function below makes an `alter`.


def _configured(changes: _Changes) -> _Alter:
    """Another configuration."""

    def alter(model: Reference, _: str) -> Reference | None:
        changed = changes(model.config)
        if all(getattr(model.config, name) == value for name, value in changed.items()):
            return None
        return replace(model, config=replace(model.config, **changed))

    return alter


def _sloped(change: _Slopes) -> _Alter:
    """Other slopes, as a function of the right ones."""

    def alter(model: Reference, _: str) -> Reference:
        return _as(_Sloped, model, change=change)

    return alter


@dataclass(kw_only=True)
class _Sloped(Reference):
    change: _Slopes

    def slopes(self, index: int) -> np.ndarray:
        return self.change(super().slopes(index).astype(np.float64), self.config)


def _placed(placement: str) -> _Alter:
    """Norms in another place; after "post" there is no final norm."""
    return _configured(
        lambda config: {
            "norm_placement": placement,
            "final_norm": config.final_norm and placement != "post",
        }
    )


def _hiding(first_hidden: int) -> _Alter:
    """A causal mask whose first hidden key is this far after the query."""

    def alter(model: Reference, _: str) -> Reference | None:
        if not model.config.causal:
            return None
        config = replace(model.config, causal=False)
        return _as(_Hiding, replace(model, config=config), first_hidden=first_hidden)

    return alter


@dataclass(kw_only=True)
class _Hiding(Reference):
    first_hidden: int

    def biased_logits(self, query: np.ndarray, key: np.ndarray, index: int) -> np.ndarray:
        logits = super().biased_logits(query, key, index)
        relative = relative_position(query.shape[2], key.shape[2])
        return np.where(relative < self.first_hidden, logits, -np.inf)


def _unmasked(model: Reference, _: str) -> Reference | None:
    return None if model.attention_mask is None else replace(model, attention_mask=None)


def _uninterpolated(model: Reference, _: str) -> Reference | None:
    return None if model.slope_factor == 1 else replace(model, slope_factor=1.0)


def _fused(read: Callable[[np.ndarray, int, int], np.ndarray]) -> _Alter:
    """Queries, keys and values that are stacked [part, heads · head_dim, …] and misread."""

    def alter(model: Reference, prefix: str) -> Reference | None:
        config = model.config
        if config.kv_heads != config.num_heads:
            return None
        changed = {}
        for leaf in ("weight", "bias") if config.attention_bias else ("weight",):
            names = [f"{prefix}attn.{part}.{leaf}" for part in ("query", "key", "value")]
            stacked = np.stack([model.parameters[name] for name in names])
            parts = read(stacked, config.num_heads, config.head_dim).reshape(stacked.shape)
            changed |= dict(zip(names, parts, strict=True))
        return with_parameters(model, changed)

    return alter


def _grouped_for_interleaved(stacked: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Written as (heads part head_dim), read as (part heads head_dim)."""
    return stacked.reshape(3, heads, head_dim, -1).swapaxes(0, 1)


def _interleaved_for_grouped(stacked: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Written as (part heads head_dim), read as (heads part head_dim)."""
    return stacked.reshape(heads, 3, head_dim, -1).swapaxes(0, 1)


def _channels_first(stacked: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Written as (heads head_dim), read as (head_dim heads)."""
    return stacked.reshape(3, head_dim, heads, -1).swapaxes(1, 2)


def _transposed(*modules: str) -> _Alter:
    """Square matrices with their axes exchanged; of a layer, or of the whole model."""

    def alter(model: Reference, prefix: str) -> Reference | None:
        names = [f"{prefix}{module}.weight" for module in modules]
        arrays = {name: model.parameters[name] for name in names if name in model.parameters}
        changed = {
            name: array.T for name, array in arrays.items() if array.shape[0] == array.shape[1]
        }
        return with_parameters(model, changed) if changed else None

    return alter


def _exchanged(first: str, second: str) -> _Alter:
    """Two linear maps in each other's place."""

    def alter(model: Reference, prefix: str) -> Reference | None:
        changed = {}
        for one, other in ((first, second), (second, first)):
            for leaf in ("weight", "bias"):
                name, source = (f"{prefix}{module}.{leaf}" for module in (one, other))
                if name in model.parameters and source in model.parameters:
                    changed[name] = model.parameters[source]
        is_possible = bool(changed) and all(
            array.shape == model.parameters[name].shape for name, array in changed.items()
        )
        return with_parameters(model, changed) if is_possible else None

    return alter


def _rounded_to(dtype: str) -> _Alter:
    """Parameters that a narrow dtype can hold."""

    def alter(model: Reference, _: str) -> Reference:
        tensors: Any = model.parameters
        return replace(model, parameters=narrowed(model.config, tensors, dtype))

    return alter


def with_parameters(model: Reference, changed: dict[str, np.ndarray]) -> Reference:
    """Some parameters changed; the others are still read only when they are needed."""
    parameters: Any = model.parameters
    return replace(model, parameters=ChainMap(changed, parameters))


def _multiplied(bits: int, *products: str) -> _Alter:
    """Products of matrices whose factors are rounded to so many significant bits."""

    def alter(model: Reference, _: str) -> Reference:
        return _as(_Multiplied, model, bits=bits, products=products)

    return alter


@dataclass(kw_only=True)
class _Multiplied(Reference):
    bits: int
    products: tuple[str, ...]

    def factor(self, x: np.ndarray, product: str) -> np.ndarray:
        return rounded(x, self.bits) if product in self.products else x


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest numbers of so many significant bits, ties to even."""
    significand, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(significand, bits)), exponent - bits)


def _as(kind: type[Reference], model: Reference, **options: Any) -> Reference:
    """The same model in a class that alters it."""
    same = {each.name: getattr(model, each.name) for each in fields(Reference) if each.init}
    return kind(**same, **options)


def _next_power(config: ALiBiConfig) -> np.ndarray:
    """The slopes of the next power of two."""
    return slopes(2 ** math.ceil(math.log2(config.num_heads)), config.bias_max)


def _every_other_first(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[1::2], values[::2]])


# The tables: what is wrong, the kinds of tensors where they differ, and the alteration.

_SCALES: tuple[tuple[str, _Changes], ...] = (
    (
        "the attention scale is missing: q·k is not divided by sqrt(head_dim)",
        lambda _: {"attention_scale": 1.0},
    ),
    (
        "the attention scale is applied twice",
        lambda config: {"attention_scale": config.scale**2},
    ),
    (
        "q·k is divided by sqrt(head_dim) whatever the configuration says",
        lambda _: {"attention_scale": None},
    ),
    (
        "q·k is divided by sqrt(d_model)",
        lambda config: {"attention_scale": 1 / math.sqrt(config.d_model)},
    ),
)
_SLOPES: tuple[tuple[str, _Slopes], ...] = (
    ("the attention scale multiplies the bias, too", lambda m, config: m * config.scale),
    ("the slopes are zero: there is no bias", lambda m, _: 0 * m),
    ("the slopes have the wrong sign: far keys are rewarded", lambda m, _: -m),
    ("the slopes of the heads are reversed", lambda m, _: m[::-1]),
    ("the slopes are shifted by one head: each has the next one's", lambda m, _: np.roll(m, -1)),
    ("the slopes are shifted by one head: each has the last one's", lambda m, _: np.roll(m, 1)),
    ("the slopes are the paper's with exponent 8", lambda _, config: slopes(config.num_heads)),
    (
        "the slopes are one geometric sequence, right only for a power of two of heads",
        lambda _, config: geometric_slopes(config.num_heads, config.bias_max),
    ),
    (
        "the slopes are the first of those of the next power of two of heads",
        lambda _, config: _next_power(config)[: config.num_heads],
    ),
    (
        "the slopes are those of the next power of two of heads, every other one first",
        lambda _, config: _every_other_first(_next_power(config))[: config.num_heads],
    ),
    *(
        (f"the slopes are multiplied by {words}", lambda m, _, factor=factor: factor * m)
        for words, factor in (
            *(("2", 2.0), ("1/2", 0.5), ("4", 4.0), ("1/4", 0.25), ("8", 8.0), ("1/8", 0.125)),
            *(("log2(e)", math.log2(math.e)), ("ln(2)", math.log(2))),
        )
    ),
)
_LAYOUTS: tuple[tuple[str, _Alter], ...] = (
    (
        "query, key and value are interleaved head by head, but read as one after the other",
        _fused(_grouped_for_interleaved),
    ),
    (
        "query, key and value follow one another, but are read as interleaved head by head",
        _fused(_interleaved_for_grouped),
    ),
    (
        "heads and their channels are exchanged in query, key and value",
        _fused(_channels_first),
    ),
    *(
        (f"{first} and {second} are exchanged", _exchanged(f"attn.{first}", f"attn.{second}"))
        for first, second in itertools.combinations(("query", "key", "value"), 2)
    ),
    *(
        (f"the matrix of attn.{name} is transposed", _transposed(f"attn.{name}"))
        for name in ("query", "key", "value", "output")
    ),
    (
        "the matrices of query, key and value are transposed",
        _transposed("attn.query", "attn.key", "attn.value"),
    ),
)
_OPTIONS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("the embedding norm is missing", ("embedding",), {"embedding_norm": False}),
    ("the embedding scale is missing", ("embedding",), {"embedding_scale": 1.0}),
    ("there is no causal mask", _ATTENTION, {"causal": False}),
    ("there is a causal mask, in an encoder", _ATTENTION, {"causal": True}),
    *(
        (f"distances are those of distance={distance!r}", _ATTENTION, {"distance": distance})
        for distance in DISTANCES
    ),
    ("queries, keys and values are not clipped", _ATTENTION, {"qkv_clip": None}),
    ("queries and keys are not normalised", _ATTENTION, {"qk_norm": False}),
    ("attention's linear maps have no biases", _ATTENTION, {"attention_bias": False}),
    ("the feed-forward layers have no biases", ("ffn",), {"ffn_bias": False}),
    *(
        (f"the activation is {activation}", ("ffn", "logits"), {"activation": activation})
        for activation in ACTIVATIONS
    ),
    *(
        (f"the epsilon of the norms is {eps:g}", EVERY_KIND, {"norm_eps": eps})
        for eps in (1e-5, 1e-6, 1e-12, 1e-8, 1e-3)
    ),
    ("the norms do not remove the mean", EVERY_KIND, {"norm": "rms", "norm_bias": False}),
    ("the norms have no biases", EVERY_KIND, {"norm_bias": False}),
    ("the final norm is missing", ("output",), {"final_norm": False}),
    ("the logit scale is missing", ("logits",), {"logit_scale": 1.0}),
)

# In this order causes are named that cannot be told apart.
EXPLANATIONS: tuple[Explanation, ...] = (
    *(Explanation(words, _ATTENTION, _configured(changes)) for words, changes in _SCALES),
    *(Explanation(words, _ATTENTION, _sloped(change)) for words, change in _SLOPES),
    Explanation("the slopes are not interpolated", _ATTENTION, _uninterpolated),
    Explanation("the attention mask is ignored: padding is seen", _ATTENTION, _unmasked),
    Explanation("the causal mask shows each query one later key", _ATTENTION, _hiding(2)),
    Explanation("the causal mask hides each query's own position", _ATTENTION, _hiding(0)),
    *(Explanation(words, _ATTENTION, alter) for words, alter in _LAYOUTS),
    *(
        Explanation(words, kinds, _configured(lambda _, changes=changes: changes))
        for words, kinds, changes in _OPTIONS
    ),
    *(
        Explanation(
            f"the norms are placed as by norm_placement={placement!r}", _BLOCK, _placed(placement)
        )
        for placement in NORM_PLACEMENTS
    ),
    *(
        Explanation(f"the matrix of ffn.{name} is transposed", ("ffn",), _transposed(f"ffn.{name}"))
        for name in ("fc1", "fc2", "gate")
    ),
    Explanation("ffn.fc1 and ffn.gate are exchanged", ("ffn",), _exchanged("ffn.fc1", "ffn.gate")),
    Explanation("the matrix of the head is transposed", ("logits",), _transposed("lm_head")),
    *(
        Explanation(f"the parameters are rounded to {dtype}", EVERY_KIND, _rounded_to(dtype))
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Explanation(
            f"the factors of {where} are rounded to {name}",
            (*_BLOCK, "logits"),
            _multiplied(bits, *products),
        )
        for name, bits in (("bfloat16", 8), ("TF32", 11))
        for where, products in (
            ("all matrix products", ("linear", "attention")),
            ("linear maps", ("linear",)),
            ("attention's products", ("attention",)),
        )
    ),
)
