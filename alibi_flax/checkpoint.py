"""Checkpoints in and out of the Flax models; the only file here that knows `alibi_convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from alibi_convert.checkpoint import Reading, open_checkpoint
from alibi_convert.rules import canonical_tensors, flax_tree, flax_view
from alibi_convert.tensors import Tensors
from alibi_convert.writing.origin import origin_of, save_folder
from alibi_flax.model import ALiBiLM, ALiBiTransformer
from alibi_flax.sharding import parameter_sharding
from alibi_flax.stacking import stacked
from alibi_spec import Parameter


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
        path: a checkpoint folder of ours or of a known family, a .safetensors, .pt or .msgpack
            file, or the id of a folder on the Hugging Face hub.
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

    def placed(row: Parameter, tensor: np.ndarray) -> jax.Array:
        view = flax_view(row, tensor)
        wanted = dtype
        if dtype is not None and row.is_wide:
            wanted = jnp.promote_types(dtype, jnp.float32)
        if place is None:
            return jnp.array(view, wanted)
        goal = place(row)

        def part(index: Any) -> np.ndarray:
            return np.array(view[index], wanted, order="C")

        return jax.make_array_from_callback(view.shape, goal, part)

    params = flax_tree(checkpoint.tensors, checkpoint.config, placed)
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

    Copies the companions (tokenizer, …) of the checkpoint that the model was loaded from.

    Args:
        folder: a path that does not exist yet.
        model: the module whose `config` describes the params.
        params: "params" of the result of `init`.
        overwrite: replace the model in a checkpoint's folder; its other files stay.

    Raises:
        CheckpointError: a ValueError: the folder exists, or the params do not fit the model.
    """
    tensors = canonical_tensors(params, model.config)
    save_folder(Path(folder), model.config, Tensors.of(tensors), model.origin, overwrite)
