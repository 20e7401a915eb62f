"""Pickles of torch, read with consent, only by torch's weights_only unpickler.

Archives are checked before torch maps them, and the tensors are checked after that.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_convert.errors import CheckpointError
from alibi_convert.families import FAMILIES
from alibi_convert.files import open_regular, require_regular
from alibi_convert.formats.config_file import read_sidecar, with_sidecar, write_sidecar
from alibi_convert.formats.format import Asked, Beside, Format, Opened
from alibi_convert.formats.zip_file import MAGIC, check_zip
from alibi_convert.machine import require
from alibi_convert.tensors import Tensors, as_torch
from alibi_spec import ALiBiConfig

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Where training runs keep the state dict in their pickles.
_ENTRIES = (
    ("state_dict",),
    ("model_state_dict",),
    ("state", "model"),
    ("state",),
    ("model",),
)

# What torch.load and the unpickler under it raise for broken files.
_UNPICKLING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
)


def require_consent(path: Path, allow_pt: bool) -> None:
    """Raise CheckpointError, before a file is unpickled, unless pickles are allowed."""
    require_regular(path)
    if not allow_pt:
        raise CheckpointError(
            f"{path} is a pickle, which can be made to run code; if you trust it, pass "
            "allow_pt=True (--allow-pt): it is then read by torch's weights_only unpickler"
        )


def load_pickle(path: Path, allow_pt: bool) -> Any:
    """What torch.save wrote: values and, mapped from the file, tensors.

    `Namespace` is allowed too: it holds values and runs nothing.

    Raises:
        CheckpointError: not allowed, damaged, or holding objects of other classes.
    """
    require_consent(path, allow_pt)
    require("torch", "torch", "reading .pt")
    import torch

    with open_regular(path) as file:
        is_zip = file.read(len(MAGIC)) == MAGIC  # files from before torch 1.6 are not
    entries = check_zip(path) if is_zip else {}
    if any(name.endswith("constants.pkl") for name in entries):
        raise CheckpointError(f"{path} is a TorchScript program; save only its state_dict()")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols and of storages with types
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _UNPICKLING_ERRORS as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to trust it
            cause = "it may hold more than tensors; save only the model's state_dict()"
        raise CheckpointError(f"{path} is truncated or not a plain state dict: {cause}") from None
    if is_zip:
        _check_mapped(path, entries, list(_tensors(saved)))
    return saved


def state_dict(saved: Any, path: Path) -> Tensors:
    """The tensors of a torch state dict, mapped from the file at `path`.

    Raises:
        CheckpointError: something else, or more than dense tensors of known dtypes.
    """
    import torch

    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} holds a {type(saved).__name__}, expected a state dict")
    others = [
        name
        for name, value in saved.items()
        if not isinstance(value, torch.Tensor) or not isinstance(name, str)
    ]
    if others:
        raise CheckpointError(
            f"{path} holds more than tensors ({', '.join(map(str, others[:4]))}); save only "
            "the model's state_dict()"
        )
    for name, tensor in saved.items():
        if not _is_plain(tensor):
            raise CheckpointError(
                f"{path}: {name} is {_described(tensor)}; expected a dense tensor with data of its "
                "own; save the model's state_dict() in a float dtype"
            )
    try:
        return Tensors.of(saved)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.nbytes <= tensor.untyped_storage().nbytes()  # not expanded
    )


def _described(tensor: Any) -> str:
    kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
    return f"{tensor.dtype} {list(tensor.shape)} ({kind})"


def _tensors(value: Any) -> Iterator[Any]:
    """Dense tensors with data, in nested dicts, lists and tuples."""
    import torch

    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            if each.layout is torch.strided and each.device.type == "cpu":
                yield each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each


def _check_mapped(path: Path, entries: Mapping[str, tuple[int, int]], tensors: list[Any]) -> None:
    """Every storage is one entry of the archive, whole: torch does not check this when it maps.

    It is not known where in memory the file begins, but all storages must agree on it.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    places = {(each.data_ptr(), each.nbytes()) for each in storages if each.nbytes()}
    begins = [
        {address - start for start, size in entries.values() if size == nbytes}
        for address, nbytes in places
    ]
    if begins and not set.intersection(*begins):
        raise CheckpointError(f"{path} is damaged: its tensors do not fit the data it holds")


@dataclass(frozen=True)
class _Found:
    """The state dict in what was pickled.

    Attributes:
        state: it.
        keys: that lead to it.
        left: the other keys, with the reason why they are dropped.
        optimizers: the states of optimizers under them.
    """

    state: Any
    keys: list[str]
    left: Mapping[str, str]
    optimizers: Mapping[str, Any]

    @property
    def optimizer(self) -> Beside | None:
        """The state of the one optimizer; of several none is the model's alone."""
        if len(self.optimizers) != 1:
            return None
        ((name, state),) = self.optimizers.items()
        return Beside(name, "torch", lambda: state)


def _find_state_dict(saved: Any) -> _Found:
    """The state dict in a pickle of a training run, or else all that was pickled."""
    for keys in _ENTRIES:
        node: Any = saved
        left: dict[str, str] = {}
        optimizers: dict[str, Any] = {}
        for key in keys:
            if not isinstance(node, Mapping) or not isinstance(node.get(key), Mapping):
                break
            left |= {str(name): f"not in {key}, which is the model" for name in node if name != key}
            optimizers |= _optimizers(node)
            node = node[key]
        else:
            return _Found(node, list(keys), left, optimizers)
    return _Found(saved, [], {}, {})


def _optimizers(node: Mapping[Any, Any]) -> dict[str, Any]:
    """The states of optimizers among some values; Lightning and Composer have them in lists."""
    found = {}
    for name, value in node.items():
        inside = list(value.values()) if isinstance(value, Mapping) else value
        is_one = isinstance(inside, list) and len(inside) == 1
        for state in (value, *(inside if is_one else ())):
            if isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys():
                found[str(name)] = state
    return found


def recognises(path: Path) -> bool:
    """By the name."""
    return path.suffix in PICKLE_SUFFIXES


def read(path: Path, asked: Asked) -> Opened:
    """A state dict, also in what a training run or a family's library saves.

    Raises:
        CheckpointError: as for `load_pickle` and `state_dict`.
    """
    carried, files = read_sidecar(path), with_sidecar(path)
    saved = load_pickle(path, asked.allow_pt)
    for family in FAMILIES:
        found = family.unpickled(saved)
        if found is not None:
            return Opened("pt", path, files, state_dict(found[1], path), foreign=found[0])
    found = _find_state_dict(saved)
    return Opened(
        *("pt", path, files, state_dict(found.state, path), carried),
        left=found.left,
        wrappers=found.keys,
        optimizer=found.optimizer,
    )


def write(
    path: Path, config: ALiBiConfig, tensors: Tensors, optimizer: Any = None, **_: Any
) -> dict[str, str]:
    """A torch state dict, and its configuration in another file.

    With an optimizer's state it is one of two entries: `model` and `optimizer`.
    """
    save(path, tensors, optimizer)
    write_sidecar(path, config)
    return {}


def save(path: Path, tensors: Tensors, optimizer: Any = None) -> None:
    """The tensors as a pickled dict, without any configuration."""
    require("torch", "torch", "writing .pt")
    import torch

    state: dict[str, Any] = {name: as_torch(array) for name, array in tensors.items()}
    if optimizer is not None:
        state = {"model": state, "optimizer": optimizer}
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # it hides the error of the disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


FORMAT = Format(
    *("torch state dict, pickled", ".pt", write, recognises, read), library=("torch", "torch")
)
