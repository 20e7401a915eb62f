"""The models with ALiBi that llama.cpp runs, as its GGUF files name and configure them.

An architecture is what llama.cpp computes under that name; several facts of a model follow from
which tensors are there. A configuration can be written if the file would be read back as the same,
which one check tells for both directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Family
from alibi_convert.families.keys import Key, KeyTable, Neutral
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

# Fields that no file of llama.cpp says, and that change nothing a trained model computes.
_UNSAID = ("dropout", "attention_dropout", "embedding_dropout", "init_std")
# What a key holds, where it is not the field itself: these are None when they follow from others.
_WHOLE = {"num_kv_heads": "kv_heads", "feed_forward_dim": "ffn_dim"}
_EMBEDDING = "token_embd.weight"
_LAYER, _OURS = "blk.{i}", "transformer.layers.{i}"


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        name: llama.cpp's.
        keys: the lines of its metadata, without the name in front.
        implied: fields that every one of its models has.
        rows: its tensors; a row counts where our model has the parameter.
        told_by: fields that are true where a tensor is there.
        refine: completes the fields read so far, as of a `KeyTable`.
    """

    name: str
    keys: tuple[Key | Neutral, ...]
    implied: Mapping[str, Any]
    rows: tuple[Row, ...]
    told_by: Mapping[str, str]
    refine: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None

    @property
    def family(self) -> Family:
        """It as a family of checkpoints, by which its files are read."""
        return Family(
            self.label,
            lambda source: source.model_type == self.label,
            lambda source: self.read(source.config or {}, source.tensors.shapes, source.ignored),
            self.rows,
        )

    @property
    def label(self) -> str:
        """The name of the family."""
        return f"gguf-{self.name}"

    def read(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        ignored: frozenset[str] = frozenset(),
    ) -> ALiBiConfig:
        """The configuration that metadata and the tensors beside it describe.

        Raises:
            CheckpointError: a key is missing, unknown, or has a value that cannot be honoured.
        """
        if "vocab_size" not in metadata and shapes.get(_EMBEDDING):
            metadata = {**metadata, "vocab_size": shapes[_EMBEDDING][0]}
        lines = (Key("vocab_size", "vocab_size"), *self.keys)
        implied = self._implied(shapes)
        table = KeyTable(self.label, self.label, (), lines, implied, refine=self.refine)
        return table.read(metadata, ignored)

    def _implied(self, names: Collection[str]) -> dict[str, Any]:
        told = {field: name in names for field, name in self.told_by.items()}
        tied = {"tie_embeddings": "output.weight" not in names}
        return {"dropout": 0.0, **tied, **self.implied, **told}

    def write(self, config: ALiBiConfig) -> dict[str, Any]:
        """The metadata of a configuration, without the name in front; floats are float32's.

        Raises:
            CheckpointError: naming a field that llama.cpp cannot express.
        """
        if config.vocab_size is None:
            raise CheckpointError(f"llama.cpp's {self.name} cannot express vocab_size=None")
        metadata: dict[str, Any] = {"vocab_size": config.vocab_size}
        for line in self.keys:
            if isinstance(line, Key):
                value = getattr(config, _WHOLE.get(line.field, line.field))
                metadata[line.foreign] = None if value is None else line.write(value)
        metadata = {name: value for name, value in metadata.items() if value is not None}
        shapes = {rule.foreign: rule.foreign_shape for rule in self.family.rules(config)}
        found = self.read(metadata, shapes)
        kept = replace(config, **{name: getattr(found, name) for name in _UNSAID})
        for name, value in dataclasses.asdict(kept).items():
            if value != getattr(found, name):
                raise CheckpointError(
                    f"llama.cpp's {self.name} cannot express {name}={value!r}; it would be "
                    f"{getattr(found, name)!r}"
                )
        return metadata


