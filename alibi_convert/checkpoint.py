"""One way in: any checkpoint on disk as a configuration and canonical tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alibi_convert import formats, store
from alibi_convert.errors import CheckpointError
from alibi_convert.families import FAMILIES, Family
from alibi_convert.rules import canonical_tensors, check_shapes, flax_tree
from alibi_convert.tensors import DTYPES, Tensors, as_torch
from alibi_spec import ALiBiConfig, parameter_table

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
_FLOATS = frozenset(DTYPES.values())


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: where it was opened.
        format: a key of `formats.FORMATS`.
        family: "alibi-duo", or the foreign family that it was recognised as.
        config: what the model computes.
        tensors: canonical names, torch layout, read when looked up.
        derived: tensors of the file that are not carried over, with the reason.
    """

    path: Path
    format: str
    family: str
    config: ALiBiConfig
    tensors: Tensors
    derived: Mapping[str, str]


def open_checkpoint(
    path: str | os.PathLike[str], *, config: ALiBiConfig | None = None, allow_pt: bool = False
) -> Checkpoint:
    """Recognise and open a checkpoint folder or file, and hold it against the parameter table.

    Args:
        path: a folder of ours or of orbax, or a .safetensors, .pt or .msgpack file.
        config: for files that carry no configuration; otherwise it must agree with theirs.
        allow_pt: read pickled state dicts, with torch's weights_only unpickler.

    Raises:
        CheckpointError: missing, foreign, truncated or incomplete; or a pickle, not allowed.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder or file")
    if path.is_dir():
        kind, config, tensors = _open_folder(path, config)
    else:
        kind, config, tensors = _open_file(path, config, allow_pt)
    odd = {name: each.dtype for name, each in tensors.headers.items() if each.dtype not in _FLOATS}
    if odd:
        name, dtype = next(iter(odd.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}; expected one of {', '.join(DTYPES)}")
    for family in FAMILIES:
        if family.recognises(tensors):
            return _from_family(family, path, kind, config, tensors)
    config = _settle(path, None, config)
    shapes = {row.name: row.shape for row in parameter_table(config)}
    check_shapes(shapes, tensors.shapes)
    ordered = Tensors({name: tensors.headers[name] for name in shapes})
    return Checkpoint(path, kind, store.FORMAT, config, ordered, {})


def _open_folder(
    folder: Path, given: ALiBiConfig | None
) -> tuple[str, ALiBiConfig | None, Tensors]:
    if (folder / store.ORBAX_MARK).exists():  # orbax params alone
        config = _settle(folder, None, given)
        return "orbax", config, formats.read_orbax(folder, config)
    if (folder / store.ORBAX_FOLDER).is_dir():
        config = _settle(folder, store.read_config(folder / store.CONFIG_FILE), given)
        return "orbax", config, formats.read_orbax(folder / store.ORBAX_FOLDER, config)
    carried, tensors = store.read_folder(folder)
    return "alibi", _settle(folder, carried, given), tensors


def _open_file(
    path: Path, given: ALiBiConfig | None, allow_pt: bool
) -> tuple[str, ALiBiConfig | None, Tensors]:
    carried = None
    if path.suffix == ".safetensors":
        tensors, metadata = store.read_safetensors(path)
        if "alibi_config" in metadata:
            carried = store.parse_config(metadata["alibi_config"], f"metadata of {path}")
        return "safetensors", given if carried is None else _settle(path, carried, given), tensors
    if formats.sidecar(path).exists():
        carried = store.read_config(formats.sidecar(path))
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pt:
            raise CheckpointError(
                f"{path} is a pickle, which can be made to run code; if you trust it, pass "
                "allow_pt=True (--allow-pt): it is then read by torch's weights_only unpickler"
            )
        tensors = formats.read_pt(path)
        return "pt", given if carried is None else _settle(path, carried, given), tensors
    if path.suffix == ".msgpack":
        config = _settle(path, carried, given)
        return "msgpack", config, formats.read_msgpack(path, config)
    raise CheckpointError(
        f"{path} has the unknown suffix {path.suffix!r}; expected a folder, .safetensors, "
        f"{', '.join(PICKLE_SUFFIXES)} or .msgpack"
    )


def _settle(path: Path, carried: ALiBiConfig | None, given: ALiBiConfig | None) -> ALiBiConfig:
    """The configuration carried or implied by a checkpoint, or the one given, which must agree.

    The one given may set what a trained model's shapes and values cannot show: dropout, max_len.
    """
    if carried is None:
        if given is None:
            raise CheckpointError(
                f"{path} carries no configuration; pass config=ALiBiConfig(…) (--config FILE)"
            )
        return given
    if given is None:
        return carried
    if replace(carried, dropout=given.dropout, max_len=given.max_len) != given:
        wrong = [
            name for name, value in given.to_dict().items() if value != carried.to_dict()[name]
        ]
        raise CheckpointError(
            f"the configuration given is not that of {path}: they differ in {', '.join(wrong)}"
        )
    return given


def _from_family(
    family: Family, path: Path, kind: str, given: ALiBiConfig | None, tensors: Tensors
) -> Checkpoint:
    config = _settle(path, family.config(tensors), given)
    shapes = {row.name: row.shape for row in parameter_table(config)}
    rules, derived = family.rules(config), family.derived(config)
    check_shapes(
        {rule.foreign: rule.foreign_shape(shapes[rule.canonical[0]]) for rule in rules},
        {name: shape for name, shape in tensors.shapes.items() if name not in derived},
    )
    arrays = {}
    for rule in rules:
        arrays.update(rule.apply(tensors[rule.foreign]))
    dropped = {name: reason for name, reason in derived.items() if name in tensors}
    ordered = {name: arrays[name] for name in shapes}
    return Checkpoint(path, kind, family.name, config, Tensors.of(ordered), dropped)


def torch_to_flax(state_dict: Mapping[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    """A torch `state_dict` as a nested Flax params tree of NumPy arrays, bit for bit.

    Args:
        state_dict: torch tensors (or arrays) by the names of `parameter_table(config)`.
        config: with `vocab_size` the tree is that of `ALiBiLM`, else of `ALiBiTransformer`.

    Raises:
        CheckpointError: tensors missing, unexpected or of the wrong shape.
    """
    return flax_tree(Tensors.of(state_dict), config)


def flax_to_torch(params: Mapping[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    """A Flax params tree as a dict of torch tensors for `load_state_dict`, bit for bit.

    Args:
        params: nested mapping of JAX or NumPy arrays, as `init` returns under "params".
        config: as for `torch_to_flax`.

    Raises:
        CheckpointError: leaves missing, unexpected or of the wrong shape.
    """
    return {name: as_torch(array) for name, array in canonical_tensors(params, config).items()}
