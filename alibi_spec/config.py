"""ALiBiConfig: every architectural choice in one frozen, validated record (SPEC.md §1)."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

from alibi_spec.bias import DISTANCES, SLOPE_RULES

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post", "pre_residual")
HEADS = ("linear", "masked_lm", "none")


# What other libraries call our fields, where the nearest spelling is another one.
_ELSEWHERE = {
    "hidden_size": "d_model",
    "n_embd": "d_model",
    "n_embed": "d_model",
    "embed_dim": "d_model",
    "dim": "d_model",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_len",
    "max_seq_len": "max_len",
    "intermediate_size": "feed_forward_dim",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "is_causal": "causal",
}


def _naming_unknown_fields(config_class: type[ALiBiConfig]) -> type[ALiBiConfig]:
    """Have the constructor say which field was meant; Python's own error does not."""
    make = config_class.__init__

    @functools.wraps(make)
    def init(self: ALiBiConfig, *values: Any, **fields: Any) -> None:
        _refuse_unknown(fields)
        make(self, *values, **fields)

    config_class.__init__ = init
    return config_class


@_naming_unknown_fields
@dataclass(frozen=True)
class ALiBiConfig:
    """What a model computes, independent of framework, dtype and device.

    The first seven fields and their defaults are those of jaketae/alibi; the mathematics is that of
    Press et al. 2021. `ALiBiConfig.jaketae` restores that repository's own mathematics. Fields from
    `num_kv_heads` on are what the published families need beyond it.

    Attributes:
        num_layers: residual blocks, at least 1.
        d_model: width of the residual stream; a multiple of `num_heads`.
        num_heads: attention heads, any number.
        max_len: longest sequence seen in training. A record only: longer sequences simply work.
        dropout: rate on the output of each residual branch, in [0, 1).
        causal: True for a decoder, False for an encoder.
        expansion_factor: hidden width of the feed-forward layers over `d_model`.
        vocab_size: tokens known to an `ALiBiLM`; None describes a bare `ALiBiTransformer`.
        tie_embeddings: the head of an `ALiBiLM` is its token embedding.
        slopes: "paper" (Press et al. 2021), "geometric" (jaketae/alibi), one float per head, one
            such tuple per layer, or "learned": a parameter of each layer that starts as "paper".
        bias_max: the exponent M of the paper's slopes 2^(-M k / heads).
        distance: "absolute" biases by -m |i - j|; "signed" by m (j - i), also for future keys;
            "bfloat16" by scale · m j with m and the product rounded to bfloat16 (Falcon-RW).
        attention_scale: factor on q·k; None is 1/sqrt(head_dim).
        attention_dropout: rate on the attention probabilities; None is `dropout`.
        attention_bias: the query, key, value and output projections have biases.
        output_projection: attention ends in a linear map.
        final_norm: a norm follows the last block.
        norm_eps: epsilon inside every norm.
        init_std: standard deviation of initial weights.
        num_kv_heads: heads of keys and values, each shared by a group of query heads; None is
            `num_heads`.
        slope_interpolation: sequences of n positions, more than this many, use slopes m · this / n.
        qkv_clip: queries, keys and values are clamped to ± this.
        qk_norm: a norm over the full width of queries and of keys.
        feed_forward_dim: hidden width of the feed-forward layers; None is
            `d_model` · `expansion_factor`.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        gated_ffn: the activation of a third linear map multiplies the hidden units.
        ffn_bias: the feed-forward layers have biases.
        norm: "layer" or "rms" (no mean, no bias).
        norm_bias: LayerNorms have biases.
        norm_placement: "pre" normalises what enters a branch; "post" the sum behind it (BERT);
            "pre_residual" what enters the branch and the residual stream (BLOOM's option).
        attention_output_norm: attention's input is added to its output, and normalised, before
            that joins the residual stream (Jina's code model).
        embedding_norm: a norm follows the embedding.
        embedding_scale: factor on token embeddings.
        embedding_dropout: rate on what enters the first block.
        type_vocab_size: number of token types, whose embeddings are added; None is none.
        head: of an `ALiBiLM`: "linear", "masked_lm" (linear map, activation, norm, then the tied
            embedding and a bias) or "none" (hidden states).
        logit_scale: factor on the logits.
        adaptive_cutoffs: ends of all clusters of the vocabulary but the last; the logits are then
            the log-probabilities of an adaptive softmax. None is an ordinary head.

    Raises:
        ValueError: a field has an impossible value, or there is none of that name; the message
            names it and the mend.
    """

    num_layers: int = 6
    d_model: int = 256
    num_heads: int = 8
    max_len: int = 256
    dropout: float = 0.1
    causal: bool = True
    expansion_factor: int = 1
    vocab_size: int | None = None
    tie_embeddings: bool = True
    slopes: str | tuple[float, ...] | tuple[tuple[float, ...], ...] = "paper"
    bias_max: float = 8.0
    distance: str = "absolute"
    attention_scale: float | None = None
    attention_dropout: float | None = None
    attention_bias: bool = True
    output_projection: bool = True
    final_norm: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    num_kv_heads: int | None = None
    slope_interpolation: int | None = None
    qkv_clip: float | None = None
    qk_norm: bool = False
    feed_forward_dim: int | None = None
    activation: str = "gelu"
    gated_ffn: bool = False
    ffn_bias: bool = True
    norm: str = "layer"
    norm_bias: bool = True
    norm_placement: str = "pre"
    attention_output_norm: bool = False
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    type_vocab_size: int | None = None
    head: str = "linear"
    logit_scale: float = 1.0
    adaptive_cutoffs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("slopes", "adaptive_cutoffs"):
            object.__setattr__(self, name, _plain_tuple(getattr(self, name)))
        for name, (is_valid, expected) in _FIELD_RULES.items():
            value = _plain(getattr(self, name))
            if not is_valid(value):
                raise ValueError(f"{name}={value!r} is not valid; expected {expected}")
            object.__setattr__(self, name, value)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                f"choose num_heads among the divisors of d_model (e.g. {_nearest_divisor(self)})"
            )
        if isinstance(self.slopes, tuple):
            self._check_slopes(self.slopes)
        for is_wrong, problem in self._contradictions():
            if is_wrong:
                raise ValueError(problem)

    def _check_slopes(self, slopes: tuple[Any, ...]) -> None:
        if not isinstance(slopes[0], tuple):
            slopes = (slopes,)
        elif len(slopes) != self.num_layers:
            raise ValueError(
                f"slopes has {len(slopes)} tuples for num_layers={self.num_layers}; "
                "give one tuple per layer"
            )
        for row in slopes:
            if len(row) != self.num_heads:
                raise ValueError(
                    f"slopes has {len(row)} values for num_heads={self.num_heads}; "
                    "give one slope per head"
                )

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """Fields that are valid alone and impossible together."""
        yield (
            self.num_heads % self.kv_heads != 0,
            f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
        )
        yield (
            self.norm == "rms" and self.norm_bias,
            "norm='rms' has no bias; set norm_bias=False",
        )
        yield (
            self.norm_placement == "post" and self.final_norm,
            "norm_placement='post' ends in a norm already; set final_norm=False",
        )
        yield (
            self.head == "masked_lm" and not self.tie_embeddings,
            "head='masked_lm' ends in the token embedding; set tie_embeddings=True",
        )
        cutoffs = self.adaptive_cutoffs
        if cutoffs is not None and self.vocab_size is not None:
            yield (
                not all(a < b for a, b in itertools.pairwise((0, *cutoffs, self.vocab_size))),
                f"adaptive_cutoffs={cutoffs} do not rise from 0 to vocab_size={self.vocab_size}",
            )
            yield self.head != "linear", f"adaptive_cutoffs need head='linear', not {self.head!r}"

    @classmethod
    def jaketae(cls, **overrides: Any) -> ALiBiConfig:
        """The exact mathematics of jaketae/alibi (SPEC.md §7); `overrides` as for `ALiBiConfig`.

        Scores are divided by sqrt(d_model), slopes are one geometric sequence for any head count,
        encoders reward future keys, and there is neither output projection nor final norm nor
        dropout on probabilities.

        Raises:
            ValueError: as for `ALiBiConfig`.
        """
        d_model = overrides.get("d_model", cls.d_model)
        quirks: dict[str, Any] = {
            "slopes": "geometric",
            "distance": "signed",
            "attention_dropout": 0.0,
            "attention_bias": False,
            "output_projection": False,
            "final_norm": False,
        }
        if _is_count(d_model):  # otherwise the constructor says what is wrong with it
            quirks["attention_scale"] = 1 / math.sqrt(d_model)
        return cls.from_dict(quirks | overrides)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layers."""
        if self.feed_forward_dim is None:
            return self.d_model * self.expansion_factor
        return self.feed_forward_dim

    @property
    def output_dim(self) -> int:
        """Width of what the model returns: the vocabulary, or `d_model` for hidden states."""
        if self.vocab_size is None or self.head == "none":
            return self.d_model
        return self.vocab_size

    @property
    def scale(self) -> float:
        """The factor on q·k (SPEC.md §3)."""
        return (
            1 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale
        )

    @property
    def probability_dropout(self) -> float:
        """Dropout rate on the attention probabilities."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of initial weights that write to the residual stream (SPEC.md §6)."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values."""
        return {name: _as_list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ALiBiConfig:
        """The inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ValueError: an unknown field (the nearest known one is named) or an invalid value.
        """
        _refuse_unknown(values)
        return cls(**values)

    def to_json(self) -> str:
        """Every field as an indented JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ALiBiConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a JSON object, an unknown field or an invalid value.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the configuration is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"the configuration is a JSON {type(values).__name__}, not an object")
        return cls.from_dict(values)


