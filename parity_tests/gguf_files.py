"""Models and tokenizers for the tests of GGUF, and files laid out as llama.cpp's converter does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from alibi_spec import ALiBiConfig
from parity_tests.checkpoints import write

VOCAB = 420
_SIZE: dict[str, Any] = {
    **{"num_layers": 2, "d_model": 48, "num_heads": 6, "vocab_size": VOCAB, "max_len": 256},
    **{"expansion_factor": 4, "dropout": 0.0},
}
_ENCODER: dict[str, Any] = {
    **{"causal": False, "norm_placement": "post", "final_norm": False, "embedding_norm": True},
    **{"head": "none", "type_vocab_size": 2, "norm_eps": 1e-12},
}
CONFIGS = {
    "bloom": ALiBiConfig(**_SIZE, activation="gelu_tanh", embedding_norm=True),
    "bloom, untied": ALiBiConfig(
        **_SIZE, activation="gelu_tanh", embedding_norm=True, tie_embeddings=False, norm_eps=1e-3
    ),
    "mpt": ALiBiConfig(**_SIZE, attention_bias=False, ffn_bias=False, norm_bias=False),
    "mpt, clipped and grouped": ALiBiConfig(
        **_SIZE, qkv_clip=0.5, num_kv_heads=2, bias_max=6.0, tie_embeddings=False
    ),
    "mpt, narrow": ALiBiConfig(
        **_SIZE | {"expansion_factor": 1}, feed_forward_dim=50, norm_bias=False
    ),
    "jais": ALiBiConfig(
        **_SIZE, activation="silu", gated_ffn=True, attention_scale=1 / 8, tie_embeddings=False
    ),
    "baichuan": ALiBiConfig(
        **_SIZE | {"num_layers": 40, "d_model": 24},
        **{"activation": "silu", "gated_ffn": True, "norm": "rms", "norm_bias": False},
        **{"attention_bias": False, "ffn_bias": False, "tie_embeddings": False, "norm_eps": 1e-6},
    ),
}
ENCODERS = {
    "jina-bert-v2": ALiBiConfig(**_SIZE, **_ENCODER, gated_ffn=True),
    "jina-bert-v2, plain and grouped": ALiBiConfig(
        **_SIZE | {"expansion_factor": 1},
        **_ENCODER | {"type_vocab_size": 1},
        **{"num_kv_heads": 2, "feed_forward_dim": 50},
    ),
    "jina-bert-v2-twice-normalised": ALiBiConfig(
        **_SIZE, **_ENCODER, gated_ffn=True, qk_norm=True, attention_output_norm=True
    ),
}

ASCII = (
    "the cat sat on the mat. The dog's bone? 12345 + 678",
    "tabs\tand (parens) | pipes!  two  spaces\n\nand a new line, which isn't one",
)
TEXTS = (
    *ASCII,
    "Hello there, world! It's 2024; naïve café…",
    "مرحبا، كيف الحال؟ 你好，世界。नमस्ते।",
    "<s>one<|user|> two</s>",
    "",
)
BLOOM_EXPRESSION = r" ?[^(\s|[.,!?…。，、।۔،])]+"
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def tokenizer(kind: str = "gpt-2", texts: tuple[str, ...] = TEXTS) -> Tokenizer:
    """Byte-level BPE that splits as BLOOM's or GPT-2's; with ASCII it knows no other byte."""
    found = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "bloom")
    split = pre_tokenizers.Split(Regex(BLOOM_EXPRESSION), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if kind == "bloom" else level
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=list(NAMES.values()),
        initial_alphabet=[] if texts is ASCII else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts * 3, trainer)
    found.add_tokens(["<|user|>"])
    return found


OF_BERT = {
    **{"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    "mask_token": "[MASK]",
}
WORDS = (
    "The cat sat on the mat. The dog's bone? 12345 + 678; un[related] <tags>",
    "Größe, Überfluß, naïve CAFÉ — Ελλάδα, Москва, ǅ",
    "你好，世界。日本語のテキスト",
    "tabs\tand\nlines, nbsp\u00a0and\u200bzero width, a bell \a",
    "one [MASK] two [SEP] three[CLS]",
    "zzzzqqqq \u2603 ##ing",
    "",
)


def wordpiece() -> Tokenizer:
    """BERT's, in small letters, of a vocabulary that knows no snowman."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB - 20, special_tokens=list(OF_BERT.values()), show_progress=False
    )
    found.train_from_iterator(WORDS[:4] * 3, trainer)
    found.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return found


def of_roberta() -> Tokenizer:
    """Byte-level BPE with a mask that takes the spaces before it, as Jina's code model has it."""
    found = tokenizer()
    found.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    found.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 1), add_prefix_space=False
    )
    return found


def folder(path: Path, config: ALiBiConfig, texts: tuple[str, ...] = TEXTS) -> Path:
    """A folder of ours with a tokenizer."""
    write(path, config=config)
    kind = "bloom" if config.embedding_norm and config.causal else "gpt-2"
    tokenizer(kind, texts).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return path


def unsaid(config: ALiBiConfig) -> ALiBiConfig:
    """What a file says of a configuration."""
    return dataclasses.replace(
        config, dropout=0.0, attention_dropout=None, embedding_dropout=0.0, init_std=0.02
    )


def write_by_gguf(
    path: Path, architecture: str, metadata: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Path:
    """A file that gguf's own writer makes, of arrays in memory."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
