"""How the parameters of a model can be divided over devices, by linen's logical axes.

New params are plain arrays: linen's boxes, which hold axes, cannot be bridged to NNX without a
mesh. So the axes are a separate tree, which also serves loaded params.
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
