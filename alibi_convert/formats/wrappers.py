"""What training wraps a model in, as the names of its tensors show it.

DistributedDataParallel, a LightningModule or a ComposerModel put one word before every name;
torch.compile, FSDP and activation checkpointing put theirs before the names of any submodule.
"""

from __future__ import annotations

import re

from alibi_convert.errors import CheckpointError
from alibi_convert.tensors import LazyTensor, Tensors

_OUTERMOST = ("module.", "model.")
_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def unwrapped(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors under the names that they have in the model itself, and what was cut off.

    `module.` and `model.` are cut off only where every name begins with it.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    found: dict[str, None] = {}
    names = {name: _ANYWHERE.sub("", name) for name in tensors}
    found |= dict.fromkeys(word for name in tensors for word in _ANYWHERE.findall(name))
    while prefix := _common_prefix(list(names.values())):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        found[prefix] = None
    headers: dict[str, LazyTensor] = {}
    for name, short in names.items():
        if short in headers:
            raise CheckpointError(f"{short} is there with a wrapper's prefix and without; keep one")
        headers[short] = tensors.headers[name]
    return Tensors(headers), list(found)


def _common_prefix(names: list[str]) -> str | None:
    for prefix in _OUTERMOST:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return None
