"""A folder with an adapter, as peft saves it: its files, and tensors by the modules of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alibi_convert.adapters.settings import Settings, read_settings
from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.formats.pt import load_pickle, state_dict
from alibi_convert.formats.safetensors import read_safetensors
from alibi_convert.tensors import DTYPES, LazyTensor, Tensors
from alibi_convert.writing.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ADAPTER_PICKLE_FILE

_PREFIX = "base_model.model."
# An adapter's own name, which peft once left in: .lora_A.default.weight
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>(?:embedding_)?[AB])"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight|(?P<bias>\.bias))?"
)
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")


@dataclass(frozen=True)
class Update:
    """What is added to the weight of one module: scaling · B A.

    Attributes:
        module: its name in the adapter's file.
        first, second: A [rank, in] and B [out, rank]; of an embedding, A [rank, tokens] and B
            [dim, rank].
        bias: what is added to the module's bias, times scaling.
        scaling: of both.
        is_embedding: the product is the transposed weight.
    """

    module: str
    first: LazyTensor
    second: LazyTensor
    bias: LazyTensor | None
    scaling: float
    is_embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter, unread.

    Attributes:
        path: its folder.
        base: what it says that it was trained on.
        settings: how it was trained.
        updates: one for each module with a product.
        below: tensors that stand in for those of the base, before anything is added.
        replaced: tensors of modules that were trained as a whole, and trained biases.
        files: its configuration and its weights, by name.
    """

    path: Path
    base: str
    settings: Settings
    updates: tuple[Update, ...]
    below: Mapping[str, LazyTensor]
    replaced: Mapping[str, LazyTensor]
    files: Mapping[str, Path]


def open_adapter(folder: Path, allow_pt: bool) -> Adapter:
    """The adapter in a folder.

    Raises:
        CheckpointError: a file is missing or broken, or says something that cannot be merged.
    """
    config = folder / ADAPTER_CONFIG_FILE
    if not folder.is_dir() or not config.exists():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_CONFIG_FILE}; give the folder that peft's "
            "save_pretrained wrote"
        )
    values = read_json(config)
    settings = read_settings(values, str(config))
    weights, tensors = _weights(folder, allow_pt)
    _require_floats(weights, tensors)
    factors, below, replaced = _sorted(weights, tensors)
    return Adapter(
        folder,
        str(values.get("base_model_name_or_path") or ""),
        settings,
        tuple(_update(weights, settings, module, found) for module, found in factors.items()),
        below,
        replaced,
        {config.name: config, weights.name: weights},
    )


def _weights(folder: Path, allow_pt: bool) -> tuple[Path, Tensors]:
    pickled = folder / ADAPTER_PICKLE_FILE
    if pickled.exists() and not (folder / ADAPTER_FILE).exists():
        return pickled, state_dict(load_pickle(pickled, allow_pt), pickled)
    return folder / ADAPTER_FILE, read_safetensors(folder / ADAPTER_FILE)[0]


def _require_floats(path: Path, tensors: Tensors) -> None:
    for name, header in tensors.headers.items():
        if header.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name} is {header.dtype}; expected one of {', '.join(DTYPES)}"
            )


_Factors = dict[str, dict[str, LazyTensor]]


def _sorted(
    path: Path, tensors: Tensors
) -> tuple[_Factors, dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The factors of each module, and the tensors that stand in for others, by what they are."""
    factors: _Factors = {}
    below: dict[str, LazyTensor] = {}
    replaced: dict[str, LazyTensor] = {}
    for name, header in tensors.headers.items():
        short = name.removeprefix(_PREFIX)
        found, base = _FACTOR.fullmatch(short), _BASE_LAYER.fullmatch(short)
        if found is not None:
            group, key = factors.setdefault(found["module"], {}), _factor_name(found)
        elif base is not None:
            group, key = below, f"{base['module']}.{base['parameter']}"
        else:
            group, key = replaced, short
        if key in group:
            raise CheckpointError(f"{path} holds {name} a second time; remove one")
        group[key] = header
    return factors, below, replaced


def _factor_name(found: re.Match[str]) -> str:
    return f"{found['factor']}{found['bias'] or ''}"


def _update(
    path: Path, settings: Settings, module: str, factors: Mapping[str, LazyTensor]
) -> Update:
    is_embedding = "embedding_A" in factors
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if set(factors) - {"B.bias"} != set(names) or (is_embedding and "B.bias" in factors):
        raise CheckpointError(
            f"{path}: {module} has lora_{', lora_'.join(sorted(factors))}; expected "
            f"lora_{' and lora_'.join(names)}"
        )
    first, second = (factors[name] for name in names)
    rank, shapes = settings.rank_of(module), [list(first.shape), list(second.shape)]
    if [len(shape) for shape in shapes] != [2, 2] or {shapes[0][0], shapes[1][1]} != {rank}:
        raise CheckpointError(
            f"{path}: {module} has factors {shapes[0]} and {shapes[1]}; expected [{rank}, in] and "
            f"[out, {rank}], of the rank that {ADAPTER_CONFIG_FILE} says"
        )
    bias, scaling = factors.get("B.bias"), settings.scaling_of(module)
    return Update(module, first, second, bias, scaling, is_embedding)
