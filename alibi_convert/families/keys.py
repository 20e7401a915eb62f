"""Foreign configurations as tables: every key of a config.json, said once for both directions.

A key is carried over (`Key`), has one value that can be honoured (`Only`), or says nothing about
what is computed (`Neutral`). A key that no line names is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from alibi_convert.errors import CheckpointError
from alibi_spec import ALiBiConfig

REQUIRED = object()  # a key without a default
MISSING = object()  # the value of a key that is not there

# Keys of any config.json that do not change what the model computes: transformers' own, of
# every version, and those that trainers add.
COMMON_NEUTRAL: tuple[str, ...] = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_pre_quantization_dtype",
    "activation_dropout",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "custom_pipelines",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "end_token_id",
    "eos_token_id",
    "eos_token_ids",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "ignore_index",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "tokenizer_name",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "xla_device",
)


def _identity(value: Any) -> Any:
    return value


def flag(value: Any) -> bool:
    """The value of a key that is true or false; ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


@dataclass(frozen=True)
class Key:
    """A foreign key and the field of `ALiBiConfig` that says the same.

    Attributes:
        foreign: the key; a dot leads into a nested object.
        field: ours.
        default: the foreign value where the key is absent; REQUIRED when it must be there.
        read: foreign value -> ours; a ValueError says why not.
        write: ours -> foreign value; a ValueError says why not.
        aliases: other names of the key in older files.
    """

    foreign: str
    field: str
    default: Any = REQUIRED
    read: Callable[[Any], Any] = _identity
    write: Callable[[Any], Any] = _identity
    aliases: tuple[str, ...] = ()


class ReadWrite(TypedDict):
    """Two arguments of a `Key`."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def one_of(*pairs: tuple[Any, Any]) -> ReadWrite:
    """`read` and `write` of a `Key` with few values, each a pair (foreign, ours).

    Where two foreign values mean the same, the first is written.
    """

    def read(value: Any) -> Any:
        for foreign, ours in pairs:
            if _is_same(value, foreign):
                return ours
        raise ValueError(f"expected {_listed(tuple(foreign for foreign, _ in pairs))}")

    def write(value: Any) -> Any:
        for foreign, ours in pairs:
            if value == ours:
                return foreign
        raise ValueError(f"expected {_listed(tuple(dict.fromkeys(ours for _, ours in pairs)))}")

    return {"read": read, "write": write}


@dataclass(frozen=True)
class Only:
    """A key of which some values can be honoured, and the first of them is written.

    Attributes:
        foreign: the key; a dot leads into a nested object.
        values: what it may be; absent counts as `default`.
        reason: why no other value.
        default: the foreign value where the key is absent.
        written: whether an export says it.
    """

    foreign: str
    values: tuple[Any, ...]
    reason: str
    default: Any = None
    written: bool = True

    def __post_init__(self) -> None:
        if self.default is None:
            object.__setattr__(self, "default", self.values[0])


@dataclass(frozen=True)
class Neutral:
    """Keys that change nothing about what is computed, with the reason."""

    names: tuple[str, ...]
    reason: str


_QUANTISED = "quantization_config"  # may be ignored: the tensors tell whether it still holds
_COMMON_ONLY = (
    Only("is_encoder_decoder", (False,), "there are no two halves", written=False),
    Only("add_cross_attention", (False,), "there is no encoder to attend to", written=False),
    Only("pruned_heads", ({}, None), "layers would have different heads", written=False),
    Only(
        _QUANTISED,
        (None,),
        "the weights are quantised; save them dequantised (transformers: model.dequantize()), and "
        f"if this key is left, pass ignore_keys=({_QUANTISED!r},) (--ignore-key {_QUANTISED})",
        written=False,
    ),
)
# What transformers keeps in every object of a configuration, nested ones included.
_GENERAL_KEYS = frozenset(("model_type", "tie_word_embeddings", *COMMON_NEUTRAL))


def without_general_keys(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A nested object of a configuration without what transformers keeps there a second time.

    Values that could not be honoured stay, and are refused as keys that are not known.
    """
    inert = {each.foreign: each.values for each in _COMMON_ONLY}
    return {
        name: value
        for name, value in nested.items()
        if name not in _GENERAL_KEYS and value not in inert.get(name, ())
    }


