"""Checkpoints by their name on the Hugging Face hub; without that library, only paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from alibi_convert.errors import CheckpointError
from alibi_convert.machine import is_installed

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".msgpack", ".gguf", ".json")
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_PICKLES = ("*.bin",)


def resolve(
    path: str | os.PathLike[str],
    allow_pt: bool = False,
    revision: str | None = None,
    needs_weights: bool = False,
) -> Path:
    """The path itself if it exists; the folder of `org/name`, fetched from the hub if need be.

    Args:
        path: a path, in which `~` is the user's home, or `org/name`.
        allow_pt: fetch pickles where there is no .safetensors file.
        revision: branch, tag or commit on the hub; None is its main branch.
        needs_weights: a repository without weights that may be read is an error.

    Raises:
        CheckpointError: no such path, and the name cannot be had from the hub; or a path with a
            revision.
    """
    name = os.path.expanduser(path)
    if os.path.exists(name) or not _NAME.fullmatch(name) or name.endswith(_FILE_SUFFIXES):
        if revision is not None:
            raise CheckpointError(
                f"{name} is a path, and only models on the hub have revisions; omit "
                "revision (--revision)"
            )
        return Path(name)
    if not is_installed("huggingface_hub"):
        raise CheckpointError(
            f"there is no path {name}; to fetch a model of that name from the hub, "
            "pip install 'alibi-duo[hub]'"
        )
    folder = _snapshot(name, revision, _FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    if allow_pt:
        return _snapshot(name, revision, (*_FILES, *_PICKLES))
    if needs_weights:
        raise CheckpointError(
            f"{name} on the hub has no .safetensors file; its pickles, if it has any "
            "(pytorch_model.bin), can be made to run code: if you trust them, pass allow_pt=True "
            "(--allow-pt); of files for llama.cpp (.gguf) download one and give its path"
        )
    return folder


def _snapshot(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    missing = f"there is no path {name}, and the hub"
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
        return Path(found)
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{missing} gives {name} only to those who accepted its terms; accept them on its page "
            "and log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{missing} has none of that name; mind the spelling, and log in if it is private "
            "(hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"the hub has no revision {revision!r} of {name}; give a branch, a tag or a commit"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{missing} takes no such name: {error}") from None
    except (
        OSError,
        getattr(errors, "HTTPError", OSError),
    ) as error:  # offline and not cached; the network; the disk
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{missing} cannot be asked: {cause}; connect (and unset HF_HUB_OFFLINE), or give the "
            "path of a copy"
        ) from None
