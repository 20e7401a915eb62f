"""Where the parameters of a model may be divided over devices, by linen's logical axes.

Fresh params are plain arrays: linen's boxes, which carry axes along, cannot be bridged to NNX
without a mesh. The axes are a tree of their own, which serves loaded params as well.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from alibi_spec import ALiBiConfig, parameter_table


def partition_specs(config: ALiBiConfig) -> dict[str, Any]:
    """The logical axes of every parameter, in a tree like that of the params.

    `flax.linen.logical_to_mesh_sharding` makes shardings of them, by a mesh and rules. The names
    are those of `alibi_spec.parameters.axis_sizes`: "embed", "heads", "mlp", "vocab", …
    """
    tree: dict[str, Any] = {}
    for row in parameter_table(config):
        node = tree
        for key in row.flax_path[:-1]:
            node = node.setdefault(key, {})
        node[row.flax_path[-1]] = PartitionSpec(*row.logical_axes)
    return tree
