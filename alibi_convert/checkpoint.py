"""One way in: any checkpoint on disk as a configuration and canonical tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alibi_convert import formats, store
from alibi_convert.errors import CheckpointError
from alibi_convert.families import FAMILIES, Family, Source, fairseq, import_tensors
from alibi_convert.hub import resolve
from alibi_convert.layout import lfs_pointers
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
        origins: names in the file of what each tensor comes from, where they differ from ours.
        folded: tensors that are computed from those of the file, with the reason.
        foreign_config: the config.json of another family's folder.
    """

    path: Path
    format: str
    family: str
    config: ALiBiConfig
    tensors: Tensors
    derived: Mapping[str, str]
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    foreign_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Opened:
    """What a path holds: a configuration of ours, or a foreign one, or none; and tensors."""

    format: str
    tensors: Tensors
    carried: ALiBiConfig | None = None
    foreign: Mapping[str, Any] | None = None


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: ALiBiConfig | None = None,
    allow_pt: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Recognise and open a checkpoint folder or file, and hold it against the parameter table.

    Args:
        path: a folder of ours, of a known family or of orbax, a .safetensors, .pt or .msgpack
            file, or the id of a folder on the Hugging Face hub.
        config: for files that carry no configuration; otherwise it must agree with theirs.
        allow_pt: read pickled state dicts, with torch's weights_only unpickler.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: missing, foreign, truncated or incomplete; or a pickle, not allowed.
    """
    path = resolve(path, allow_pt, revision, needs_weights=True)
    try:
        return _open(path, config, allow_pt)
    except CheckpointError as error:
        pointers = [file for file in lfs_pointers(path) if file.name in str(error)]
        if not pointers:
            raise
        raise CheckpointError(
            f"{pointers[0]} is a pointer of git-LFS, not the file itself; run `git lfs pull` in "
            f"{pointers[0].parent}"
        ) from None


def _open(path: Path, config: ALiBiConfig | None, allow_pt: bool) -> Checkpoint:
    if not os.path.exists(path):  # unlike Path.exists, False for names that no file can have
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder or file")
    if path.is_dir():
        opened = _open_folder(path, config, allow_pt)
    else:
        opened = _open_file(path, config, allow_pt)
    tensors = opened.tensors
    odd = {name: each.dtype for name, each in tensors.headers.items() if each.dtype not in _FLOATS}
    source = Source(opened.foreign, tensors)
    if opened.carried is None:
        for family in FAMILIES:
            if family.recognises(source):
                return _from_family(family, path, opened.format, config, source)
    if opened.foreign is not None:
        kind = opened.foreign.get("model_type")
        raise CheckpointError(
            f"{path} is of no known family (model_type {kind!r}); known: alibi-duo, "
            f"{', '.join(family.name for family in FAMILIES)}"
        )
    if odd:
        name, dtype = next(iter(odd.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}; expected one of {', '.join(DTYPES)}")
    config = _settle(path, opened.carried, config)
    _require_layers(path, config, tensors)
    shapes = {row.name: row.shape for row in parameter_table(config)}
    check_shapes(shapes, tensors.shapes)
    ordered = Tensors({name: tensors.headers[name] for name in shapes})
    return Checkpoint(path, opened.format, store.FORMAT, config, ordered, {})


def _open_folder(folder: Path, given: ALiBiConfig | None, allow_pt: bool) -> _Opened:
    if (folder / store.ORBAX_MARK).exists():  # orbax params alone
        config = _settle(folder, None, given)
        return _Opened("orbax", formats.read_orbax(folder, config), config)
    if (folder / store.ORBAX_FOLDER).is_dir():
        config = _settle(folder, store.read_config(folder / store.CONFIG_FILE), given)
        tensors = formats.read_orbax(folder / store.ORBAX_FOLDER, config)
        return _Opened("orbax", tensors, config)
    if not (folder / store.CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} has no config.json; expected a checkpoint folder")
    text, origin = (folder / store.CONFIG_FILE).read_bytes(), str(folder / store.CONFIG_FILE)
    values = store.parse_json(text, origin)
    if "model_type" in values and "format" not in values:
        return _Opened("folder", store.read_tensors(folder, allow_pt), foreign=values)
    carried = store.parse_config(text, origin)
    return _Opened("alibi", store.read_tensors(folder, allow_pt), carried)


def _open_file(path: Path, given: ALiBiConfig | None, allow_pt: bool) -> _Opened:
    carried = None
    if path.suffix == ".safetensors":
        tensors, metadata = store.read_safetensors(path)
        if "alibi_config" in metadata:
            carried = store.parse_config(metadata["alibi_config"], f"metadata of {path}")
        return _Opened("safetensors", tensors, carried)
    if formats.sidecar(path).exists():
        carried = store.read_config(formats.sidecar(path))
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pt:
            raise CheckpointError(
                f"{path} is a pickle, which can be made to run code; if you trust it, pass "
                "allow_pt=True (--allow-pt): it is then read by torch's weights_only unpickler"
            )
        source = fairseq.load(path)
        if source is not None:
            return _Opened("pt", source.tensors, foreign=source.config)
        return _Opened("pt", formats.read_pt(path), carried)
    if path.suffix == ".msgpack":
        config = _settle(path, carried, given)
        return _Opened("msgpack", formats.read_msgpack(path, config), config)
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


def _require_layers(path: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    """A table of so many layers is not even made for a file that cannot hold them."""
    if config.num_layers > len(tensors):
        raise CheckpointError(
            f"{path}: the configuration has {config.num_layers:,} layers, the file "
            f"{len(tensors):,} tensors"
        )


def _from_family(
    family: Family, path: Path, kind: str, given: ALiBiConfig | None, source: Source
) -> Checkpoint:
    source = Source(source.config, family.renamed(source.tensors))
    config = _settle(path, family.read_config(source), given)
    _require_layers(path, config, source.tensors)
    found = import_tensors(family, config, source)
    for name, header in found.tensors.headers.items():
        if header.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {name} is {header.dtype}; expected one of {', '.join(DTYPES)}"
            )
    return Checkpoint(
        *(path, kind, family.name, config, found.tensors),
        derived=found.derived,
        origins=found.origins,
        folded=found.folded,
        foreign_config=source.config,
    )


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
