"""Checkpoints that hold no model as they are: told by the names of their tensors and files.

They would be refused in any case, by what is missing or unexpected; here by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from alibi_convert.errors import CheckpointError
from alibi_convert.files import read_json
from alibi_convert.writing.layout import is_weight_file

_ADAPTER_CONFIG = "adapter_config.json"
_MERGE = "merge it into its base model first (peft: model.merge_and_unload(), then save_pretrained)"
_DEQUANTISE = (
    "save it dequantised first (transformers: from_pretrained, model.dequantize(), save_pretrained)"
)
# What names of tensors say, as the beginning of a sentence, and the way out.
_KINDS = (
    (r"\.lora_(embedding_)?(A|B|magnitude_vector)\b", "holds an adapter", _MERGE),
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


def require_model(folder: Path) -> None:
    """The folder is not that of an adapter alone.

    Raises:
        CheckpointError: naming the base model.
    """
    if (folder / _ADAPTER_CONFIG).exists() and not any(map(is_weight_file, folder.iterdir())):
        base = read_json(folder / _ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(f"{folder} holds an adapter alone, for {base!r}; {_MERGE}")