def shortest(value: float) -> float:
    """A float32 as the decimal number that it was made of: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _positive(value: Any) -> Any:
    if not value > 0:
        raise ValueError("the model has no ALiBi")
    return value


def _or_none(value: Any) -> Any:
    """llama.cpp clamps nothing at zero."""
    return value or None


_KEYS = (
    Key("context_length", "max_len"),
    Key("embedding_length", "d_model"),
    Key("block_count", "num_layers"),
    Key("feed_forward_length", "feed_forward_dim"),
    Key("attention.head_count", "num_heads"),
    Key("attention.head_count_kv", "num_kv_heads", None),
)
_LAYER_NORM = Key("attention.layer_norm_epsilon", "norm_eps", write=shortest)
_MAX_BIAS = Key("attention.max_alibi_bias", "bias_max", 0.0, _positive, shortest)
_MODULES = (
    ("token_embd_norm", "embedding_norm"),
    (f"{_LAYER}.attn_norm", f"{_OURS}.attn_norm"),
    (f"{_LAYER}.attn_output", f"{_OURS}.attn.output"),
    (f"{_LAYER}.ffn_norm", f"{_OURS}.ffn_norm"),
    (f"{_LAYER}.ffn_up", f"{_OURS}.ffn.fc1"),
    (f"{_LAYER}.ffn_gate", f"{_OURS}.ffn.gate"),
    (f"{_LAYER}.ffn_down", f"{_OURS}.ffn.fc2"),
    ("output_norm", "transformer.final_norm"),
)
_ROWS = (
    Row(_EMBEDDING, "token_embedding.weight"),
    *(row for names in _MODULES for row in both(*names)),
    Row("output.weight", "lm_head.weight"),
)
# Queries, keys and values follow one another, each with its heads in order.
_FUSED = both(f"{_LAYER}.attn_qkv", f"{_OURS}.attn.{{query,key,value}}")
_APART = tuple(
    row
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"))
    for row in both(f"{_LAYER}.attn_{theirs}", f"{_OURS}.attn.{ours}")
)
_BAICHUAN_13B_LAYERS = 40


def _scaled_by_head_dim(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    """JAIS divides q·k by the width of a head, not by its root."""
    return {**fields, "attention_scale": 1 / ALiBiConfig(**fields).head_dim}


def _baichuan_13b(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp tells the model with ALiBi by its depth alone."""
    if fields["num_layers"] != _BAICHUAN_13B_LAYERS:
        raise ValueError(
            f"num_layers={fields['num_layers']}, and llama.cpp gives ALiBi only to a Baichuan "
            f"of {_BAICHUAN_13B_LAYERS}"
        )
    return fields


ARCHITECTURES = (
    Architecture(
        "bloom",
        (*_KEYS, _LAYER_NORM),
        {"activation": "gelu_tanh", "embedding_norm": True},
        (*_ROWS, *_FUSED),
        {},
    ),
    Architecture(
        "mpt",
        (
            *_KEYS,
            _LAYER_NORM,
            _MAX_BIAS,
            Key("attention.clamp_kqv", "qkv_clip", None, _or_none, shortest),
        ),
        {},
        (*_ROWS, *_FUSED),
        {
            "attention_bias": "blk.0.attn_qkv.bias",
            "ffn_bias": "blk.0.ffn_up.bias",
            "norm_bias": "output_norm.bias",
        },
    ),
    Architecture(
        "jais",
        (*_KEYS, _LAYER_NORM, _MAX_BIAS),
        {"activation": "silu", "gated_ffn": True, "tie_embeddings": False},
        (*_ROWS, *_FUSED),
        {},
        _scaled_by_head_dim,
    ),
    Architecture(
        "baichuan",
        (
            *_KEYS,
            Key("attention.layer_norm_rms_epsilon", "norm_eps", write=shortest),
            Neutral(("rope.dimension_count",), "for the rotary 7B models"),
            Neutral(
                ("tensor_data_layout",), "queries and keys ordered for a rotation, which is none"
            ),
        ),
        {
            **{"activation": "silu", "gated_ffn": True, "norm": "rms", "norm_bias": False},
            **{"attention_bias": False, "ffn_bias": False, "tie_embeddings": False},
        },
        (*_ROWS, *_APART),
        {},
        _baichuan_13b,
    ),
)
FAMILIES = tuple(each.family for each in ARCHITECTURES)


def architecture_named(name: Any) -> Architecture | None:
    """The architecture of that name; None where we have none."""
    return next((each for each in ARCHITECTURES if each.name == name), None)


def architecture_of(config: ALiBiConfig) -> Architecture:
    """The first architecture that can express a configuration.

    Raises:
        CheckpointError: none can; naming for each a field in the way.
    """
    reasons = []
    for each in ARCHITECTURES:
        try:
            each.write(config)
        except CheckpointError as error:
            reasons.append(f"  {error}")
        else:
            return each
    raise CheckpointError("\n".join(["llama.cpp runs no such model:", *reasons]))
