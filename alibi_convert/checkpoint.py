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
        config: for files that do not carry a configuration.
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
    if config is not None:
        shapes = {row.name: row.shape for row in parameter_table(config)}
        check_shapes(shapes, tensors.shapes)
        ordered = Tensors({name: tensors.headers[name] for name in shapes})
        return Checkpoint(path, kind, store.FORMAT, config, ordered, {})
    raise CheckpointError(
        f"{path} carries no configuration; pass config=ALiBiConfig(…) (--config FILE)"
    )


def _open_folder(
    folder: Path, config: ALiBiConfig | None
) -> tuple[str, ALiBiConfig | None, Tensors]:
    if (folder / store.ORBAX_MARK).exists():  # orbax params alone
        if config is None:
            raise CheckpointError(
                f"{folder} is an orbax checkpoint without a configuration; pass "
                "config=ALiBiConfig(…) (--config FILE)"
            )
        return "orbax", config, formats.read_orbax(folder, config)
    if (folder / store.ORBAX_FOLDER).is_dir():
        config = store.read_config(folder / store.CONFIG_FILE)
        return "orbax", config, formats.read_orbax(folder / store.ORBAX_FOLDER, config)
    return "alibi", *store.read_folder(folder)


def _open_file(
    path: Path, config: ALiBiConfig | None, allow_pt: bool
) -> tuple[str, ALiBiConfig | None, Tensors]:
    if path.suffix == ".safetensors":
        tensors, metadata = store.read_safetensors(path)
        if config is None and "alibi_config" in metadata:
            config = store.parse_config(metadata["alibi_config"], f"metadata of {path}")
        return "safetensors", config, tensors
    if config is None and formats.sidecar(path).exists():
        config = store.read_config(formats.sidecar(path))
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pt:
            raise CheckpointError(
                f"{path} is a pickle, which can be made to run code; if you trust it, pass "
                "allow_pt=True (--allow-pt): it is then read by torch's weights_only unpickler"
            )
        return "pt", config, formats.read_pt(path)
    if path.suffix == ".msgpack":
        if config is None:
            raise CheckpointError(
                f"{path} carries no configuration and {formats.sidecar(path).name} is missing; "
                "pass config=ALiBiConfig(…) (--config FILE)"
            )
        return "msgpack", config, formats.read_msgpack(path, config)
    raise CheckpointError(
        f"{path} has the unknown suffix {path.suffix!r}; expected a folder, .safetensors, "
        f"{', '.join(PICKLE_SUFFIXES)} or .msgpack"
    )


def _from_family(
    family: Family, path: Path, kind: str, given: ALiBiConfig | None, tensors: Tensors
) -> Checkpoint:
    config = family.config(tensors)
    if given is not None:  # it may add what shapes cannot say, and nothing else
        config = replace(config, dropout=given.dropout, max_len=given.max_len)
        if config != given:
            raise CheckpointError(
                f"the configuration given is not that of {path}, which is {config}"
            )
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
