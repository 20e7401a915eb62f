"""Checkpoints in and out of the Flax models; the only file here that knows `alibi_convert`."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from alibi_convert.checkpoint import Reading, open_checkpoint
from alibi_convert.errors import CheckpointError
from alibi_convert.rules import flax_tree, flax_view, unread_tensors
from alibi_convert.tensors import Tensors
from alibi_convert.writing.origin import origin_of, save_folder
from alibi_flax.divided import OnHost
from alibi_flax.model import ALiBiLM, ALiBiTransformer
from alibi_flax.sharding import parameter_sharding
from alibi_flax.stacking import stacked
from alibi_spec import Parameter

_FAILED = "!"  # no name of a tensor begins like this
_MESSAGE_BYTES = 2048


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Mesh | Sharding | Callable[[Parameter], Sharding] | None = None,
    implementation: str = "auto",
    scan_layers: bool = False,
    **reading: Unpack[Reading],
) -> tuple[ALiBiLM | ALiBiTransformer, dict[str, Any]]:
    """Open any checkpoint that `alibi inspect` recognises: the model, and its params.

    Tensors go to the devices one by one, to each device only its part; the host holds at most one
    more at a time.

    Args:
        path: a checkpoint folder of ours or of a known family, a .safetensors, .pt, .msgpack or
            .gguf file, or the id of a folder on the Hugging Face hub.
        dtype: of the parameters, except learned slopes, which never become narrower than float32,
            and of the computation; None keeps the checkpoint's.
        sharding: where parameters go: a mesh, over which they are divided as `shardings` says, one
            sharding for all, or a function from a row of `parameter_table`, whose `logical_axes`
            name the axes; None is JAX's default device.
        implementation: of attention: "auto" or one of `attention_implementations()`.
        scan_layers: stack the layers for a scan over them; those of one kind are there twice while
            they are stacked.
        reading: config, allow_pt, …: as for `alibi_convert.open_checkpoint`.

    Raises:
        CheckpointError: a ValueError: missing, foreign, truncated or incomplete.
        ValueError: float64 parameters while JAX has 64-bit numbers switched off, a mesh that does
            not divide the parameters, or an implementation that is not known.
    """
    checkpoint = open_checkpoint(path, **reading)
    stored = {header.dtype for header in checkpoint.tensors.headers.values()}
    wanted = stored if dtype is None else {np.dtype(dtype)}
    has_float64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    if np.dtype(np.float64) in wanted and not has_float64:
        raise ValueError(
            f"float64 parameters of {path} would be cut to float32; set jax_enable_x64, or pass "
            "dtype=jnp.float32"
        )

    place = _placing(sharding)

    def read(row: Parameter, tensor: np.ndarray) -> jax.Array:
        return placed(row, tensor, dtype, None if place is None else place(row))

    params = flax_tree(checkpoint.tensors, checkpoint.config, read)
    if scan_layers:
        params = stacked(params)
    model_class = ALiBiTransformer if checkpoint.config.vocab_size is None else ALiBiLM
    param_dtype = jax.tree.leaves(params)[0].dtype
    model = model_class(
        checkpoint.config,
        dtype=dtype,
        param_dtype=param_dtype,
        implementation=implementation,
        scan_layers=scan_layers,
        origin=origin_of(checkpoint),
    )
    return model, params


def placed(
    row: Parameter, tensor: np.ndarray, dtype: Any = None, sharding: Sharding | None = None
) -> jax.Array:
    """A parameter, or a moment of one, from the torch layout: to each device its own part.

    Args:
        dtype: None keeps the tensor's; learned slopes never become narrower than float32.
        sharding: None is JAX's default device.
    """
    view = flax_view(row, tensor)
    wanted = dtype
    if dtype is not None and row.is_wide:
        wanted = jnp.promote_types(dtype, jnp.float32)
    if sharding is None:
        return jnp.array(view, wanted)

    def part(index: Any) -> np.ndarray:
        return np.array(view[index], wanted, order="C")

    return jax.make_array_from_callback(view.shape, sharding, part)


def _placing(
    sharding: Mesh | Sharding | Callable[[Parameter], Sharding] | None,
) -> Callable[[Parameter], Sharding] | None:
    if isinstance(sharding, Mesh):
        return lambda row: parameter_sharding(row, sharding)
    if isinstance(sharding, Sharding):
        return lambda _: sharding
    return sharding


def save_pretrained(
    folder: str | os.PathLike[str],
    model: ALiBiLM | ALiBiTransformer,
    params: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write `config.json` and `model.safetensors`, for both backends.

    Copies the companions (tokenizer, …) of the checkpoint that the model was loaded from. Params
    are brought to the host one by one while they are written. Where they are divided over several
    processes every one calls this, and the first one writes, to a folder that the others need not
    see; each holds one whole tensor at a time.

    Args:
        folder: a path that does not exist yet.
        model: the module whose `config` describes the params.
        params: "params" of the result of `init`.
        overwrite: replace the model in a checkpoint's folder; its other files stay.

    Raises:
        CheckpointError: a ValueError: the folder exists, or the params do not fit the model. An
            error of one process is raised in all.
    """

    def write(tensors: Tensors) -> None:
        save_folder(Path(folder), model.config, tensors, model.origin, overwrite)

    with_gathered(lambda: unread_tensors(on_host(params), model.config), write)


