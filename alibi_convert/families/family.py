"""What a family of foreign checkpoints declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alibi_convert.rules import Rule
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig


@dataclass(frozen=True)
class Family:
    """One family of checkpoints as data.

    Attributes:
        name: what `alibi inspect` calls it.
        recognises: whether these tensor names are the family's.
        config: the configuration that shapes and buffers imply; raises CheckpointError.
        rules: every tensor that is carried over.
        derived: why each tensor that is not carried over can be computed from the configuration.
    """

    name: str
    recognises: Callable[[Tensors], bool]
    config: Callable[[Tensors], ALiBiConfig]
    rules: Callable[[ALiBiConfig], tuple[Rule, ...]]
    derived: Callable[[ALiBiConfig], dict[str, str]]