@dataclass(frozen=True)
class KeyTable:
    """The configuration of a family.

    Attributes:
        family: its name, for messages.
        model_type: what an export writes.
        architectures: what an export writes.
        lines: the keys.
        implied: fields of ours that every model of the family has.
        unsaid: fields that the family has no key for and that do not change what a trained model
            computes; an export leaves them out.
        refine: completes the fields read so far, given the whole foreign configuration.
        unrefine: its inverse: the fields that the lines are about, given all of ours; those that it
            takes out are expressed by others.
    """

    family: str
    model_type: str
    architectures: tuple[str, ...]
    lines: tuple[Key | Only | Neutral, ...]
    implied: Mapping[str, Any]
    unsaid: tuple[str, ...] = ()
    refine: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    unrefine: Callable[[dict[str, Any], ALiBiConfig], dict[str, Any]] | None = None

    @property
    def neutral_keys(self) -> frozenset[str]:
        """Keys at the top that say nothing about what is computed."""
        own = (name for line in self.lines if isinstance(line, Neutral) for name in line.names)
        return frozenset(COMMON_NEUTRAL).union(name for name in own if "." not in name)

    def read(
        self, foreign: Mapping[str, Any], ignored: frozenset[str] = frozenset()
    ) -> ALiBiConfig:
        """The configuration that a foreign one describes.

        Args:
            foreign: the contents of config.json.
            ignored: keys that no line names, and that the caller says change nothing.

        Raises:
            CheckpointError: a key is missing, unknown, or has a value that cannot be honoured; or
                an ignored one is known.
        """
        self._refuse_unknown(foreign, ignored)
        fields = dict(self.implied)
        for line in (*self.lines, *_COMMON_ONLY):
            if isinstance(line, Key):
                fields[line.field] = self._field(line, foreign)
            elif isinstance(line, Only) and line.foreign not in ignored:
                value = look_up(foreign, line.foreign, line.default)
                if not any(_is_same(value, allowed) for allowed in line.values):
                    raise CheckpointError(
                        f"{line.foreign}={value!r} in the {self.family} configuration cannot be "
                        f"honoured: {line.reason}; expected {_listed(line.values)}"
                    )
        try:
            if self.refine is not None:
                fields = self.refine(fields, foreign)
            return ALiBiConfig(**fields)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"the {self.family} configuration: {error}") from None

    def write(self, config: ALiBiConfig) -> dict[str, Any]:
        """The foreign configuration, as the dict of its config.json.

        Raises:
            CheckpointError: naming a field that the family cannot express.
        """
        expressed = {line.field for line in self.lines if isinstance(line, Key)}
        fields = self._fields_of_lines(config, expressed)
        for field in dataclasses.fields(config):
            name, value = field.name, getattr(config, field.name)
            is_said = name in expressed or name not in fields or name in self.unsaid
            wanted = self.implied.get(name, field.default)
            if not is_said and value != wanted:
                raise CheckpointError(
                    f"{self.family} cannot express {name}={value!r}; it has {wanted!r} always"
                )
        foreign: dict[str, Any] = {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
        }
        for line in self.lines:
            if isinstance(line, Key):
                _store(foreign, line.foreign, self._foreign_value(line, fields[line.field]))
            elif isinstance(line, Only) and line.written:
                _store(foreign, line.foreign, line.values[0])
        for name, value in dataclasses.asdict(self.read(foreign)).items():
            if name not in self.unsaid and value != getattr(config, name):
                raise CheckpointError(
                    f"{self.family} cannot express {name}={getattr(config, name)!r} together with "
                    f"the other fields; it would be read back as {value!r}"
                )
        return foreign

    def _fields_of_lines(self, config: ALiBiConfig, expressed: set[str]) -> dict[str, Any]:
        """What the lines are about, and the fields that no line and no other field expresses."""
        fields = dataclasses.asdict(config)
        # In a foreign configuration None is no dropout, or another default.
        fields["attention_dropout"] = config.probability_dropout
        if "feed_forward_dim" in expressed and "expansion_factor" not in expressed:
            fields["feed_forward_dim"] = config.ffn_dim
            del fields["expansion_factor"]
        return fields if self.unrefine is None else self.unrefine(fields, config)

    def _foreign_value(self, line: Key, value: Any) -> Any:
        try:
            foreign = line.write(value)
        except ValueError as error:
            raise CheckpointError(
                f"{self.family} cannot express {line.field}={value!r}: {error}"
            ) from None
        if foreign is None and line.default is not None:
            raise CheckpointError(f"{self.family} cannot express {line.field}=None")
        return foreign

    def _field(self, line: Key, foreign: Mapping[str, Any]) -> Any:
        names = (line.foreign, *line.aliases)
        found = {name: look_up(foreign, name, None) for name in names}
        said = {name: value for name, value in found.items() if value is not None}
        first, *others = list(said.values()) or [look_up(foreign, line.foreign, line.default)]
        if any(other != first for other in others):
            listed = ", ".join(f"{name}={value!r}" for name, value in said.items())
            raise CheckpointError(
                f"the {self.family} configuration sets one field to different values: {listed}; "
                "keep the one that is meant"
            )
        value = first
        if value is REQUIRED:
            raise CheckpointError(
                f"the {self.family} configuration has no {line.foreign}; it may be truncated"
            )
        try:
            return line.read(value)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{line.foreign}={value!r} in the {self.family} configuration cannot be honoured: "
                f"{error}"
            ) from None

    def _refuse_unknown(self, foreign: Mapping[str, Any], ignored: frozenset[str]) -> None:
        meant, neutral = {"model_type"}, set(COMMON_NEUTRAL)
        for line in (*self.lines, *_COMMON_ONLY):
            if isinstance(line, Neutral):
                neutral.update(line.names)
            else:
                meant.add(line.foreign)
                meant.update(line.aliases if isinstance(line, Key) else ())
        nested = {name[:dot] for name in meant for dot in _dots(name)}
        for name in sorted(ignored & (meant | nested) - {_QUANTISED}):
            if is_there(foreign, name):
                raise CheckpointError(
                    f"{name} in the {self.family} configuration cannot be ignored: what the model "
                    "computes depends on it"
                )
        known = meant | neutral | ignored
        unknown = [name for name in _flat_names(foreign, nested) if name not in known]
        if unknown:
            raise CheckpointError(
                f"the {self.family} configuration has keys that are not known: "
                f"{', '.join(sorted(unknown))}; if they change nothing about what the model "
                "computes, pass ignore_keys=(…) (--ignore-key NAME)"
            )


