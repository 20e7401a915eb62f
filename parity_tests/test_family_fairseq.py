"""Checkpoints of the paper's fairseq fork compute what its code computes."""

from __future__ import annotations

import argparse
import math
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alibi_convert import CheckpointError, open_checkpoint
from alibi_convert.checkpoint import Checkpoint
from alibi_convert.families import FAMILIES, Source, fairseq
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from parity_tests.compare import assert_bitwise
from parity_tests.peers import published
from parity_tests.peers.fairseq import (
    HIDDEN,
    VOCAB,
    WIDTH,
    body_shapes,
    forward,
    input_shapes,
    separate_softmax,
    tied_softmax,
)
from parity_tests.peers.published import Arrays

_, ADAPTIVE = fairseq.FAMILIES

# What transformer_lm_wiki103 sets, with options of training among it.
WIKI103: dict[str, Any] = {
    "activation_fn": "relu",
    "adaptive_input": True,
    "adaptive_input_cutoff": "20000,60000",
    "adaptive_input_factor": 4,
    "adaptive_softmax_cutoff": "20000,60000",
    "adaptive_softmax_dropout": 0.2,
    "adaptive_softmax_factor": 4,
    "add_bos_token": False,
    "arch": "transformer_lm_wiki103",
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "base_layers": 0,
    "character_embeddings": False,
    "criterion": "adaptive_loss",
    "decoder_attention_heads": 8,
    "decoder_embed_dim": 1024,
    "decoder_ffn_embed_dim": 4096,
    "decoder_input_dim": 1024,
    "decoder_layerdrop": 0,
    "decoder_layers": 16,
    "decoder_layers_to_keep": None,
    "decoder_learned_pos": False,
    "decoder_normalize_before": True,
    "decoder_output_dim": 1024,
    "dropout": 0.3,
    "fp16": True,
    "layernorm_embedding": False,
    "lr": [1.0],
    "max_tokens": 9216,
    "no_decoder_final_norm": True,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
    "quant_noise_pq": 0,
    "share_decoder_input_output_embed": False,
    "task": "language_modeling",
    "tie_adaptive_proj": True,
    "tie_adaptive_weights": True,
    "tokens_per_sample": 512,
}
SMALL = WIKI103 | {
    "adaptive_input_cutoff": "20,45",
    "adaptive_softmax_cutoff": "20,45",
    "decoder_attention_heads": 6,
    "decoder_embed_dim": WIDTH,
    "decoder_ffn_embed_dim": HIDDEN,
    "decoder_input_dim": WIDTH,
    "decoder_layers": 2,
    "decoder_output_dim": WIDTH,
}
PLAIN_OPTIONS = {
    "adaptive_input": False,
    "adaptive_input_cutoff": None,
    "adaptive_softmax_cutoff": None,
    "tie_adaptive_proj": False,
    "tie_adaptive_weights": False,
}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, published.SEQ))


def save(path: Path, options: dict[str, Any], arrays: Arrays, section: bool = False) -> Path:
    """A checkpoint as fairseq's trainer saves it, training state and all."""
    model = {name: torch.from_numpy(array) for name, array in arrays.items()}
    saved = {
        "args": None if section else argparse.Namespace(**options),
        "cfg": {"model": options, "task": {"_name": "language_modeling"}} if section else None,
        "model": model | {"decoder.version": torch.tensor([3.0])},
        "optimizer_history": [{"criterion_name": "AdaptiveLoss", "num_updates": 7}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": 3.5},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
    }
    torch.save(saved, path)
    return path


def check(tmp_path: Path, options: dict[str, Any], make: Any, section: bool = False) -> Checkpoint:
    """`make` draws the parameters in a dtype; the checkpoint in float32 is returned."""

    def write(dtype: Any) -> Path:
        return save(tmp_path / f"{np.dtype(dtype)}.pt", options, make(dtype), section)

    published.assert_same(write, partial(forward, options, make(np.float64)), TOKENS)
    return opened(tmp_path / "float32.pt")


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, allow_pt=True)


@pytest.mark.parametrize("ties_projections", [True, False], ids=["tied", "own-projections"])
def test_adaptive_model(tmp_path: Path, ties_projections: bool) -> None:
    """The paper's layout: adaptive input, adaptive softmax tied to it, no final norm."""

    def make(dtype: Any) -> Arrays:
        arrays = published.draw(body_shapes() | input_shapes(), dtype)
        return tied_softmax(arrays, ties_projections)

    options = SMALL | {"tie_adaptive_proj": ties_projections}
    found = check(tmp_path, options, make)
    assert set(found.folded) == {"token_embedding.weight", "lm_head.weight", "cluster_head.weight"}


