"""A small model whose optimizers' states cross, and the comparison of two states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alibi_convert.rules import flax_tree
from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import ALiBiConfig, parameter_table
from alibi_spec.parameters import parameter_names
from parity_tests.compare import assert_bitwise

# Parameters that torch numbers in another order than the table's, and two of equal shape.
CONFIG = ALiBiConfig(
    **{"num_layers": 1, "d_model": 6, "num_heads": 3, "vocab_size": 7, "slopes": "learned"},
    **{"expansion_factor": 2, "tie_embeddings": False, "max_len": 16},
)
ROWS = {row.name: row for row in parameter_table(CONFIG)}
NAMES = parameter_names(CONFIG)


def drawn(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Numbers like the parameters of the model, positive and of different sizes."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.1, 2, ROWS[name].shape).astype(dtype) for name in NAMES}


def as_params(arrays: Mapping[str, np.ndarray]) -> Any:
    return jax.tree.map(jnp.asarray, flax_tree(Tensors.of(arrays), CONFIG))


def by_shape(of_matrix: Any, of_vector: Any) -> Any:
    """Something for every parameter; the bias of attention has two axes only in Flax."""
    return flax_tree(
        Tensors.of(drawn(0)), CONFIG, lambda row, _: of_matrix if len(row.shape) > 1 else of_vector
    )


LABELS = by_shape("matrices", "vectors")
MATRICES, VECTORS = by_shape(True, False), by_shape(False, True)


def assert_same_state(actual: Any, expected: Any) -> None:
    """Types, structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        assert isinstance(leaf, jax.Array)
        assert_bitwise(np.asarray(leaf), np.asarray(other), jax.tree_util.keystr(path))


def assert_same_dict(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert list(actual["state"]) == list(expected["state"])
    for number, entry in expected["state"].items():
        assert list(actual["state"][number]) == list(entry)
        for word, tensor in entry.items():
            found = actual["state"][number][word]
            assert_bitwise(as_numpy(found), as_numpy(tensor), f"{word} of {number}")
