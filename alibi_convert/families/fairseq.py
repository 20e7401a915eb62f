"""The paper's own language models: checkpoints of its fairseq fork (Press et al. 2021).

A checkpoint is one pickle of options, parameters and training state; the vocabulary is in another
file. Options and parameters are those of fairseq's `transformer_lm` without ALiBi too: that it is
one with ALiBi is taken on trust, as the fork says nothing of it and adds its bias always.

Adaptive input keeps rare tokens in narrow bands, each with a projection to the model's width; an
adaptive softmax mirrors it. Both are multiplied out on import. The biases m · j of the fork, one
row for all queries, differ from -m (i - j) by what softmax ignores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Derived, Family, Fold, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only
from alibi_convert.rules import Row
from alibi_spec import ALiBiConfig

_LAYER, _OURS = "decoder.layers.{i}", "transformer.layers.{i}"
_EMBEDDING, _SOFTMAX = "decoder.embed_tokens", "decoder.adaptive_softmax"
_BLOCK = 2**14  # rows of an embedding multiplied out at a time


def _layer_rows() -> Iterator[Row]:
    for foreign, ours in {
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.output",
        "self_attn_layer_norm": "attn_norm",
        "fc1": "ffn.fc1",
        "fc2": "ffn.fc2",
        "final_layer_norm": "ffn_norm",  # of the layer, not of the model
    }.items():
        for leaf in ("weight", "bias"):
            yield Row(f"{_LAYER}.{foreign}.{leaf}", f"{_OURS}.{ours}.{leaf}")


_BODY_ROWS = (
    Row("decoder.layernorm_embedding.weight", "embedding_norm.weight"),
    Row("decoder.layernorm_embedding.bias", "embedding_norm.bias"),
    *_layer_rows(),
    Row("decoder.layer_norm.weight", "transformer.final_norm.weight"),
    Row("decoder.layer_norm.bias", "transformer.final_norm.bias"),
)
_PLAIN_ROWS = (
    Row(f"{_EMBEDDING}.weight", "token_embedding.weight"),
    *_BODY_ROWS,
    Row("decoder.output_projection.weight", "lm_head.weight"),
)

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _cutoffs(value: str | list[int] | None) -> tuple[int, ...] | None:
    """Ends of the bands, written "20000,60000"."""
    if value is None:
        return None
    return tuple(int(end) for end in (value.split(",") if isinstance(value, str) else value))


def _factor(value: float) -> float:
    if not value >= 1:
        raise ValueError("expected a number of at least 1")
    return float(value)


def _refine(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    for width in ("input_dim", "output_dim"):
        if fields.pop(width) not in (None, fields["d_model"]):
            raise ValueError(
                f"decoder_{width} is not decoder_embed_dim={fields['d_model']}; a map between the "
                "two cannot be honoured"
            )
    for layout in ("input_cutoffs", "input_factor", "softmax_factor"):
        del fields[layout]  # checked, and read again with the tensors
    if not fields.pop("unscaled"):
        fields["embedding_scale"] = math.sqrt(ALiBiConfig(**fields).d_model)
    return fields | {"embedding_dropout": fields["dropout"]}


_NO_NOISE = (0, 0.0, None)
_TABLE = KeyTable(
    family="fairseq",
    model_type="transformer_lm",
    architectures=(),
    lines=(
        Key("decoder_layers", "num_layers"),
        Key("decoder_embed_dim", "d_model"),
        Key("decoder_input_dim", "input_dim", default=None),
        Key("decoder_output_dim", "output_dim", default=None),
        Key("decoder_ffn_embed_dim", "feed_forward_dim", default=2048),
        Key("decoder_attention_heads", "num_heads"),
        Key("activation_fn", "activation", default="relu", read=_activation),
        Key("dropout", "dropout", default=0.1),
        Key("attention_dropout", "attention_dropout", default=0.0),
        Key("tokens_per_sample", "max_len", default=1024),
        Key("adaptive_softmax_cutoff", "adaptive_cutoffs", default=None, read=_cutoffs),
        Key("adaptive_softmax_factor", "softmax_factor", default=4, read=_factor),
        Key("adaptive_input_cutoff", "input_cutoffs", default=None, read=_cutoffs),
        Key("adaptive_input_factor", "input_factor", default=4, read=_factor),
        Key("layernorm_embedding", "embedding_norm", default=False),
        Key("no_scale_embedding", "unscaled", default=False),
        Only("decoder_normalize_before", (True,), "language models normalise before each branch"),
        Only("decoder_layers_to_keep", (None,), "layers would be left out"),
        Only("cross_self_attention", (False,), "there is no encoder to attend to"),
        Only("character_embeddings", (False,), "tokens are embedded whole"),
        Only("base_layers", _NO_NOISE, "mixtures of experts are another model"),
        Only("quant_noise_pq", _NO_NOISE, "it adds a linear map"),
        Neutral(
            (
                "adaptive_input",
                "share_decoder_input_output_embed",
                "tie_adaptive_proj",
                "tie_adaptive_weights",
            ),
            "layout of the tensors: read with them",
        ),
        Neutral(("no_decoder_final_norm",), "the tensors tell"),
        Neutral(
            ("decoder_learned_pos", "no_token_positional_embeddings"), "the fork adds no positions"
        ),
        Neutral(
            ("adaptive_softmax_dropout", "decoder_embed_path", "decoder_layerdrop"),
            "only training",
        ),
    ),
    implied={"norm_eps": 1e-5},
    refine=_refine,
)


def _unpickled(saved: Any) -> tuple[dict[str, Any], Any] | None:
    """The options and parameters of a fairseq checkpoint; None for other pickles."""
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        return None
    options = _options(saved)
    return (options, saved["model"]) if options else None


def _options(saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's options: `args` of older checkpoints, a section of `cfg` of newer ones."""
    if isinstance(saved.get("args"), argparse.Namespace):
        return vars(saved["args"])
    sections = saved.get("cfg")
    model = sections.get("model") if isinstance(sections, dict) else None
    if isinstance(model, argparse.Namespace):
        return vars(model)
    return model if isinstance(model, dict) else None