def test_separate_softmax(tmp_path: Path) -> None:
    """An adaptive softmax of its own over an ordinary embedding, and a final norm."""

    def make(dtype: Any) -> Arrays:
        embedding = {"decoder.embed_tokens.weight": (VOCAB, WIDTH)}
        return separate_softmax(
            published.draw(body_shapes("decoder.layer_norm") | embedding, dtype)
        )

    options = SMALL | {
        "adaptive_input": False,
        "tie_adaptive_weights": False,
        "tie_adaptive_proj": False,
        "no_scale_embedding": True,
    }
    check(tmp_path, options, make, section=True)


def test_plain_model(tmp_path: Path) -> None:
    """An ordinary embedding that is the head too, with norms behind it and before it."""

    def make(dtype: Any) -> Arrays:
        shapes = body_shapes("decoder.layer_norm", "decoder.layernorm_embedding")
        arrays = published.draw(shapes | {"decoder.embed_tokens.weight": (VOCAB, WIDTH)}, dtype)
        return arrays | {"decoder.output_projection.weight": arrays["decoder.embed_tokens.weight"]}

    options = SMALL | PLAIN_OPTIONS
    options |= {"share_decoder_input_output_embed": True, "layernorm_embedding": True}
    found = check(tmp_path, options, make)
    assert not found.folded
    assert "decoder.output_projection.weight" in found.derived


def test_older_name_of_the_head(tmp_path: Path) -> None:
    tables = dict.fromkeys(("decoder.embed_tokens.weight", "decoder.embed_out"), (VOCAB, WIDTH))
    arrays = published.draw(body_shapes() | tables, np.float32)
    found = opened(save(tmp_path / "old.pt", SMALL | PLAIN_OPTIONS, arrays))
    assert not found.config.tie_embeddings
    assert_bitwise(found.tensors["lm_head.weight"], arrays["decoder.embed_out"], "head")


def test_adaptive_input_under_an_ordinary_head(tmp_path: Path) -> None:
    """And what else a file holds, which is dropped with a reason."""
    arrays = published.draw(body_shapes() | input_shapes(), np.float32)
    head = published.draw({"decoder.output_projection.weight": (VOCAB, WIDTH)}, np.float32)
    buffers = {
        "decoder.embed_positions._float_tensor": np.zeros(1, np.float32),
        "decoder.embed_tokens._float_tensor": np.zeros(1, np.float32),
    }
    options = SMALL | {
        "adaptive_softmax_cutoff": None,
        "tie_adaptive_weights": False,
        "tie_adaptive_proj": False,
    }
    found = opened(save(tmp_path / "mixed.pt", options, arrays | head | buffers))
    assert found.family == "fairseq-adaptive"
    assert set(found.derived) == {"decoder.version", *buffers}
    assert found.config.adaptive_cutoffs is None
    assert_bitwise(
        found.tensors["lm_head.weight"], head["decoder.output_projection.weight"], "head"
    )


def test_bands_longer_than_a_block_are_rounded_once() -> None:
    rng = np.random.default_rng(0)
    size = 2**14 + 3
    words = rng.standard_normal((size, 2)).astype(np.float32)
    projection = rng.standard_normal((8, 2)).astype(np.float32)
    options = SMALL | {"adaptive_input_cutoff": str(size), "decoder_embed_dim": 8}
    names = [f"decoder.embed_tokens.embeddings.0.{part}.weight" for part in (0, 1)]
    config = ALiBiConfig(d_model=8, vocab_size=size, adaptive_cutoffs=(5,), tie_embeddings=False)
    fold = ADAPTIVE.folds(config, Source(options, Tensors({})))[0]
    assert list(fold.foreign) == names
    product = words.astype(np.float64) @ projection.T.astype(np.float64)
    assert_bitwise(fold.compute(words, projection), product.astype(np.float32), "embedding")


