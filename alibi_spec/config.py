"""ALiBiConfig: every architectural choice in one frozen, validated record (SPEC.md §1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alibi_spec.biases import DISTANCES, default_scale
from alibi_spec.options import (
    COUNT,
    CUTOFFS,
    EXPONENT,
    FLAG,
    POSITIVE,
    RATE,
    SLOPES,
    Options,
    is_count,
    one_of,
    option,
    or_none,
    with_options_documented,
)

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post", "pre_residual")
HEADS = ("linear", "masked_lm", "none")


# Names of our fields in other libraries, where the nearest spelling is a wrong field.
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


@with_options_documented
@dataclass(frozen=True)
class ALiBiConfig(Options):
    """What a model computes, independent of framework, dtype and device.

    The first seven fields and their defaults are those of jaketae/alibi; the mathematics is that of
    Press et al. 2021. `ALiBiConfig.jaketae` restores that repository's own mathematics. The
    published families need the fields from `num_kv_heads` on.

    `help(ALiBiConfig)` lists the options. An option that follows another is None unless it differs,
    so that equal models have equal configurations.

    Raises:
        ValueError: an unknown field, or a field with an impossible value; the message names it and
            the fix.
    """

    KIND: ClassVar[str] = "configuration"
    ELSEWHERE: ClassVar[Mapping[str, str]] = _ELSEWHERE

    num_layers: int = option(6, COUNT, "residual blocks, at least 1.")
    d_model: int = option(256, COUNT, "width of the residual stream; a multiple of `num_heads`.")
    num_heads: int = option(8, COUNT, "attention heads, any number.")
    max_len: int = option(
        256,
        COUNT,
        "longest sequence seen in training. A record only: longer sequences simply work.",
    )
    dropout: float = option(0.1, RATE, "rate on the output of each residual branch, in [0, 1).")
    causal: bool = option(True, FLAG, "True for a decoder, False for an encoder.")
    expansion_factor: int = option(
        1,
        COUNT,
        "hidden width of the feed-forward layers over `d_model`.",
    )
    vocab_size: int | None = option(
        None,
        or_none(COUNT),
        "tokens known to an `ALiBiLM`; None describes a bare `ALiBiTransformer`.",
    )
    tie_embeddings: bool = option(True, FLAG, "the head of an `ALiBiLM` is its token embedding.")
    slopes: str | tuple[float, ...] | tuple[tuple[float, ...], ...] = option(
        "paper",
        SLOPES,
        '"paper" (Press et al. 2021), "geometric" (jaketae/alibi), one float per head, one '
        'such tuple per layer, or "learned": a parameter of each layer that starts as '
        '"paper".',
    )
    bias_max: float = option(
        8.0,
        EXPONENT,
        "the exponent M of the paper's slopes 2^(-M k / heads).",
    )
    distance: str = option(
        "absolute",
        one_of(DISTANCES),
        '"absolute" biases by -m |i - j|; "signed" by m (j - i), also for future keys; '
        '"bfloat16" by scale · m j with m and the product rounded to bfloat16 (Falcon-RW).',
    )
    attention_scale: float | None = option(
        None,
        or_none(POSITIVE),
        "factor on q·k; None is 1/sqrt(head_dim).",
    )
    attention_dropout: float | None = option(
        None,
        or_none(RATE),
        "rate on the attention probabilities; None is `dropout`.",
    )
    attention_bias: bool = option(
        True,
        FLAG,
        "the query, key, value and output projections have biases.",
    )
    output_projection: bool = option(True, FLAG, "attention ends in a linear map.")
    final_norm: bool = option(True, FLAG, "a norm follows the last block.")
    norm_eps: float = option(1e-5, POSITIVE, "epsilon inside every norm.")
    init_std: float = option(0.02, POSITIVE, "standard deviation of initial weights.")
    num_kv_heads: int | None = option(
        None,
        or_none(COUNT),
        "heads of keys and values, each shared by a group of query heads; None is `num_heads`.",
    )
    slope_interpolation: int | None = option(
        None,
        or_none(COUNT),
        "sequences of n > this many positions use slopes m · this / n.",
    )
    qkv_clip: float | None = option(
        None,
        or_none(POSITIVE),
        "queries, keys and values are clamped to ± this.",
    )
    qk_norm: bool = option(False, FLAG, "a norm over the full width of queries and of keys.")
    feed_forward_dim: int | None = option(
        None,
        or_none(COUNT),
        "hidden width of the feed-forward layers; None is `d_model` · `expansion_factor`.",
    )
    activation: str = option(
        "gelu",
        one_of(ACTIVATIONS),
        '"gelu" (exact), "gelu_tanh", "relu" or "silu".',
    )
    gated_ffn: bool = option(
        False,
        FLAG,
        "the activation of a third linear map multiplies the hidden units.",
    )
    ffn_bias: bool = option(True, FLAG, "the feed-forward layers have biases.")
    norm: str = option("layer", one_of(NORMS), '"layer" or "rms" (no mean, no bias).')
    norm_bias: bool = option(True, FLAG, "LayerNorms have biases.")
    norm_placement: str = option(
        "pre",
        one_of(NORM_PLACEMENTS),
        '"pre" normalises the input of a branch; "post" the sum after it (BERT); '
        '"pre_residual" the input of both the branch and the sum (BLOOM\'s option).',
    )
    attention_output_norm: bool = option(
        False,
        FLAG,
        "the residual stream gets a norm of attention's input plus its output (Jina's code model).",
    )
    embedding_norm: bool = option(False, FLAG, "a norm follows the embedding.")
    embedding_scale: float = option(1.0, POSITIVE, "factor on token embeddings.")
    embedding_dropout: float = option(0.0, RATE, "rate on the input of the first block.")
    type_vocab_size: int | None = option(
        None,
        or_none(COUNT),
        "number of token types, whose embeddings are added; None is none.",
    )
    head: str = option(
        "linear",
        one_of(HEADS),
        'of an `ALiBiLM`: "linear", "masked_lm" (linear map, activation, norm, then the tied '
        'embedding and a bias) or "none" (hidden states).',
    )
    logit_scale: float = option(1.0, POSITIVE, "factor on the logits.")
    adaptive_cutoffs: tuple[int, ...] | None = option(
        None,
        or_none(CUTOFFS),
        "ends of all clusters of the vocabulary but the last; the logits are then the "
        "log-probabilities of an adaptive softmax. None is an ordinary head.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self._canonical():
            object.__setattr__(self, name, value)

    def _canonical(self) -> Iterator[tuple[str, Any]]:
        """Options whose values follow from others."""
        if self.num_kv_heads == self.num_heads:
            yield "num_kv_heads", None
        if self.attention_scale == default_scale(None, self.head_dim):
            yield "attention_scale", None
        if self.attention_dropout == self.dropout:
            yield "attention_dropout", None
        if self.feed_forward_dim is not None:
            factor, rest = divmod(self.feed_forward_dim, self.d_model)
            yield "expansion_factor", ALiBiConfig.expansion_factor if rest else factor
            yield "feed_forward_dim", self.feed_forward_dim if rest else None

    def _slope_contradictions(self, slopes: tuple[Any, ...]) -> Iterator[tuple[bool, str]]:
        rows = slopes if isinstance(slopes[0], tuple) else (slopes,)
        yield (
            rows is slopes and len(rows) != self.num_layers,
            f"slopes has {len(rows)} tuples for num_layers={self.num_layers}; "
            "pass one tuple per layer",
        )
        for row in rows:
            yield (
                len(row) != self.num_heads,
                f"slopes has {len(row)} values for num_heads={self.num_heads}; "
                "pass one slope per head",
            )

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        if self.d_model % self.num_heads:
            yield (
                True,
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                f"choose num_heads among the divisors of d_model (e.g. {_nearest_divisor(self)})",
            )
        if isinstance(self.slopes, tuple):
            yield from self._slope_contradictions(self.slopes)
        yield (
            self.slopes == "learned" and self.distance == "bfloat16",
            "slopes='learned' have no gradient through the rounding of distance='bfloat16'; choose "
            "fixed slopes or another distance",
        )
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
        if is_count(d_model):  # otherwise the constructor says what is wrong with it
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
        """Width of the model's output: the vocabulary, or `d_model` for hidden states."""
        if self.vocab_size is None or self.head == "none":
            return self.d_model
        return self.vocab_size

    @property
    def scale(self) -> float:
        """The factor on q·k (SPEC.md §3)."""
        return default_scale(self.attention_scale, self.head_dim)

    @property
    def probability_dropout(self) -> float:
        """Dropout rate on the attention probabilities."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of initial weights that write to the residual stream (SPEC.md §6)."""
        return self.init_std / math.sqrt(2 * self.num_layers)


def _nearest_divisor(config: ALiBiConfig) -> int:
    nearby = range(max(1, config.num_heads - 1000), config.num_heads + 1000)
    divisors = [n for n in nearby if config.d_model % n == 0]
    return min(divisors, key=lambda n: abs(n - config.num_heads), default=1)
