"""Falcon-RW 1B and 7B (tiiuae), the ALiBi models among the Falcons, as transformers keeps them.

The bias is inside the scale, (q·k + r) / sqrt(head_dim), and both the slope and r = m j are rounded
to bfloat16 for any dtype of the model: `distance="bfloat16"` reproduces that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alibi_convert.families import bloom
from alibi_convert.families.family import Family, Peer, Source
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only, one_of
from alibi_spec import ALiBiConfig

_MODEL_TYPES = ("falcon", "RefinedWebModel", "RefinedWeb")
_ONLY_RW = "only Falcon-RW has ALiBi; Falcon's other models are rotary"


def _refine(fields: dict[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    if fields["num_kv_heads"] not in (None, fields["num_heads"]):
        raise ValueError(
            f"num_kv_heads={fields['num_kv_heads']!r}, but multi_query=False has as many as "
            f"num_attention_heads={fields['num_heads']!r}"
        )
    return fields


_KEYS = KeyTable(
    family="falcon",
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    lines=(
        Only("alibi", (True,), _ONLY_RW, default=False),
        Only("new_decoder_architecture", (False,), _ONLY_RW),
        Only("multi_query", (False,), _ONLY_RW, default=True),
        Only("parallel_attn", (False,), _ONLY_RW, default=True),
        Only(
            "apply_residual_connection_post_layernorm",
            (False,),
            "Falcon's readers disagree about it",
            written=False,
        ),
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model", aliases=("n_embed",)),
        Key("num_hidden_layers", "num_layers", aliases=("n_layer",)),
        Key("num_attention_heads", "num_heads", aliases=("n_head",)),
        Key("num_kv_heads", "num_kv_heads", None, aliases=("n_head_kv",)),
        Key("max_position_embeddings", "max_len", 2048),
        Key("ffn_hidden_size", "feed_forward_dim", None),
        Key(
            "activation",
            "activation",
            "gelu",
            **one_of(
                ("gelu", "gelu"),
                ("gelu_pytorch_tanh", "gelu_tanh"),
                ("gelu_new", "gelu_tanh"),
                ("relu", "relu"),
                ("silu", "silu"),
                ("swish", "silu"),
            ),
        ),
        Key("bias", "attention_bias", False),
        Key("bias", "ffn_bias", False),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("initializer_range", "init_std", 0.02),
        Key("hidden_dropout", "dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Neutral(("rope_parameters", "rope_scaling", "rope_theta"), "nothing is rotated"),
        Neutral(("num_ln_in_parallel_attn",), "attention and feed-forward are not parallel"),
    ),
    implied={"expansion_factor": 4, "distance": "bfloat16"},
    refine=_refine,
)


def _recognises(source: Source) -> bool:
    return source.model_type in _MODEL_TYPES


def _read_config(source: Source) -> ALiBiConfig:
    return _KEYS.read(source.config or {}, source.ignored)


def _write_config(config: ALiBiConfig) -> dict[str, Any]:
    """With the heads of keys and values, which the table leaves to their default."""
    return _KEYS.write(config) | {"num_kv_heads": config.num_heads}


FAMILY = Family(
    "falcon",
    _recognises,
    _read_config,
    bloom.ROWS,  # without the norm after the embedding
    aliases=bloom.ALIASES,
    derived=bloom.DERIVED,
    write_config=_write_config,
    label="folder, as transformers' Falcon-RW",
    neutral_keys=_KEYS.neutral_keys,
    peer=Peer(attention="sdpa"),  # the eager one applies ALiBi twice
)