def _recognises(source: Source) -> bool:
    embeddings = (f"{_EMBEDDING}.weight", f"{_EMBEDDING}.embeddings.0.0.weight")
    has_decoder = any(name in source.tensors for name in embeddings)
    return has_decoder and source.config is not None and "model_type" not in source.config


def _is_adaptive(source: Source) -> bool:
    options = source.config or {}
    return bool(options.get("adaptive_input") or options.get("adaptive_softmax_cutoff"))


def _config(source: Source) -> ALiBiConfig:
    """The options, completed by what only the tensors tell: vocabulary and final norm."""
    options = source.config or {}
    config = _TABLE.read(
        {name: options[name] for name in options if _is_of_model(name)}, source.ignored
    )
    vocab_size, cutoffs = _vocab_size(source), config.adaptive_cutoffs
    if cutoffs is not None:
        cutoffs = tuple(end for end in cutoffs if end != vocab_size)
    is_tied = bool(options.get("share_decoder_input_output_embed")) and not _is_adaptive(source)
    try:
        return replace(
            config,
            vocab_size=vocab_size,
            adaptive_cutoffs=cutoffs,
            tie_embeddings=is_tied,
            final_norm="decoder.layer_norm.weight" in source.tensors,
        )
    except ValueError as error:
        raise CheckpointError(f"the fairseq checkpoint: {error}") from None


def _is_of_model(option: str) -> bool:
    """Whether an option describes the model: one of the table, or named like those."""
    known = {
        name
        for line in _TABLE.lines
        for name in (line.names if isinstance(line, Neutral) else (line.foreign,))
    }
    return option in known or option.startswith(("adaptive_", "decoder_"))


def _vocab_size(source: Source) -> int:
    pattern = rf"{re.escape(_EMBEDDING)}(\.embeddings\.\d+\.0)?\.weight"
    shapes = source.tensors.shapes
    return sum(shapes[name][0] for name in shapes if re.fullmatch(pattern, name) and shapes[name])


def _derived(config: ALiBiConfig) -> tuple[Derived, ...]:
    dropped = (
        Derived(r"decoder\.(adaptive_softmax\.)?version", "version of the layout"),
        Derived(
            r"decoder\.(embed_tokens|adaptive_softmax\.head)\._float_tensor", "tells the device"
        ),
        Derived(
            r"decoder\.embed_positions\.(_float_tensor|weights)",
            "sinusoidal positions, which the paper's fork makes and does not add",
        ),
        Derived(r"decoder\.(alibi|slopes|_future_mask)", "bias and mask: they follow from slopes"),
    )
    if not config.tie_embeddings:
        return dropped
    head = Derived(
        r"decoder\.output_projection\.weight",
        "the head is the token embedding",
        same_as=f"{_EMBEDDING}.weight",
    )
    return (*dropped, head)


def _folds(config: ALiBiConfig, source: Source) -> tuple[Fold, ...]:
    options = source.config or {}
    folds = [_embedding_fold(config, options)]
    if config.adaptive_cutoffs is not None:
        folds += _softmax_folds(config, options)
    elif not config.tie_embeddings:
        shape = {"decoder.output_projection.weight": (config.vocab_size or 0, config.d_model)}
        folds.append(Fold("lm_head.weight", shape, _copied, "the head, as it is"))
    return tuple(folds)


