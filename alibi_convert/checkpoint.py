"""One way in: any checkpoint on disk as a configuration and canonical tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from alibi_convert import formats
from alibi_convert.adapters import Adapter, Merged, merge, open_adapter
from alibi_convert.errors import CheckpointError
from alibi_convert.families import (
    FAMILIES,
    Family,
    Source,
    import_tensors,
    settle_ties,
    tied_head,
)
from alibi_convert.families.keys import MISSING, look_up
from alibi_convert.formats.config_file import OURS
from alibi_convert.formats.format import Asked, Beside, Opened
from alibi_convert.formats.names import require_plain_tensors
from alibi_convert.hub import resolve
from alibi_convert.rules import canonical_tensors, check_shapes, flax_tree
from alibi_convert.tensors import DTYPES, Tensors, as_torch
from alibi_spec import ALiBiConfig, parameter_table

# A configuration from elsewhere: ours, or the contents of a family's config.json.
GivenConfig = ALiBiConfig | Mapping[str, Any]
_TIED_HEAD = tied_head("token_embedding.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: where it was opened.
        format: a key of `formats.FORMATS`, or "folder" for that of another library.
        family: "alibi-duo", or the foreign family that it was recognised as.
        config: what the model computes.
        tensors: canonical names, torch layout, read when looked up.
        derived: tensors of the file that are dropped, with the reason.
        origins: names in the file of what each tensor comes from, where they differ from ours.
        folded: tensors that are computed from those of the file, with the reason.
        foreign_config: the config.json of another family's folder.
        ignored: keys of it that the caller said to ignore, with their values.
        wrappers: keys and prefixes of training that were removed from the names in the file.
        files: those with the configuration and the weights, by name.
        source: as it was given, or which one it was of several revisions, or of orbax's steps.
        optimizer: the state of the optimizer that trained it, where its parameters are ours.
        merged: the adapter that was merged into it, and what became of its tensors.
        inside: companions that the file itself holds, by name.
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
    ignored: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[str] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    source: str = ""
    optimizer: Beside | None = None
    merged: Merged | None = None
    inside: Callable[[], Mapping[str, bytes]] = dict

    @property
    def adapter(self) -> dict[str, Any]:
        """What reports say of the adapter, as plain JSON values; empty where there is none."""
        return {} if self.merged is None else self.merged.to_dict()


class Reading(TypedDict, total=False):
    """How a source is read: the options of `open_checkpoint`, which documents them."""

    config: GivenConfig | None
    allow_pt: bool
    ignore_keys: Collection[str]
    step: int | None
    revision: str | None
    adapter: str | os.PathLike[str] | None


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: GivenConfig | None = None,
    allow_pt: bool = False,
    ignore_keys: Collection[str] = (),
    step: int | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Recognise and open a checkpoint folder or file, and hold it against the parameter table.

    Args:
        path: a folder of ours, of a known family or of orbax, a .safetensors, .pt, .msgpack
            or .gguf file, or the id of a folder on the Hugging Face hub.
        config: for files that carry no configuration; otherwise it must agree with theirs. An
            ALiBiConfig, or the contents of a family's config.json, whose names of tensors the file
            may have.
        allow_pt: read pickled state dicts, with torch's weights_only unpickler.
        ignore_keys: keys of a foreign config.json that are not known and change nothing; a dot
            leads into an object.
        step: of a folder of orbax's CheckpointManager; None is the latest.
        revision: branch, tag or commit on the hub.
        adapter: a folder that peft saved, or its id on the hub: LoRA of a family's model, which is
            merged into it tensor by tensor as they are read.

    Raises:
        CheckpointError: missing, foreign, truncated or incomplete; or a pickle, not allowed; or an
            adapter that cannot be merged exactly.
    """
    place = resolve(path, allow_pt, revision, needs_weights=True)
    if not os.path.exists(place):  # unlike Path.exists, False for names that no file can have
        raise CheckpointError(f"{place} does not exist; give a checkpoint folder or file")
    ignored = frozenset(ignore_keys)

    def settle(carried: ALiBiConfig | None) -> ALiBiConfig:
        return _settle(place, carried, _as_config(config, Tensors({}), ignored))

    opened = formats.read(place, Asked(allow_pt, step, settle))
    found = None if adapter is None else open_adapter(resolve(adapter, allow_pt), allow_pt)
    given = str(path) if revision is None else f"{path}@{revision}"
    return replace(
        _recognised(opened, config, ignored, found),
        source=str(opened.path) if opened.format == "orbax" else given,
        files={**opened.files, **({} if found is None else found.files)},
        wrappers=opened.wrappers,
        inside=opened.inside,
    )