def _refuse_unknown(names: Iterable[Any]) -> None:
    known = [field.name for field in fields(ALiBiConfig)]
    for name in names:
        if name not in known:
            nearest = [_ELSEWHERE[name]] if name in _ELSEWHERE else None
            nearest = nearest or difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown option {name!r} in the configuration{hint}")


def _plain_tuple(values: Any) -> Any:
    """Lists, arrays and tuples, also of one another, as tuples of plain numbers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return _plain(values)
    return tuple(map(_plain_tuple, values))


def _as_list(value: Any) -> Any:
    return list(map(_as_list, value)) if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which have no dtype to leak into a model."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool | int) else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 2.0**100  # well inside float32; NaN is not


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_cutoffs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_is_count, value))


def _is_slopes(value: Any) -> bool:
    if isinstance(value, str):
        return value in SLOPE_RULES
    if not isinstance(value, tuple) or not value:
        return False
    if all(isinstance(row, tuple) for row in value):
        return all(row and all(map(_is_slope, row)) for row in value)
    return all(map(_is_slope, value))


def _is_slope(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"one of {choices}"


def _nearest_divisor(config: ALiBiConfig) -> int:
    nearby = range(max(1, config.num_heads - 1000), config.num_heads + 1000)
    divisors = [n for n in nearby if config.d_model % n == 0]
    return min(divisors, key=lambda n: abs(n - config.num_heads), default=1)


_COUNT = (_is_count, "an integer of at least 1")
_RATE = (_is_rate, "a number in [0, 1)")
_FLAG = (lambda value: isinstance(value, bool), "True or False")
_POSITIVE = (_is_positive, "a number above 0")
_COUNT_OR_NONE = (_or_none(_is_count), "None or an integer of at least 1")
_POSITIVE_OR_NONE = (_or_none(_is_positive), "None or a number above 0")

_FIELD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_layers": _COUNT,
    "d_model": _COUNT,
    "num_heads": _COUNT,
    "max_len": _COUNT,
    "dropout": _RATE,
    "causal": _FLAG,
    "expansion_factor": _COUNT,
    "vocab_size": _COUNT_OR_NONE,
    "tie_embeddings": _FLAG,
    "slopes": (
        _is_slopes,
        f"one of {SLOPE_RULES}, one finite number >= 0 per head, or one such tuple per layer",
    ),
    "bias_max": (lambda value: _is_positive(value) and value <= 100, "a number in (0, 100]"),
    "distance": _one_of(DISTANCES),
    "attention_scale": _POSITIVE_OR_NONE,
    "attention_dropout": (_or_none(_is_rate), "None or a number in [0, 1)"),
    "attention_bias": _FLAG,
    "output_projection": _FLAG,
    "final_norm": _FLAG,
    "norm_eps": _POSITIVE,
    "init_std": _POSITIVE,
    "num_kv_heads": _COUNT_OR_NONE,
    "slope_interpolation": _COUNT_OR_NONE,
    "qkv_clip": _POSITIVE_OR_NONE,
    "qk_norm": _FLAG,
    "feed_forward_dim": _COUNT_OR_NONE,
    "activation": _one_of(ACTIVATIONS),
    "gated_ffn": _FLAG,
    "ffn_bias": _FLAG,
    "norm": _one_of(NORMS),
    "norm_bias": _FLAG,
    "norm_placement": _one_of(NORM_PLACEMENTS),
    "attention_output_norm": _FLAG,
    "embedding_norm": _FLAG,
    "embedding_scale": _POSITIVE,
    "embedding_dropout": _RATE,
    "type_vocab_size": _COUNT_OR_NONE,
    "head": _one_of(HEADS),
    "logit_scale": _POSITIVE,
    "adaptive_cutoffs": (_or_none(_is_cutoffs), "None or rising integers of at least 1"),
}
