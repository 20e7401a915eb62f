"""What an adapter_config.json says, as far as it changes the weights; the rest is refused by name.

Whatever peft adds to LoRA is switched on by a key that is otherwise false or empty. So a key that
is not known here must be that.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.formats.names import MERGE

_NEUTRAL = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("task_type", "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # only of initial values
        "fan_in_fan_out",  # peft sets it by the module, whatever is written
    )
)
_INITIAL_VALUES = (True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it was
_BIASES = ("none", "all", "lora_only")
_MAX_CHOICES = 4  # groups and repetitions in a regular expression
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


@dataclass(frozen=True)
class Settings:
    """How an adapter was trained.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: of others, by regular expressions for the end of their names.
        is_rank_stabilized: the scaling is alpha / sqrt(rank), not alpha / rank.
        bias: which biases were trained: "none", "all", "lora_only".
        targets, excluded: regular expressions or lists of the names of modules; None is not known.
        layers: indices of those with an adapter; None is all.
        replaced: the last parts of the names of modules that were trained as a whole.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilized: bool
    bias: str
    targets: str | list[str] | None
    excluded: str | list[str] | None
    layers: list[int] | None
    replaced: list[str]

    def rank_of(self, module: str) -> int:
        """The rank of a module's update."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """What a module's product B A is multiplied by."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def has_target(self, module: str) -> bool:
        """Whether a module of the base has an update."""
        if self.targets is None or _names(self.excluded or [], module):
            return False
        if self.is_replaced(module) or not _names(self.targets, module):
            return False
        index = re.search(r"\.(\d+)\.", module)
        return self.layers is None or (index is not None and int(index[1]) in self.layers)

    def is_replaced(self, module: str) -> bool:
        """Whether a module of the base was trained as a whole."""
        return any(f".{name}." in f".{module}." for name in self.replaced)


def read_settings(values: Mapping[str, Any], origin: str) -> Settings:
    """The settings that an adapter_config.json holds; `origin` names it in errors.

    Raises:
        CheckpointError: another method than LoRA, a variant of it that is not merged here, or a
            value that no adapter can have.
    """
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{origin} has peft_type {values.get('peft_type')!r}, expected 'LORA'; {MERGE}"
        )
    initial = values.get("init_lora_weights", True)
    if initial not in _INITIAL_VALUES:
        raise CheckpointError(
            f"{origin} has init_lora_weights {initial!r}, by which the base's weights may have "
            f"changed; save the adapter with path_initial_model_for_weight_conversion, or {MERGE}"
        )
    reader = _Reader(values, origin)
    settings = Settings(
        rank=reader.take("r", 8, _is_rank, "a positive integer"),
        alpha=reader.take("lora_alpha", 8, _is_number, "a number"),
        rank_pattern=reader.take("rank_pattern", {}, _each(_is_rank), "ranks by patterns") or {},
        alpha_pattern=reader.take("alpha_pattern", {}, _each(_is_number), "numbers by patterns")
        or {},
        is_rank_stabilized=reader.take("use_rslora", False, _is_flag, "true or false"),
        bias=reader.take("bias", "none", _is_bias, f"one of {', '.join(_BIASES)}"),
        targets=reader.take("target_modules", None, _is_names, "names or a regular expression"),
        excluded=reader.take("exclude_modules", None, _is_names, "names or a regular expression"),
        layers=_as_list(reader.take("layers_to_transform", None, _is_layers, "indices of layers")),
        replaced=reader.take("modules_to_save", None, _is_list, "a list of names") or [],
    )
    reader.take("lora_bias", False, _is_flag, "true or false")  # its tensors say where
    reader.require_rest_off()
    names = [each for each in (settings.targets, settings.excluded) if isinstance(each, str)]
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern, *names):
        _require_bounded(pattern, origin)
    return settings


class _Reader:
    """Takes the known keys of a configuration, so that those that remain can be judged."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._origin = origin
        known = _NEUTRAL | {"peft_type", "init_lora_weights"}
        self._rest = {name: value for name, value in values.items() if name not in known}

    def take(self, name: str, default: Any, accepts: Callable[[Any], bool], expected: str) -> Any:
        value = self._rest.pop(name, default)
        if not accepts(value):
            raise CheckpointError(f"{self._origin} has {name} {value!r}, expected {expected}")
        return value

    def require_rest_off(self) -> None:
        on = [name for name, value in self._rest.items() if value]
        if on:
            raise CheckpointError(
                f"{self._origin} has {on[0]} {self._rest[on[0]]!r}, which is not merged here; "
                f"{MERGE}"
            )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_bias(value: Any) -> bool:
    return value in _BIASES


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(each) is str for each in value))


def _is_names(value: Any) -> bool:
    return type(value) is str or _is_list(value)


def _is_layers(value: Any) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or all(type(each) is int for each in indices)


def _each(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def accept(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(accepts, value.values())))

    return accept


def _as_list(layers: Any) -> list[int] | None:
    """Peft takes one index for a list of it, and an empty list for none."""
    return [layers] if type(layers) is int else layers or None


def _names(names: str | Collection[str], module: str) -> bool:
    """Whether a list names the module by the end of its name, or an expression as a whole."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first expression that matches the end of a module's name, as in peft."""
    found = (value for each, value in patterns.items() if re.match(rf"(.*\.)?({each})$", module))
    return next(found, default)


def _require_bounded(pattern: str, origin: str) -> None:
    """Refuse an expression that is wrong, or that may take hours: the file is a stranger's."""
    try:
        re.compile(pattern)
        re.compile(f"({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{origin} has {pattern!r}, no regular expression: {error}") from None
    choices = sum(map(pattern.count, "(*+{"))
    if choices > _MAX_CHOICES or _REPEATED_GROUP.search(pattern):
        raise CheckpointError(
            f"{origin} has the regular expression {pattern!r}; expected at most {_MAX_CHOICES} "
            "groups and repetitions, and none of a group: write out the names of modules"
        )
