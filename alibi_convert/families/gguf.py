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
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only
from alibi_convert.rules import Row, both
from alibi_convert.tensors import LazyTensor, Tensors
from alibi_spec import ALiBiConfig

# Fields that no file of llama.cpp says, and that change nothing a trained model computes.
_UNSAID = ("dropout", "attention_dropout", "embedding_dropout", "init_std")
# What a key holds, where it is not the field itself: these are None when they follow from others.
_WHOLE = {"num_kv_heads": "kv_heads", "feed_forward_dim": "ffn_dim"}
_EMBEDDING = "token_embd.weight"
_LAYER, _OURS = "blk.{i}", "transformer.layers.{i}"

Shapes = Mapping[str, tuple[int, ...]]


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        name: llama.cpp's.
        keys: the lines of its metadata, without the name in front.
        implied: fields that every one of its models has.
        rows: its tensors; a row counts where our model has the parameter.
        told_by: fields that the shapes of the tensors tell.
        refine: completes the fields read so far, as of a `KeyTable`.
        variant: follows the name in that of the family, where another has the same one.
        marked: a tensor that all files of the variant have, and no others.
        settled: a file's tensors as `rows` lay them out, where others compute the same.
    """

    name: str
    keys: tuple[Key | Only | Neutral, ...]
    implied: Mapping[str, Any]
    rows: tuple[Row, ...]
    told_by: Mapping[str, Callable[[Shapes], Any]]
    refine: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    variant: str = ""
    marked: str = ""
    settled: Callable[[Tensors], Tensors] = _as_they_are

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
        return f"gguf-{self.name}{self.variant}"

    def read(
        self,
        metadata: Mapping[str, Any],
        shapes: Shapes,
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

    def _implied(self, shapes: Shapes) -> dict[str, Any]:
        told = {field: tell(shapes) for field, tell in self.told_by.items()}
        tied = {"tie_embeddings": "output.weight" not in shapes}
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
            elif isinstance(line, Only):
                metadata[line.foreign] = line.values[0]
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


def _is_there(name: str) -> Callable[[Shapes], bool]:
    return lambda shapes: name in shapes


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
_JINA_ROWS = (
    Row(_EMBEDDING, "token_embedding.weight"),
    Row("token_types.weight", "token_type_embedding.weight"),
    *both("token_embd_norm", "embedding_norm"),
    *_APART,
    *both(f"{_LAYER}.attn_q_norm", f"{_OURS}.attn.query_norm"),
    *both(f"{_LAYER}.attn_k_norm", f"{_OURS}.attn.key_norm"),
    *both(f"{_LAYER}.attn_output", f"{_OURS}.attn.output"),
    *both(f"{_LAYER}.ffn_up", f"{_OURS}.ffn.{{gate,fc1}}"),
    *both(f"{_LAYER}.ffn_down", f"{_OURS}.ffn.fc2"),
    *both(f"{_LAYER}.layer_output_norm", f"{_OURS}.ffn_norm"),
)
_JINA_KEYS = (
    *_KEYS,
    _LAYER_NORM,
    Only("attention.causal", (False,), "the bias is symmetric and nothing is masked", default=True),
    Only("pooling_type", (1, 0, 2, 3), "there is no head that ranks"),  # the mean is written
)
_JINA_IMPLIED: dict[str, Any] = {
    **{"causal": False, "norm_placement": "post", "final_norm": False, "embedding_norm": True},
    "head": "none",
}


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


def _is_gated(shapes: Shapes) -> bool:
    """Whether `ffn_up` has two rows for each column of `ffn_down`: those of the gate first."""
    up, down = (shapes.get(f"blk.0.ffn_{name}.weight", ()) for name in ("up", "down"))
    return up[:1] != down[-1:]


def _types(shapes: Shapes) -> int:
    """llama.cpp runs no model without token types; all its tokens have the first."""
    return (shapes.get("token_types.weight") or (1,))[0]


_JINA_TOLD: dict[str, Callable[[Shapes], Any]] = {
    "type_vocab_size": _types,
    "gated_ffn": _is_gated,
    "qk_norm": _is_there("blk.0.attn_q_norm.weight"),
}


def _one_norm_of_keys(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp has norms of keys only at the width of the model."""
    kv_heads = ALiBiConfig(**fields).num_kv_heads
    if fields["qk_norm"] and kv_heads is not None:
        raise ValueError(f"num_kv_heads={kv_heads} together with qk_norm, which llama.cpp lacks")
    return fields


def _gate_and_up(tensors: Tensors) -> Tensors:
    """The gate and the other half in one tensor, with biases, where a file has them otherwise.

    llama.cpp's converter leaves out the biases, which are zeros, and once wrote two tensors.
    """
    headers = dict(tensors.headers)
    for name in tensors:
        if name.endswith(".ffn_up.weight"):
            up, other = headers[name], name.replace("ffn_up", "ffn_gate")
            gate = headers.get(other)
            if gate is not None and gate.shape == up.shape and len(up.shape) == 2:
                headers[name] = up = _stacked(gate, up)
                del headers[other]
            headers.setdefault(name.replace("weight", "bias"), _zeros(up.shape[:1]))
    return Tensors(headers)


def _stacked(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    shape = (2 * first.shape[0], *first.shape[1:])
    dtype = np.promote_types(first.dtype, second.dtype)
    return LazyTensor(
        shape, dtype, lambda: np.concatenate([first.read(), second.read()], dtype=dtype)
    )


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


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
            "attention_bias": _is_there("blk.0.attn_qkv.bias"),
            "ffn_bias": _is_there("blk.0.ffn_up.bias"),
            "norm_bias": _is_there("output_norm.bias"),
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
    Architecture(
        "jina-bert-v2",
        _JINA_KEYS,
        _JINA_IMPLIED | {"attention_output_norm": True},
        (
            *_JINA_ROWS,
            *both(f"{_LAYER}.attn_output_norm", f"{_OURS}.attn_output_norm"),
            *both(f"{_LAYER}.attn_norm_2", f"{_OURS}.attn_norm"),
        ),
        _JINA_TOLD,
        _one_norm_of_keys,
        "-twice-normalised",
        "blk.0.attn_norm_2.weight",
        _gate_and_up,
    ),
    Architecture(
        "jina-bert-v2",
        _JINA_KEYS,
        _JINA_IMPLIED,
        (*_JINA_ROWS, *both(f"{_LAYER}.attn_output_norm", f"{_OURS}.attn_norm")),
        _JINA_TOLD,
        _one_norm_of_keys,
        settled=_gate_and_up,
    ),
)
FAMILIES = tuple(each.family for each in ARCHITECTURES)


def architecture_named(name: Any, tensors: Collection[str] = ()) -> Architecture | None:
    """The architecture of that name with these tensors; None where we have none."""
    for each in ARCHITECTURES:
        if each.name == name and (not each.marked or each.marked in tensors):
            return each
    return None


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