def on_host(tree: Any) -> Any:
    """The tree, with arrays that are brought to the host each time they are read."""
    return jax.tree.map(lambda leaf: OnHost(leaf) if hasattr(leaf, "shape") else leaf, tree)


def with_gathered(prepare: Callable[[], Tensors], use: Callable[[Tensors], None]) -> None:
    """Call `use` in the first process, with tensors that all processes read with it.

    The others help until it is done. An error of one process is raised in all.

    Args:
        prepare: called in every process; gives tensors that `OnHost` reads, the same in all.
        use: may read them in any order.

    Raises:
        CheckpointError: another process has failed, or has other tensors.
    """
    if jax.process_count() == 1:
        use(prepare())
        return
    tensors = _agreed(prepare)
    if jax.process_index() == 0:
        _use_as_first(tensors, use)
        return
    while asked := _told():
        if asked.startswith(_FAILED):
            raise CheckpointError(f"the first process wrote nothing: {asked[len(_FAILED) :]}")
        with suppress(RuntimeError):  # of JAX, also in the first process, which tells of it
            tensors[asked]  # which gathers it


def _agreed(prepare: Callable[[], Tensors]) -> Tensors:
    """What `prepare` gives, once every process has got the same names, shapes and dtypes."""
    tensors, error = Tensors({}), None
    try:
        tensors = prepare()
    except Exception as raised:  # told to the others, and raised below
        error = raised
    headers = {name: (each.shape, str(each.dtype)) for name, each in tensors.headers.items()}
    mark = 0 if error is not None else zlib.crc32(repr(headers).encode()) | 1
    marks = np.asarray(multihost_utils.process_allgather(np.uint32(mark)))
    if error is not None:
        raise error
    for number, other in enumerate(marks):
        if other != mark:
            did = "has failed" if other == 0 else "has tensors of other names, shapes or dtypes"
            raise CheckpointError(
                f"nothing was written: process {number} {did}; all must pass the same params"
            )
    return tensors


def _use_as_first(tensors: Tensors, use: Callable[[Tensors], None]) -> None:
    one_at_a_time = threading.Lock()  # several files may be written, by several threads

    def read(name: str) -> np.ndarray:
        with one_at_a_time:
            _told(name)
            return tensors[name]

    asking = {
        name: replace(header, read=partial(read, name)) for name, header in tensors.headers.items()
    }
    try:
        use(Tensors(asking))
    except BaseException as error:
        _told(f"{_FAILED}{str(error) or type(error).__name__}")
        raise
    _told("")


def _told(message: str = "") -> str:
    """What the first process says, in every process; at most `_MESSAGE_BYTES` of it."""
    data = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))
    return bytes(np.asarray(told, np.uint8)).rstrip(b"\0").decode(errors="ignore")
