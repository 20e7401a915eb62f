"""Names of tensors: prefixes of training are removed, adapters and quantised weights refused.

DistributedDataParallel, a LightningModule or a ComposerModel put one word before every name;
torch.compile, FSDP and activation checkpointing put theirs before the names of any submodule.
Adapters and quantised weights would be refused in any case, for tensors that are missing or
unexpected; the error here says what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from alibi_convert.errors import CheckpointError
from alibi_convert.tensors import Tensors

_OUTERMOST = ("module.", "model.")
_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
MERGE = "merge it into its base model first (peft: model.merge_and_unload(), then save_pretrained)"
_ADAPT = f"open its base model with adapter= of the adapter's folder (--adapter), or {MERGE}"
_DEQUANTISE = (
    "save it dequantised first (transformers: from_pretrained, model.dequantize(), save_pretrained)"
)
# A pattern of names; what such a checkpoint is, to follow its path; the way out.
_KINDS = (
    (r"\.lora_(embedding_)?(A|B|magnitude_vector)\b", "holds an adapter", _ADAPT),
    (r"\.(qweight|qzeros|g_idx)$", "is quantised by GPTQ or AWQ", _DEQUANTISE),
    (
        r"\.(SCB|weight_format|(absmax|quant_map|quant_state\.\w+))$",
        "is quantised by bitsandbytes",
        _DEQUANTISE,
    ),
    (
        r"\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point)$",
        "is quantised",
        _DEQUANTISE,
    ),
)


def unwrapped(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors under their names in the model itself, and the prefixes that were removed.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    names, prefixes = unwrapped_names(tensors)
    return Tensors({short: tensors.headers[name] for name, short in names.items()}), prefixes


def unwrapped_names(given: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The names in the model itself, by those given, and the prefixes that were removed.

    `module.` and `model.` are removed only where every name begins with it.

    Raises:
        CheckpointError: two would be one.
    """
    names = {name: _ANYWHERE.sub("", name) for name in given}
    found = dict.fromkeys(word for name in names for word in _ANYWHERE.findall(name))
    while prefix := _common_prefix(list(names.values())):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        found[prefix] = None
    seen: set[str] = set()
    for short in names.values():
        if short in seen:
            raise CheckpointError(f"{short} is there with a wrapper's prefix and without; keep one")
        seen.add(short)
    return names, list(found)


def _common_prefix(names: list[str]) -> str | None:
    for prefix in _OUTERMOST:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return None


def require_plain_tensors(path: Path, names: Iterable[str]) -> None:
    """The tensors are a model's own, not quantised ones nor an adapter's.

    Raises:
        CheckpointError: naming the first that is not, and the way out.
    """
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path} has a tensor under the key {name!r}; expected names: save the model's "
                "state_dict()"
            )
        for pattern, what, way_out in _KINDS:
            if re.search(pattern, name):
                raise CheckpointError(f"{path} {what} ({name}); {way_out}")