def read(options: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ALiBiConfig:
    tensors = Tensors.of({name: np.ones(shape, np.float16) for name, shape in shapes.items()})
    source = Source(options, tensors)
    (family,) = (each for each in FAMILIES if each.recognises(source))
    return family.read_config(source)


def test_published_configuration() -> None:
    bands = {
        f"decoder.embed_tokens.embeddings.{band}.0.weight": (size, 1)
        for band, size in enumerate((20000, 40000, 207744))
    }
    assert read(WIKI103, bands) == ALiBiConfig(
        num_layers=16,
        d_model=1024,
        num_heads=8,
        max_len=512,
        dropout=0.3,
        attention_dropout=0.1,
        embedding_dropout=0.3,
        feed_forward_dim=4096,
        activation="relu",
        vocab_size=267744,
        tie_embeddings=False,
        final_norm=False,
        embedding_scale=32.0,
        adaptive_cutoffs=(20000, 60000),
    )
    small = {
        f"decoder.embed_tokens.embeddings.{band}.0.weight": (n, 1)
        for band, n in enumerate((20, 25))
    }
    assert read(SMALL, small).adaptive_cutoffs == (20,)  # the last cutoff is the vocabulary


def test_defaults() -> None:
    """Absent options take fairseq's defaults; the sizes that no shape tells have none."""
    sizes = {"decoder_layers": 2, "decoder_embed_dim": 48, "decoder_attention_heads": 6}
    embedding = {"decoder.embed_tokens.weight": (61, 48)}
    assert read(sizes, embedding) == ALiBiConfig(
        num_layers=2,
        d_model=48,
        num_heads=6,
        max_len=1024,
        embedding_dropout=0.1,
        attention_dropout=0.0,
        feed_forward_dim=2048,
        activation="relu",
        vocab_size=61,
        tie_embeddings=False,
        final_norm=False,
        embedding_scale=math.sqrt(48),
    )
    for size in sizes:
        with pytest.raises(CheckpointError, match=f"has no {size}"):
            read({name: sizes[name] for name in sizes if name != size}, embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_normalize_before": False}, "decoder_normalize_before=False"),
        ({"decoder_layers_to_keep": "0,2"}, "decoder_layers_to_keep='0,2'"),
        ({"character_embeddings": True}, "character_embeddings=True"),
        ({"quant_noise_pq": 0.1}, "quant_noise_pq=0.1"),
        ({"base_layers": 1}, "base_layers=1"),
        ({"activation_fn": "tanh"}, "activation_fn='tanh'.*gelu_accurate"),
        ({"decoder_input_dim": 24}, "decoder_input_dim is not decoder_embed_dim=48"),
        ({"adaptive_softmax_cutoff": "20,70"}, "adaptive_cutoffs=.20, 70. do not rise"),
        ({"adaptive_softmax_cutoff": "twenty"}, "adaptive_softmax_cutoff='twenty'"),
        ({"adaptive_input_factor": 0}, "adaptive_input_factor=0"),
        ({"adaptive_input_factor": 10**400}, "adaptive_input_factor=10"),
        ({"decoder_rotary": True}, "not known: decoder_rotary"),
    ],
)
def test_what_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(SMALL | change, input_shapes())


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    arrays = published.draw(
        body_shapes()
        | {
            "decoder.embed_tokens.weight": (VOCAB, WIDTH),
            "decoder.output_projection.weight": (VOCAB, WIDTH),
            "decoder.embed_positions.weight": (64, WIDTH),
        }
    )
    path = save(tmp_path / "learned.pt", SMALL | PLAIN_OPTIONS, arrays)
    with pytest.raises(CheckpointError, match=r"unexpected\s+decoder\.embed_positions\.weight"):
        opened(path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_other_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left to the reader of state dicts; unsafe ones are refused."""
    path = tmp_path / "other.pt"
    for plain in ({"weight": torch.ones(2)}, [1], {"model": {"weight": torch.ones(2)}}):
        assert all(family.unpickled(plain) is None for family in FAMILIES)
    torch.save({"args": argparse.Namespace(run=Malicious()), "model": {}}, path)
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        open_checkpoint(path, allow_pt=True)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [b"\x80\x02K\x01Q.", b"\x80\x02G\x00", b"\x80\x02J\x00", b"\x80\x02."],
    ids=["storage by a number", "float cut short", "integer cut short", "nothing"],
)
def test_damaged_pickles(tmp_path: Path, damage: bytes) -> None:
    """Each makes torch's unpickler fail in its own way."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", damage)
        archive.writestr("model/version", "3\n")
    with pytest.raises(CheckpointError, match="is truncated or not a plain state dict"):
        opened(tmp_path / "model.pt")


def test_bands_too_narrow_to_exist(tmp_path: Path) -> None:
    options = SMALL | {"adaptive_input_factor": 1e300}
    arrays = published.draw(body_shapes() | input_shapes(), np.float32)
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        opened(save(tmp_path / "model.pt", options, arrays))
