"""Arrays that may be divided over devices and hosts, for code that need not know if they are.

`alibi_torch/divided.py` is the mirror image of what JAX does not do by itself.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


class OnHost:
    """An array that is brought to this host each time NumPy reads it, and not kept there.

    Of an array that is divided over several hosts every process reads it at the same time.

    Attributes:
        shape, dtype: of the array.
    """

    def __init__(self, array: Any, layer: int | None = None) -> None:
        self._array, self._layer = array, layer
        self.shape = tuple(array.shape if layer is None else array.shape[1:])
        self.dtype = np.dtype(array.dtype)

    def __getitem__(self, layer: int) -> OnHost:
        """One of the layers that are stacked along the first axis."""
        return OnHost(self._array, layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        array = self._array
        if self._layer is not None:
            array = _layer_of(array, self._layer)
        return np.array(whole(array), dtype, copy=copy)


def whole(x: Any) -> np.ndarray:
    """All of an array, gathered if it is divided over hosts: then every process calls this."""
    if not isinstance(x, Array):
        return np.asarray(x)
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = _gathered(x)
    # An array of its own with the same data: JAX keeps with an array what it copied to the host.
    parts = [shard.data for shard in x.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts))


def beside(params: Any, tree: Any) -> Any:
    """The tree, with its arrays that are on one device on each device of the params' mesh.

    So a step of training, which gives them back on all of them, is compiled once.
    """
    place = jax.tree.leaves(params)[0].sharding
    if not isinstance(place, NamedSharding):
        return tree
    everywhere = NamedSharding(place.mesh, PartitionSpec())

    def placed(x: Array) -> Array:
        if isinstance(x.sharding, NamedSharding):
            return x
        values = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: values[index])

    return jax.tree.map(placed, tree)


def _gathered(x: Array) -> Array:
    """The array, divided among the devices of each host only.

    Along axes of the mesh that stay inside of hosts it remains divided, so that no device holds
    more than it must.
    """
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return multihost_utils.process_allgather(x, tiled=True)
    mesh = sharding.mesh
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    inside = {
        axis
        for place, axis in enumerate(mesh.axis_names)
        if (hosts == np.take(hosts, [0], place)).all()
    }
    groups = (names if isinstance(names, tuple) else (names,) for names in sharding.spec)
    kept = (tuple(name for name in names if name in inside) or None for names in groups)
    goal = NamedSharding(mesh, PartitionSpec(*kept))
    return jax.jit(_itself, out_shardings=goal)(x)


def _itself(x: Array) -> Array:
    return x


@jax.jit
def _layer_of(x: Array, layer: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
