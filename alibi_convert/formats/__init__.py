"""Every format of checkpoints, in one table for both directions; one file each.

torch, flax and orbax are imported by the format that needs them, when it is used. The formats of
these three (.pt, .msgpack, orbax) hold the whole model in memory; folders, .safetensors and .gguf
stream.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from alibi_convert.errors import CheckpointError
from alibi_convert.families import FAMILIES, export_tensors
from alibi_convert.formats import folder, gguf, msgpack, orbax, pt, safetensors
from alibi_convert.formats.format import Asked, Format, Opened, Writing, no_steps
from alibi_convert.formats.names import require_plain_tensors, unwrapped
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig


def exported(
    config_json: Callable[[ALiBiConfig], dict[str, Any]],
    foreign: Callable[[ALiBiConfig, Tensors], Tensors],
    description: str,
    suffix: str = "",
) -> Format:
    """What another library reads: a folder, or only a state dict, with tensors by its names.

    Args:
        config_json: the contents of `config.json`; raises CheckpointError for a configuration that
            the library cannot express.
        foreign: the canonical tensors under the library's names and in its layouts, unread.
        description: one line for the help text.
        suffix: ".pt" for a state dict; empty for a folder.
    """

    def stored(config: ALiBiConfig, tensors: Tensors) -> Tensors:
        config_json(config)  # raises where the library cannot express the configuration
        return foreign(config, tensors)

    def write_file(path: Path, config: ALiBiConfig, tensors: Tensors, **_: Any) -> dict[str, str]:
        pt.save(path, stored(config, tensors))
        return {}

    def write_folder(
        path: Path, config: ALiBiConfig, tensors: Tensors, **options: Unpack[Writing]
    ) -> dict[str, str]:
        dtypes = {str(header.dtype) for header in tensors.headers.values()}
        values = config_json(config) | ({"dtype": dtypes.pop()} if len(dtypes) == 1 else {})
        text = json.dumps(values, indent=2) + "\n"
        return folder.write_files(path, text, foreign(config, tensors), **options)

    if suffix:
        return dataclasses.replace(
            pt.FORMAT, description=description, write=write_file, read=None, stored=stored
        )
    return Format(description, "", write_folder, streams=True, stored=stored)


FORMATS: dict[str, Format] = {
    "alibi": folder.FORMAT,
    "safetensors": safetensors.FORMAT,
    "pt": pt.FORMAT,
    "msgpack": msgpack.FORMAT,
    "orbax": orbax.FORMAT,
    "gguf": gguf.FORMAT,
    **{
        family.name: exported(
            family.write_config, partial(export_tensors, family), family.label, family.suffix
        )
        for family in FAMILIES
        if family.write_config is not None
    },
}

_ORBAX_SUFFIX = ".orbax"  # a folder's name may say what is in it
# A suffix of letters asks for a format, and so do these. Any other dot is part of a folder's name,
# as in v1.5.
_SUFFIXES_WITH_DIGITS = frozenset((".h5", ".hdf5", ".pt2"))


def read(path: Path, asked: Asked) -> Opened:
    """What a path holds, read as the format that recognises it, under the model's own names.

    Raises:
        CheckpointError: none does; a step is asked for where there are none; the path is broken; or
            it holds an adapter or quantised weights.
    """
    for kind in FORMATS.values():
        if kind.read is not None and kind.recognises(path):
            break
    else:
        raise CheckpointError(
            f"{path} has the unknown suffix {path.suffix!r}; expected a folder, .safetensors, "
            f"{', '.join(pt.PICKLE_SUFFIXES)}, .msgpack or .gguf"
        )
    if asked.step is not None and kind is not orbax.FORMAT:
        raise no_steps(path, asked.step)
    opened = kind.read(path, asked)
    tensors, prefixes = unwrapped(opened.tensors)
    require_plain_tensors(opened.path, tensors)
    wrappers = [*opened.wrappers, *prefixes]
    return dataclasses.replace(opened, tensors=tensors, wrappers=wrappers)


def by_suffix(destination: Path) -> str:
    """The format that the name of a destination asks for; a folder of ours if it asks for none.

    Raises:
        ValueError: the name asks for a format that is not written.
    """
    # The first of a suffix: a .pt is a state dict of ours unless jaketae's is asked for.
    known = {kind.suffix: name for name, kind in reversed(FORMATS.items()) if kind.suffix}
    known[_ORBAX_SUFFIX] = "orbax"
    suffix = destination.suffix
    asks_for_format = suffix[1:].isalpha() or suffix.lower() in _SUFFIXES_WITH_DIGITS
    if suffix not in known and asks_for_format:
        raise ValueError(
            f"{destination}: {suffix} is not written; expected {', '.join(sorted(known))} or a "
            'folder\'s name; to="alibi" (--to alibi) makes a folder of this one'
        )
    return known.get(suffix, "alibi")
