"""MosaicBERT and DNABERT-2 folders compute what their published code computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_convert import CheckpointError, convert, open_checkpoint
from alibi_convert.families import Source, mosaicbert
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.exports import assert_exported, draw, written
from parity_tests.families import export, read_config
from parity_tests.peers import published
from parity_tests.peers.encoders import (
    HIDDEN,
    SMALL,
    TOKENS,
    TYPES,
    WIDTH,
    Shapes,
    head_shapes,
    pooler_shapes,
)
from parity_tests.peers.mosaicbert import forward, shapes
from parity_tests.peers.published import Arrays

MOSAIC_BERT_BASE = """{"_name_or_path": "bert-base-uncased", "alibi_starting_size": 512,
"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.0, "auto_map": {},
"classifier_dropout": null, "gradient_checkpointing": false, "hidden_act": "gelu",
"hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
"intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
"model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
"position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.28.1",
"type_vocab_size": 2, "use_cache": true, "vocab_size": 30528}"""
DNABERT_2 = MOSAIC_BERT_BASE.replace("30528", "4096").replace("bert-base", "zhihan1996/DNABERT-2")


def with_tied_decoder(arrays: Arrays) -> Arrays:
    words = arrays["bert.embeddings.word_embeddings.weight"]
    return arrays | {"cls.predictions.decoder.weight": words}


def without_prefix(arrays: Arrays) -> Arrays:
    return {name.removeprefix("bert."): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("extra", "saved"),
    [(head_shapes("decoder.bias"), with_tied_decoder), (pooler_shapes(), without_prefix)],
    ids=["masked-lm", "encoder-alone"],
)
def test_mosaicbert(tmp_path: Path, extra: Shapes, saved: Callable[[Arrays], Arrays]) -> None:
    has_head = saved is with_tied_decoder

    def write(dtype: Any) -> Path:
        arrays = saved(published.draw(shapes() | extra, dtype))
        return published.write_folder(tmp_path / np.dtype(dtype).name, SMALL, arrays)

    arrays = published.draw(shapes() | extra)
    published.assert_same(write, partial(forward, has_head, arrays), TOKENS, TYPES)
    checkpoint = open_checkpoint(tmp_path / "float32")
    assert checkpoint.family == "mosaicbert"
    assert set(checkpoint.derived) == (
        {"cls.predictions.decoder.weight"}
        if has_head
        else {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    )
    back = export(mosaicbert.FAMILY, checkpoint.config, checkpoint.tensors, tmp_path / "back")
    original = published.draw(shapes() | extra, np.float32)
    returned = read_tensors(back)
    assert set(returned) == {name for name in original if "pooler" not in name}
    for name, array in returned.items():
        assert_bitwise(array, original[name], name)
    values = read_config(back)
    assert values | SMALL == values
    assert values["architectures"] == ["BertForMaskedLM" if has_head else "BertModel"]
    assert open_checkpoint(back).config == checkpoint.config


@pytest.mark.parametrize("head", ["masked_lm", "none"])
def test_export(tmp_path: Path, head: str) -> None:
    """From scratch: the published formula reads what we write."""
    config = replace(read(SMALL), head=head, dropout=0.2, embedding_dropout=0.2, max_len=99)
    foreign = assert_exported(
        *(tmp_path, mosaicbert.FAMILY, config),
        lambda _, arrays: partial(forward, head == "masked_lm", arrays),
        *(TOKENS[:, :40], TYPES[:, :40]),
    )
    assert foreign == SMALL | {
        "architectures": ["BertForMaskedLM" if head == "masked_lm" else "BertModel"],
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.2,
        "initializer_range": 0.02,
        "is_decoder": False,
        "max_position_embeddings": 99,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize(("bias", "value"), [("1.ffn.gate", 1e-30), ("0.ffn.fc1", -0.0)])
def test_biases_that_have_no_place(tmp_path: Path, bias: str, value: float) -> None:
    """`gated_layers` has none: they are zeros, to the bit, or the export is refused."""
    config = read(SMALL)
    arrays, name = draw(config), f"transformer.layers.{bias}.bias"
    arrays[name][7] = value
    ours = written(tmp_path / "ours", config, arrays)
    message = rf"mosaicbert cannot express {name}: it would be read back as zeros: gated_layers"
    with pytest.raises(CheckpointError, match=message):
        convert(ours, tmp_path / "theirs", to="mosaicbert", verify="none")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "linear"}, "head='linear'; expected 'masked_lm' or 'none'"),
        ({"head": "masked_lm", "norm_eps": 1e-5}, "norm_eps=1e-05 together with head='masked_lm'"),
        ({"type_vocab_size": None}, "type_vocab_size=None"),
        ({"embedding_dropout": 0.3}, "embedding_dropout=0.3 together"),
        ({"activation": "silu"}, "activation='silu'"),
        ({"gated_ffn": False}, "gated_ffn=False"),
        ({"norm_placement": "pre"}, "norm_placement='pre'"),
        ({"causal": True}, "causal=True"),
        ({"embedding_norm": False}, "embedding_norm=False"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"slopes": "geometric"}, "slopes='geometric'"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"vocab_size": None}, "vocab_size=None"),
    ],
)
def test_what_it_cannot_express(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"mosaicbert cannot express {message}"):
        mosaicbert.FAMILY.write_config(replace(read(SMALL), **fields))


def test_what_else_a_file_holds(tmp_path: Path) -> None:
    """Zeros for the missing biases have the dtype of the map, whatever tensor comes first."""
    arrays = published.draw(shapes() | head_shapes("decoder.bias"), np.float16)
    extra = {
        "bert.embeddings.position_ids": np.arange(64)[None],
        "cls.predictions.bias": arrays["cls.predictions.decoder.bias"],
        "cls.seq_relationship.weight": np.ones((2, WIDTH), np.float16),
        "cls.seq_relationship.bias": np.ones(2, np.float16),
    }
    folder = published.write_folder(tmp_path / "folder", SMALL, extra | arrays)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.derived) == set(extra)
    for name in checkpoint.folded:
        assert_bitwise(checkpoint.tensors[name], np.zeros(HIDDEN, np.float16), name)
    assert len(checkpoint.folded) == 4


def read(config: dict[str, Any], *names: str) -> ALiBiConfig:
    wqkv = "bert.encoder.layer.0.attention.self.Wqkv.weight"
    tensors = Tensors.of({name: np.ones(3) for name in (wqkv, *names)})
    return mosaicbert.FAMILY.read_config(Source(config, tensors))


@pytest.mark.parametrize(("text", "vocab_size"), [(MOSAIC_BERT_BASE, 30528), (DNABERT_2, 4096)])
def test_published_configurations(text: str, vocab_size: int) -> None:
    config = ALiBiConfig(
        num_layers=12,
        d_model=768,
        num_heads=12,
        max_len=512,
        causal=False,
        vocab_size=vocab_size,
        feed_forward_dim=3072,
        gated_ffn=True,
        norm_placement="post",
        norm_eps=1e-12,
        final_norm=False,
        embedding_norm=True,
        embedding_dropout=0.1,
        attention_dropout=0.0,
        type_vocab_size=2,
        head="none",
    )
    values = json.loads(text)
    assert read(values) == config
    transform = "cls.predictions.transform.dense.weight"
    assert read(values, transform) == replace(config, head="masked_lm")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    assert read({name: values[name] for name in sizes}) == config  # the rest are defaults
    for size in sizes:
        with pytest.raises(CheckpointError, match=f"has no {size}"):
            read({name: values[name] for name in sizes if name != size})


def test_plain_bert_is_refused(tmp_path: Path) -> None:
    arrays = {
        "bert.embeddings.position_embeddings.weight": np.ones((64, WIDTH), np.float32),
        "bert.encoder.layer.0.attention.self.query.weight": np.ones((WIDTH, WIDTH), np.float32),
        "bert.encoder.layer.0.intermediate.dense.weight": np.ones((HIDDEN, WIDTH), np.float32),
    }
    folder = published.write_folder(tmp_path / "bert", SMALL, arrays)
    with pytest.raises(CheckpointError, match=r"BERT without attention\.self\.Wqkv.*position"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({"hidden_act": "silu"}, (), "hidden_act='silu'"),
        ({"is_decoder": True}, (), "is_decoder=True"),
        ({"add_cross_attention": True}, (), "add_cross_attention=True"),
        ({"tie_word_embeddings": False}, (), "tie_word_embeddings=False"),
        ({"rope_theta": 1}, (), "not known: rope_theta"),
        (
            {"layer_norm_eps": 1e-5},
            ("cls.predictions.transform.dense.weight",),
            "layer_norm_eps=1e-05 cannot be honoured: the head has 1e-12",
        ),
    ],
)
def test_what_cannot_be_honoured(
    change: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(SMALL | change, *names)
