"""Rules of layout: read whole, streamed and built again, a tensor has the same elements."""

from __future__ import annotations

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alibi_convert import CheckpointError, flax_to_torch, torch_to_flax
from alibi_convert.rules import Row, Rule
from alibi_convert.tensors import as_numpy
from alibi_spec import ALiBiConfig, parameter_table
from parity_tests.cases import draw_parameters
from parity_tests.compare import assert_bitwise

CONFIG = ALiBiConfig(num_layers=1, d_model=24, num_heads=3, vocab_size=11)
QUERY_KEY_VALUE = "transformer.layers.{i}.attn.{query,key,value}.weight"
ROWS = {
    "interleaved": Row(
        "w", QUERY_KEY_VALUE, "(heads part head_dim) embed -> part (heads head_dim) embed"
    ),
    "part by part": Row(
        "w", QUERY_KEY_VALUE, "(part heads head_dim) embed -> part (heads head_dim) embed"
    ),
    "innermost": Row(
        "w", QUERY_KEY_VALUE, "embed (heads head_dim part) -> part (heads head_dim) embed"
    ),
    "in sequence": Row("w", QUERY_KEY_VALUE),
    "in sequence, transposed": Row("w", QUERY_KEY_VALUE, "embed rows -> rows embed"),
    "one": Row("w", "token_embedding.weight"),
    "one, transposed": Row("w", "token_embedding.weight", "embed vocab -> vocab embed"),
}
each_row = pytest.mark.parametrize("row", ROWS)


def made(row: str) -> tuple[Rule, dict[str, np.ndarray]]:
    """A rule, and tensors no two elements of which are alike."""
    table = {each.name: each for each in parameter_table(CONFIG)}
    (rule,) = ROWS[row].rules(table, CONFIG.num_layers)
    arrays = {}
    for number, parameter in enumerate(rule.parameters):
        size = int(np.prod(parameter.shape))
        elements = np.arange(number * size, (number + 1) * size, dtype=np.float32)
        arrays[parameter.name] = elements.reshape(parameter.shape)
    return rule, arrays


@each_row
def test_extract_inverts_build(row: str) -> None:
    rule, arrays = made(row)
    foreign = rule.build(arrays)
    assert foreign.shape == rule.foreign_shape
    for index, parameter in enumerate(rule.parameters):
        assert_bitwise(rule.extract(foreign, index), arrays[parameter.name], parameter.name)


@each_row
def test_streams_hold_what_is_read(row: str) -> None:
    rule, arrays = made(row)
    foreign = rule.build(arrays)
    assert_bitwise(np.concatenate(list(rule.built_chunks(arrays))), foreign.reshape(-1), row)
    for index, parameter in enumerate(rule.parameters):
        elements = rule.elements(foreign, index)
        assert np.shares_memory(elements, foreign), "nothing is copied before it streams"
        assert_bitwise(elements.reshape(-1), arrays[parameter.name].reshape(-1), parameter.name)


def test_interleaved_means_head_by_head() -> None:
    rule, arrays = made("interleaved")
    foreign = rule.build(arrays).reshape(3, 3, 8, 24)
    for part, array in enumerate(arrays.values()):
        for head in range(3):
            assert_bitwise(foreign[head, part], array.reshape(3, 8, 24)[head], f"{head}, {part}")


@pytest.mark.parametrize("separator", ["/", None])
def test_flattened_params(separator: str | None) -> None:
    """Of `flax.traverse_util.flatten_dict`, by a separator or to tuples of names."""
    stored = draw_parameters(CONFIG)
    nested = torch_to_flax(stored, CONFIG)
    flat = flatten_dict(nested, sep=separator)
    for name, tensor in flax_to_torch(flat, CONFIG).items():
        assert_bitwise(as_numpy(tensor), stored[name], name)
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        flax_to_torch(dict(list(flat.items())[1:]), CONFIG)
    with pytest.raises(CheckpointError, match="is there twice, in two forms; remove one"):
        flax_to_torch(nested | flat, CONFIG)