def _is_same(value: Any, allowed: Any) -> bool:
    return type(value) is type(allowed) and value == allowed


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)


def look_up(foreign: Mapping[str, Any], name: str, default: Any = MISSING) -> Any:
    """The value of a key, dotted or not.

    Raises:
        CheckpointError: the name leads into something that is no object.
    """
    if name in foreign:
        return foreign[name]
    head, _, rest = name.partition(".")
    inner = foreign.get(head) if rest else None
    if inner is None:
        return default
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{head} in config.json is a {type(inner).__name__}, not an object")
    return look_up(inner, rest, default)


def is_there(foreign: Mapping[str, Any], name: str) -> bool:
    """Whether a configuration has a key, dotted or not."""
    return look_up(foreign, name, MISSING) is not MISSING


def _store(foreign: dict[str, Any], name: str, value: Any) -> None:
    head, _, rest = name.partition(".")
    if rest:
        _store(foreign.setdefault(head, {}), rest, value)
    else:
        foreign[head] = value


def _flat_names(foreign: Mapping[str, Any], nested: set[str], prefix: str = "") -> Iterator[str]:
    """Every key by its dotted name; objects that a line leads into are not keys themselves."""
    for name, value in foreign.items():
        full = f"{prefix}{name}"
        if full not in nested:
            yield full
        elif isinstance(value, Mapping):
            yield from _flat_names(value, nested, f"{full}.")


def _dots(name: str) -> Iterator[int]:
    return (index for index, letter in enumerate(name) if letter == ".")