def _embedding_fold(config: ALiBiConfig, options: Mapping[str, Any]) -> Fold:
    embedding, width = "token_embedding.weight", config.d_model
    if not options.get("adaptive_input"):
        shape = {f"{_EMBEDDING}.weight": (config.vocab_size or 0, width)}
        return Fold(embedding, shape, _copied, "the embedding, as it is")
    ends = _cutoffs(options.get("adaptive_input_cutoff")) or ()
    foreign: dict[str, tuple[int, ...]] = {}
    for band, (size, narrow) in enumerate(
        _bands(config, ends, options.get("adaptive_input_factor", 4))
    ):
        foreign[f"{_EMBEDDING}.embeddings.{band}.0.weight"] = (size, narrow)
        foreign[f"{_EMBEDDING}.embeddings.{band}.1.weight"] = (width, narrow)

    def multiply(*tensors: np.ndarray) -> np.ndarray:
        return _multiplied_out(tensors[::2], [projection.T for projection in tensors[1::2]])

    return Fold(embedding, foreign, multiply, "bands of tokens times their projections")


def _softmax_folds(config: ALiBiConfig, options: Mapping[str, Any]) -> tuple[Fold, Fold]:
    """The head and the clusters' logits, from tied or separate tensors.

    Tied, the words of each band are those of the adaptive input, of which the first band loses its
    projection; a tied projection is stored as it is there, [width, narrow], a separate one is not.
    """
    cutoffs, width = config.adaptive_cutoffs or (), config.d_model
    is_tied = bool(options.get("tie_adaptive_weights"))
    has_tied_projections = is_tied and bool(options.get("tie_adaptive_proj"))
    factor = options.get(f"adaptive_{'input' if is_tied else 'softmax'}_factor", 4)
    first, *rest = _bands(config, cutoffs, factor)
    words: dict[str, tuple[int, ...]]
    if is_tied:
        words = {f"{_SOFTMAX}.head.word_proj.weight": first}
        clusters = {f"{_SOFTMAX}.head.class_proj.weight": (len(cutoffs), width)}
    else:
        words = clusters = {f"{_SOFTMAX}.head.weight": (first[0] + len(cutoffs), width)}
    tails: dict[str, tuple[int, ...]] = {}
    for index, (size, narrow) in enumerate(rest):
        projection = (width, narrow) if has_tied_projections else (narrow, width)
        tails[f"{_SOFTMAX}.tail.{index}.0.weight"] = projection
        tails[f"{_SOFTMAX}.tail.{index}.2.weight"] = (size, narrow)

    def multiply(head: np.ndarray, *tensors: np.ndarray) -> np.ndarray:
        projections = [each.T if has_tied_projections else each for each in tensors[::2]]
        return _multiplied_out((head[: first[0]], *tensors[1::2]), (None, *projections))

    return (
        Fold("lm_head.weight", words | tails, multiply, "bands of tokens times their projections"),
        Fold(
            "cluster_head.weight",
            clusters,
            lambda head: head if is_tied else head[first[0] :],
            "rows of the head that stand for a band",
        ),
    )


def _bands(config: ALiBiConfig, ends: tuple[int, ...], factor: float) -> Iterator[tuple[int, int]]:
    """Tokens and width of every band: each is `factor` times narrower than the one before."""
    vocab_size = config.vocab_size or 0
    bounds = (0, *(end for end in ends if end != vocab_size), vocab_size)
    narrowing = 1.0
    for start, end in itertools.pairwise(bounds):
        yield end - start, int(config.d_model // narrowing)
        narrowing *= factor  # infinite rather than an error, where a power would be


def _copied(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _multiplied_out(
    bands: Sequence[np.ndarray], projections: Sequence[np.ndarray | None]
) -> np.ndarray:
    """Every band times its projection [narrow, width], rounded once; without one, as it is."""
    width = next(each.shape[1] for each in projections if each is not None)
    dense = np.empty((sum(map(len, bands)), width), bands[0].dtype)
    row = 0
    for band, projection in zip(bands, projections, strict=True):
        for first in range(0, len(band), _BLOCK):
            block = band[first : first + _BLOCK]
            if projection is not None:
                block = block.astype(np.float64) @ projection.astype(np.float64)
            dense[row : row + len(block)] = block
            row += len(block)
    return dense


FAMILIES = (
    Family(
        "fairseq",
        lambda source: _recognises(source) and not _is_adaptive(source),
        _config,
        _PLAIN_ROWS,
        aliases=((r"decoder\.embed_out", "decoder.output_projection.weight"),),
        derived=_derived,
        unpickled=_unpickled,
    ),
    Family(
        "fairseq-adaptive",
        lambda source: _recognises(source) and _is_adaptive(source),
        _config,
        _BODY_ROWS,
        derived=_derived,
        folds=_folds,
        unpickled=_unpickled,
    ),
)