def _recognised(
    opened: Opened, given: GivenConfig | None, ignored: frozenset[str], adapter: Adapter | None
) -> Checkpoint:
    """The model of a known family or of ours, from what a format has read."""
    path, tensors = opened.path, opened.tensors
    source = Source(opened.foreign, tensors, ignored)
    has_our_names = any(name.startswith("transformer.layers.") for name in tensors)
    if isinstance(given, Mapping) and source.config is None and not has_our_names:
        source = Source(given, tensors, ignored)
    family = _family(source) if opened.carried is None else None
    if family is not None:
        config = _as_config(given, family.renamed(tensors), ignored)
        found = _from_family(family, path, opened.format, config, source, adapter)
    elif source.config is not None:
        raise _unknown_family(str(path), source.config)
    elif adapter is not None:
        raise CheckpointError(
            f"{path} has our names of tensors, {adapter.path} those of the model that peft saw; "
            "open the family's checkpoint that this one was made of"
        )
    else:
        _require_floats(path, tensors)
        config = _settle(path, opened.carried, _as_config(given, tensors, ignored))
        _require_layers(path, config, tensors)
        ordered, dropped = _own_tensors(tensors, config)
        found = Checkpoint(
            *(path, opened.format, OURS, config, ordered, dropped), optimizer=opened.optimizer
        )
    return replace(found, derived={**opened.left, **found.derived})


def _own_tensors(tensors: Tensors, config: ALiBiConfig) -> tuple[Tensors, dict[str, str]]:
    """The parameters of a configuration, in order; the names that are dropped, with the reason."""
    settled = settle_ties(_TIED_HEAD(config), tensors)
    shapes = {row.name: row.shape for row in parameter_table(config)}
    check_shapes(shapes, settled.tensors.shapes)
    return Tensors({name: settled.tensors.headers[name] for name in shapes}), settled.dropped


def _family(source: Source) -> Family | None:
    return next((family for family in FAMILIES if family.recognises(source)), None)


def _unknown_family(origin: str, foreign: Mapping[str, Any]) -> CheckpointError:
    return CheckpointError(
        f"{origin} is of no known family (model_type {foreign.get('model_type')!r}); known: "
        f"{OURS}, {', '.join(family.name for family in FAMILIES)}"
    )


def _as_config(
    given: GivenConfig | None, tensors: Tensors, ignored: frozenset[str]
) -> ALiBiConfig | None:
    """The configuration that the caller gave, as an `ALiBiConfig`."""
    if not isinstance(given, Mapping):
        return given
    source = Source(given, tensors, ignored)
    family = _family(source)
    if family is None:
        raise _unknown_family("the configuration given", given)
    return family.read_config(source)


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


def _require_floats(path: Path, tensors: Tensors) -> None:
    for name, header in tensors.headers.items():
        if header.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name} is {header.dtype}; expected one of {', '.join(DTYPES)}"
            )


def _require_layers(path: Path, config: ALiBiConfig, tensors: Tensors) -> None:
    """Refuse more layers than the file can hold, before a table of them is made."""
    if config.num_layers > len(tensors):
        raise CheckpointError(
            f"{path}: the configuration has {config.num_layers:,} layers, the file "
            f"{len(tensors):,} tensors"
        )


def _from_family(
    family: Family,
    path: Path,
    kind: str,
    given: ALiBiConfig | None,
    source: Source,
    adapter: Adapter | None,
) -> Checkpoint:
    source = replace(source, tensors=family.renamed(source.tensors))
    merged = None if adapter is None else merge(adapter, family, source)
    source = source if merged is None else merged.source
    config = _settle(path, family.read_config(source), given)
    _require_layers(path, config, source.tensors)
    found = import_tensors(family, config, source)
    _require_floats(path, found.tensors)
    return Checkpoint(
        *(path, kind, family.name, config, found.tensors),
        derived=found.dropped,
        origins=found.origins,
        folded=found.folded,
        foreign_config=source.config,
        ignored=_found(source),
        merged=merged,
    )


def _found(source: Source) -> dict[str, Any]:
    values = {name: look_up(source.config or {}, name) for name in sorted(source.ignored)}
    return {name: value for name, value in values.items() if value is not MISSING}


def torch_to_flax(state_dict: Mapping[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    """A torch `state_dict` as a nested Flax params tree of NumPy arrays, bit for bit.

    Args:
        state_dict: torch tensors (or arrays) by the names of `parameter_table(config)`.
        config: with `vocab_size` the tree is that of `ALiBiLM`, else of `ALiBiTransformer`.

    Raises:
        CheckpointError: tensors missing, unexpected or of the wrong shape.
    """
    require_plain_tensors(Path("the state dict"), state_dict)
    return flax_tree(_own_tensors(Tensors.of(state_dict), config)[0], config)


def flax_to_torch(params: Mapping[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    """A Flax params tree as a dict of torch tensors for `load_state_dict`, bit for bit.

    Args:
        params: mapping of JAX or NumPy arrays, nested as `init` returns it under "params", or
            flattened by "/" or to tuples of names.
        config: as for `torch_to_flax`.

    Raises:
        CheckpointError: leaves missing, unexpected or of the wrong shape.
    """
    return {name: as_torch(array) for name, array in canonical_tensors(params, config).items()}
