"""The cases: configurations and drawn inputs; the reference says what is expected of them.

Every input is a small integer over a power of two: the same bits on every machine, and no rounding
in bfloat16 or float16. What is expected is computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from alibi_spec.config import ALiBiConfig
from alibi_spec.conformance.files import Case
from alibi_spec.conformance.levels import LEVELS
from alibi_spec.conformance.reference import Reference
from alibi_spec.parameters import parameter_table
from alibi_spec.training import Recipe, next_token_targets

Array = np.ndarray
Arrays = Mapping[str, np.ndarray]

BATCH, SEQ, VOCAB = 2, 14, 23
LONG = 300  # past 256, where bfloat16 stops counting


def _config(**options: Any) -> ALiBiConfig:
    return ALiBiConfig.from_dict({"dropout": 0.0, "norm_eps": 2.0**-10} | options)


def _heads(num_heads: int, head_dim: int = 3, **options: Any) -> ALiBiConfig:
    """One layer of attention."""
    width = num_heads * head_dim
    return _config(num_layers=1, num_heads=num_heads, d_model=width, **options)


_JAKETAE = {"num_layers": 2, "d_model": 12, "num_heads": 3, "dropout": 0.0}
_LM = {"num_layers": 2, "vocab_size": VOCAB}
_TINY = {"num_layers": 1, "d_model": 6, "num_heads": 3, "vocab_size": 7}  # for gradients
_BLOOM = {
    "activation": "gelu_tanh",
    "embedding_norm": True,
    "tie_embeddings": True,
    "expansion_factor": 2,
}
_MPT = {
    "attention_bias": False,
    "ffn_bias": False,
    "norm_bias": False,
    "bias_max": 6.0,
    "expansion_factor": 2,
}

ATTENTION = {  # configuration, queries, keys, padded
    "powers-of-two": (_heads(8, 4), 12, 12, True),
    "far-keys": (_heads(4, 4), 2, LONG, False),
    "odd-heads": (_heads(5), 10, 10, True),
    "far-keys-odd-heads": (_heads(7, 2), 2, LONG, True),
    "grouped-heads": (_heads(6, num_kv_heads=2), 9, 11, True),
    "encoder": (_heads(3, causal=False), 11, 11, True),
    "largest-exponent": (_heads(3, bias_max=16.0), 7, 7, False),
    "own-scale-and-slopes": (
        _heads(3, attention_scale=0.25, slopes=(0.75, 0.0, 0.125)),
        *(7, 7, False),
    ),
    "learned-slopes": (_heads(3, slopes="learned"), 8, 8, True),
    "interpolated-slopes": (_heads(3, slope_interpolation=8), 4, 20, True),
    "jaketae": (ALiBiConfig.jaketae(**_JAKETAE | {"num_layers": 1}), 9, 9, True),
    "jaketae-encoder": (
        ALiBiConfig.jaketae(**_JAKETAE | {"num_layers": 1}, causal=False),
        *(9, 9, True),
    ),
    "falcon-rw": (_heads(3, distance="bfloat16"), 2, LONG, True),
}
_EXACT = ("powers-of-two", "far-keys")  # every slope and the scale is a power of two
# Softmax knows nothing of slopes: these differ in what it sees.
_ATTENDED = ("powers-of-two", "far-keys-odd-heads", "grouped-heads", "encoder", "learned-slopes")

MODELS = {  # configuration, padded
    "jaketae": (ALiBiConfig.jaketae(**_JAKETAE), False),
    "jaketae-encoder": (ALiBiConfig.jaketae(**_JAKETAE, causal=False), True),
    "odd-heads": (_config(**_LM, d_model=10, num_heads=5, expansion_factor=2), True),
    "bloom-like": (_config(**_LM, **_BLOOM, d_model=12, num_heads=3), True),
    "mpt-like": (
        _config(**_LM, **_MPT, d_model=12, num_heads=6, num_kv_heads=2, qkv_clip=1.5),
        True,
    ),
    "learned-slopes": (
        _config(**_LM, d_model=12, num_heads=3, slopes="learned", tie_embeddings=False),
        True,
    ),
    "gated-rms": (
        _config(
            **_LM | {"num_layers": 1},
            **{"d_model": 12, "num_heads": 3, "feed_forward_dim": 18, "gated_ffn": True},
            **{"norm": "rms", "norm_bias": False, "activation": "silu"},
        ),
        False,
    ),
}
GRADIENTS = {
    "jaketae": ALiBiConfig.jaketae(num_layers=2, d_model=6, num_heads=3, dropout=0.0),
    "bloom-like": _config(**_TINY, **_BLOOM),
    "mpt-like": _config(**_TINY, **_MPT, num_kv_heads=1),
    "learned-slopes": _config(**_TINY, slopes="learned", causal=False),
}
CACHES = {  # configuration, lengths of the parts, padding on the left and on the right
    "padded-prompts": (
        _config(**_LM, d_model=10, num_heads=5),
        *((8, 1, 1, 1, 1), ((0, 0, 3), (1, 6, 8))),
    ),
    "chunks": (
        _config(**_LM, **_MPT, d_model=12, num_heads=6, num_kv_heads=2),
        *((5, 4, 1, 3, 1, 1), ((0, 0, 7),)),
    ),
    "far-keys": (
        _config(**_TINY | {"d_model": 12}, **_BLOOM),
        *((LONG - 6, 1, 1, 1, 1, 1, 1), ((1, 0, 40),)),
    ),
    "learned-slopes": (
        _config(**_LM | {"num_layers": 1}, d_model=12, num_heads=3, slopes="learned"),
        *((6, 1, 1, 1), ()),
    ),
}
_RECIPE = Recipe(steps=8, batch_size=BATCH, learning_rate=0.02, warmup_steps=2)
STEPS = {  # configuration, recipe, updates so far
    "clipped": (
        _config(**_TINY, **_BLOOM),
        Recipe.from_dict(_RECIPE.to_dict() | {"max_grad_norm": 0.125}),
        3,
    ),
    "all-decay": (
        _config(**_TINY, slopes="learned", tie_embeddings=False),
        Recipe.from_dict(
            _RECIPE.to_dict() | {"decay": "all", "schedule": "linear", "max_grad_norm": None}
        ),
        1,
    ),
}
SAMPLING = {
    "temperature": {"temperature": 0.75},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.75},
    "min-p-and-penalty": {"min_p": 0.125, "repetition_penalty": 1.5},
    "everything": {
        **{"temperature": 1.5, "top_k": 12, "top_p": 0.9375, "min_p": 0.03125},
        **{"repetition_penalty": 0.75},
    },
}
SEEDS = {"small": 7, "beyond-63-bits": 2**64 - 2}
CONVERSIONS = {"mpt-like": GRADIENTS["mpt-like"], "learned-slopes": STEPS["all-decay"][0]}


def all_cases(levels: Iterable[str] = tuple(LEVELS)) -> Iterator[Case]:
    """The cases of these levels, with what the reference returns for them."""
    wanted = set(levels)
    return (_answered(case) for case in _asked() if case.level in wanted)


def _answered(case: Case) -> Case:
    function, result, _ = LEVELS[case.level]
    returned = getattr(Reference(), function)(**case.arguments)
    arrays = returned if result is None else {result: returned}
    return replace(case, expected={name: _stored(array) for name, array in arrays.items()})


def _asked() -> Iterator[Case]:
    for name, (config, query_len, key_len, padded) in ATTENTION.items():
        inputs = _attention_inputs(name, config, query_len, key_len, padded)
        budget = "exact" if name in _EXACT else "forward"
        shows = f"{query_len} queries and {key_len} keys, {_padding(padded)}"
        yield _case("bias", name, shows, budget, inputs, config)
    for name in _ATTENDED:
        config, query_len, key_len, padded = ATTENTION[name]
        inputs = _attention_inputs(name, config, query_len, key_len, padded)
        inputs["value"] = _drawn(f"{name} value", inputs["key"].shape, 8, 2.0**-2)
        shows = f"{query_len} queries and {key_len} keys, {_padding(padded)}"
        yield _case("attention", name, shows, "forward", inputs, config)
    for name, (config, padded) in MODELS.items():
        inputs = _parameters(config) | _inputs(name, config, (BATCH, SEQ))
        if padded:
            inputs["attention_mask"] = _mask((BATCH, SEQ), ((0, 0, 5), (1, 11, SEQ)))
        yield _case("model", name, f"every layer, {_padding(padded)}", "forward", inputs, config)
    for name, config in GRADIENTS.items():
        inputs = _parameters(config) | _inputs(name, config, (BATCH, 7))
        inputs["attention_mask"] = _mask((BATCH, 7), ((0, 0, 2), (1, 6, 7)))
        inputs["cotangent"] = _drawn(f"{name} cotangent", (BATCH, 7, config.output_dim), 8, 0.125)
        shows = f"every parameter, {_padding(True)}"
        yield _case("gradients", name, shows, "gradient", inputs, config)
    for name, (config, lengths, padding) in CACHES.items():
        inputs = _parameters(config) | _inputs(name, config, (BATCH, sum(lengths)))
        if padding:
            inputs["attention_mask"] = _mask((BATCH, sum(lengths)), padding)
        shows = f"parts of {', '.join(map(str, lengths))} tokens"
        yield _case("cache", name, shows, "forward", inputs, config, lengths=list(lengths))
    for name, (config, recipe, step) in STEPS.items():
        options = {"recipe": recipe.to_dict(), "step": step}
        shows, inputs = f"update {step + 1}", _step_inputs(name, config)
        yield _case("training", name, shows, "training", inputs, config, **options)
    for name, sampling in SAMPLING.items():
        shows, options = "rows with and without ties", {"do_sample": True} | sampling
        yield _case("sampling", name, shows, "forward", _logits(), sampling=options)
    for name, seed in SEEDS.items():
        shows, options = "three rows of a batch, five steps", {"rows": 3, "steps": 5}
        yield _case("seeds", name, shows, "exact", {}, None, seed=seed, **options)
    for name, config in CONVERSIONS.items():
        shows = "every element has a number of its own"
        yield _case("conversion", name, shows, "exact", _numbered(config), config)


def _case(
    level: str,
    name: str,
    shows: str,
    budget: str,
    inputs: Arrays,
    config: ALiBiConfig | None = None,
    **options: Any,
) -> Case:
    if config is not None:
        options = {"config": config.to_dict()} | options
    return Case(level, name, shows, budget, options, inputs, expected={})


def _stored(array: Array) -> Array:
    """float32, or int64; without axes for a single number."""
    array = np.asarray(array)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)


def _drawn(what: str, shape: tuple[int, ...], largest: int, unit: float) -> Array:
    """Integers from -largest to largest, times `unit`; they depend on `what` and `shape` alone."""
    key = np.array([zlib.crc32(what.encode()), 0], np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key)).random(shape)
    return ((np.floor(uniform * (2 * largest + 1)) - largest) * unit).astype(np.float32)


def _drawn_tokens(what: str, shape: tuple[int, int], vocab_size: int) -> Array:
    centred = _drawn(what, shape, vocab_size, 1.0).astype(np.int64)
    return centred % vocab_size


def _parameters(config: ALiBiConfig, prefix: str = "parameters") -> dict[str, Array]:
    """Far from initial values: no zero bias, no unit norm, a slope that rewards far keys."""
    drawn = {}
    for row in parameter_table(config):
        if row.init == "slopes":
            values = np.abs(_drawn(row.name, row.shape, 64, 2.0**-7)) + np.float32(2.0**-5)
            values[1] = -(2.0**-6)
        elif row.init == "ones":
            values = 1 + _drawn(row.name, row.shape, 8, 2.0**-4)
        elif row.init == "zeros":
            values = _drawn(row.name, row.shape, 8, 2.0**-4)
        else:  # a variance of about 1 / fan-in keeps activations near one
            unit = 2.0 ** -round(math.log2(5 * math.sqrt(row.shape[-1])))
            values = _drawn(row.name, row.shape, 8, unit)
        drawn[f"{prefix}/{row.name}"] = values.astype(np.float32)
    return drawn


def _inputs(name: str, config: ALiBiConfig, shape: tuple[int, int]) -> dict[str, Array]:
    """Tokens, or embeddings with a mean that fast formulas of the variance stumble over."""
    if config.vocab_size is None:
        return {"inputs": 3 + _drawn(f"{name} inputs", (*shape, config.d_model), 8, 2.0**-2)}
    return {"inputs": _drawn_tokens(f"{name} inputs", shape, config.vocab_size)}


def _attention_inputs(
    name: str, config: ALiBiConfig, query_len: int, key_len: int, padded: bool
) -> dict[str, Array]:
    query = (BATCH, config.num_heads, query_len, config.head_dim)
    key = (BATCH, config.kv_heads, key_len, config.head_dim)
    inputs = {
        "query": _drawn(f"{name} query", query, 8, 2.0**-2),
        "key": _drawn(f"{name} key", key, 8, 2.0**-2),
    }
    if config.slopes == "learned":
        inputs["slopes"] = np.array([0.5, -(2.0**-6), 0.15625], np.float32)
    if padded:
        padding = ((0, 0, key_len // 3), (1, key_len - key_len // 4, key_len))
        inputs["attention_mask"] = _mask((BATCH, key_len), padding)
    return inputs


def _mask(shape: tuple[int, int], padding: tuple[tuple[int, int, int], ...]) -> Array:
    mask = np.ones(shape, np.int64)
    for row, start, end in padding:
        mask[row, start:end] = 0
    return mask


def _padding(padded: bool) -> str:
    return "padded on the left and on the right" if padded else "without padding"


def _step_inputs(name: str, config: ALiBiConfig) -> dict[str, Array]:
    """As in the middle of training: AdamW's first step would show the signs of gradients alone."""
    moments = _parameters(config, "mean")
    inputs = _parameters(config) | {path: array / 16 for path, array in moments.items()}
    for path, array in moments.items():
        inputs[path.replace("mean/", "mean_square/", 1)] = array**2 / 32 + np.float32(2.0**-8)
    tokens = _drawn_tokens(f"{name} inputs", (BATCH, 8), 7)
    mask = _mask((BATCH, 8), ((0, 0, 2), (1, 6, 8)))
    targets = next_token_targets(tokens, attention_mask=mask)
    return inputs | {"inputs": tokens, "attention_mask": mask, "targets": targets}


def _logits() -> dict[str, Array]:
    logits = _drawn("logits", (6, VOCAB), 64, 2.0**-4)
    logits[3:] = np.round(logits[3:])  # many ties
    return {
        "logits": logits,
        "is_there": _drawn("is there", (6, VOCAB), 8, 1.0) > 4,
        "uniform": np.abs(_drawn("uniform", (6,), 127, 2.0**-7)),
    }


def _numbered(config: ALiBiConfig) -> dict[str, Array]:
    numbered, first = {}, 0
    for row in parameter_table(config):
        size = math.prod(row.shape)
        values = np.arange(first, first + size, dtype=np.float32)
        numbered[f"parameters/{row.name}"] = values.reshape(row.shape)
        first += size
    return numbered
