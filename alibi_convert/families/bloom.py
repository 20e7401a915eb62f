"""BLOOM and BLOOMZ (bigscience), as transformers' BloomForCausalLM keeps them.

The bias of transformers' BLOOM, m times the number of real positions before the key, differs from
-m |i - j| by one constant per query, which softmax does not see.
"""

from __future__ import annotations

from alibi_convert.families.family import Family, Peer, Source, tied_head
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only, one_of
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

_KEYS = KeyTable(
    family="bloom",
    model_type="bloom",
    architectures=("BloomForCausalLM",),
    lines=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model", aliases=("n_embed",)),
        Key("n_layer", "num_layers", aliases=("num_hidden_layers",)),
        Key("n_head", "num_heads", aliases=("num_attention_heads",)),
        Key("seq_length", "max_len", 2048),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("initializer_range", "init_std", 0.02),
        Key("hidden_dropout", "dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key(
            "apply_residual_connection_post_layernorm",
            "norm_placement",
            False,
            **one_of((False, "pre"), (True, "pre_residual")),
        ),
        Only(
            "skip_bias_add_qkv",
            (False,),
            "the biases of queries, keys and values would be left out",
            written=False,
        ),
        Neutral(
            ("pretraining_tp", "slow_but_exact"),
            "how the sums of a model trained in parallel are rounded",
        ),
        Neutral(("attention_softmax_in_fp32",), "softmax is always taken in float32"),
        Neutral(("bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add"), "fused kernels"),
        Neutral(("offset_alibi",), "the size of a buffer"),
        Neutral(("n_inner",), "no reader uses it: the width is 4 hidden_size"),
    ),
    implied={"expansion_factor": 4, "activation": "gelu_tanh", "embedding_norm": True},
)

_MODULES = (
    ("transformer.word_embeddings_layernorm", "embedding_norm"),
    ("transformer.h.{i}.input_layernorm", "transformer.layers.{i}.attn_norm"),
    ("transformer.h.{i}.self_attention.dense", "transformer.layers.{i}.attn.output"),
    ("transformer.h.{i}.post_attention_layernorm", "transformer.layers.{i}.ffn_norm"),
    ("transformer.h.{i}.mlp.dense_h_to_4h", "transformer.layers.{i}.ffn.fc1"),
    ("transformer.h.{i}.mlp.dense_4h_to_h", "transformer.layers.{i}.ffn.fc2"),
    ("transformer.ln_f", "transformer.final_norm"),
)
ROWS = (
    Row("transformer.word_embeddings.weight", "token_embedding.weight"),
    Row(
        "transformer.h.{i}.self_attention.query_key_value.weight",
        "transformer.layers.{i}.attn.{query,key,value}.weight",
        "(heads part head_dim) embed -> part (heads head_dim) embed",
    ),
    Row(
        "transformer.h.{i}.self_attention.query_key_value.bias",
        "transformer.layers.{i}.attn.{query,key,value}.bias",
        "(heads part head_dim) -> part (heads head_dim)",
    ),
    *(row for names in _MODULES for row in both(*names)),
    Row("lm_head.weight", "lm_head.weight"),
)
ALIASES = (  # files written from the model without its head
    (r"((?:word_embeddings|word_embeddings_layernorm|h\.\d+|ln_f)\..+)", r"transformer.\1"),
)
DERIVED = tied_head("transformer.word_embeddings.weight")


def _recognises(source: Source) -> bool:
    return source.model_type == "bloom"


def _read_config(source: Source) -> ALiBiConfig:
    return _KEYS.read(source.config or {}, source.ignored)


FAMILY = Family(
    "bloom",
    _recognises,
    _read_config,
    ROWS,
    aliases=ALIASES,
    derived=DERIVED,
    write_config=_KEYS.write,
    label="folder, as transformers' BLOOM",
    neutral_keys=_KEYS.neutral_keys,
    peer=Peer(),
)
