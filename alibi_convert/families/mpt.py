"""MPT (mosaicml), Replit-code-v1 and their fine-tunes, as llm-foundry and transformers keep them.

llm-foundry defines what the keys mean. transformers' MptForCausalLM ignores `alibi_bias_max`,
`qk_ln`, `logit_scale`, `no_bias`, `norm_type`, `ffn_config` and `expansion_ratio`, and refuses
grouped queries: an export that needs one of them is right only for llm-foundry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alibi_convert.families.family import Family, Peer, Source, tied_head
from alibi_convert.families.keys import (
    Key,
    KeyTable,
    Neutral,
    Only,
    flag,
    one_of,
    without_general_keys,
)
from alibi_convert.rules import Row, both
from alibi_spec import ALiBiConfig

_MODEL_TYPES = ("mpt", "mosaic_gpt", "replit_lm")
_NORMS = one_of(
    ("low_precision_layernorm", "layer"),
    ("layernorm", "layer"),
    ("low_precision_rmsnorm", "rms"),
    ("rmsnorm", "rms"),
)
_ACTIVATIONS = one_of(
    (None, "gelu"),
    ({"name": "gelu"}, "gelu"),
    ({"name": "gelu", "approximate": "none"}, "gelu"),
    ({"name": "gelu", "approximate": "tanh"}, "gelu_tanh"),
    ({"name": "relu"}, "relu"),
    ({"name": "silu"}, "silu"),
)
# Keys of the older, flat configurations (Replit-code-v1, mosaic_gpt) that went into attn_config.
_FLAT = {
    "alibi": "alibi",
    "alibi_bias_max": "alibi_bias_max",
    "attn_clip_qkv": "clip_qkv",
    "attn_impl": "attn_impl",
    "attn_pdrop": "attn_pdrop",
    "attn_qk_ln": "qk_ln",
    "attn_uses_sequence_id": "attn_uses_sequence_id",
    "prefix_lm": "prefix_lm",
    "softmax_scale": "softmax_scale",
}
_INITIAL_WEIGHTS = (
    "emb_init_std",
    "emb_init_uniform_lim",
    "fan_mode",
    "init_config",
    "init_div_is_residual",
    "init_gain",
    "init_nonlinearity",
    "init_std",
    "param_init_fn",
)


def _norm(norm_type: Any) -> str:
    return _NORMS["read"](norm_type.lower() if isinstance(norm_type, str) else norm_type)


def _negated(value: Any) -> bool:
    return not flag(value)


def _clip(value: float | None) -> float | None:
    """As a float, which transformers insists on; zero clips nothing."""
    return float(value) if value else None


def _integer_if_whole(value: float) -> float:
    """transformers insists on integers here."""
    return int(value) if value == int(value) else value


def _attention_type(num_kv_heads: int | None) -> str:
    names = {None: "multihead_attention", 1: "multiquery_attention"}
    return names.get(num_kv_heads, "grouped_query_attention")


def _grouped_heads(num_kv_heads: int | None) -> int | None:
    """llm-foundry takes their number only for grouped queries."""
    return None if num_kv_heads == 1 else num_kv_heads


def _kv_heads(attention: Mapping[str, Any], num_heads: int) -> int | None:
    kind, given = attention.get("attn_type", "multihead_attention"), attention.get("kv_n_heads")
    if kind == "grouped_query_attention" and given is not None:
        return given
    meant = {"multihead_attention": num_heads, "multiquery_attention": 1}.get(kind)
    if meant is None or given not in (None, meant):
        raise ValueError(f"attn_type={kind!r} with kv_n_heads={given!r} cannot be honoured")
    return meant


def _refine(fields: dict[str, Any], foreign: Mapping[str, Any]) -> dict[str, Any]:
    d_model, ratio = fields["d_model"], fields["expansion_factor"]
    width = fields["feed_forward_dim"]
    if width is None and isinstance(ratio, float):
        if not (ratio * d_model).is_integer():
            raise ValueError(f"expansion_ratio={ratio!r} times d_model={d_model} is not an integer")
        width = int(ratio * d_model)
    if width is not None:
        fields |= {"expansion_factor": 1, "feed_forward_dim": width}
    if foreign.get("attention_bias", False) and foreign.get("no_bias", True):
        raise ValueError("attention_bias=True together with no_bias=True cannot be honoured")
    attention = foreign.get("attn_config") or {}
    for given in (foreign.get("head_dim"), attention.get("head_dim")):
        if given is not None and given * fields["num_heads"] != d_model:
            raise ValueError(f"head_dim={given!r} cannot be honoured: it is d_model / n_heads here")
    fields["num_kv_heads"] = _kv_heads(attention, fields["num_heads"])
    if fields["norm"] == "rms":
        fields["norm_bias"] = False  # even where no_bias is false
    if fields["logit_scale"] == "inv_sqrt_d_model":
        fields["logit_scale"] = 1 / math.sqrt(d_model)
    return fields


_KEYS = KeyTable(
    family="mpt",
    model_type="mpt",
    architectures=("MptForCausalLM",),
    lines=(
        Only("attn_config.alibi", (True,), "the model has no ALiBi", default=False),
        Only("attn_config.rope", (False,), "queries and keys are rotated", written=False),
        Only("attn_config.nope", (False,), "layers differ", written=False),
        Only(
            "attn_config.attn_temperature_tuning.attn_scale",
            (0.0, 0, None),
            "queries are scaled by their position",
            written=False,
        ),
        Only("attn_config.prefix_lm", (False,), "a prefix sees ahead", written=False),
        Only("attn_config.qk_gn", (False,), "a norm for every head", written=False),
        Only("attn_config.fused_qkv", (True,), "Wqkv is in three tensors", written=False),
        Only("attn_config.sliding_window_size", (-1,), "attention has a window", written=False),
        Only("attn_config.attn_logit_softcapping", (None,), "logits are capped", written=False),
        Only("final_logit_softcapping", (None,), "logits are capped", written=False),
        Only("attn_config.flex_attn_mod_list", ([], None), "logits are modified", written=False),
        Only("attn_config.kv_dim", (None,), "keys come from elsewhere", written=False),
        Only("attn_config.reuse_kv_layer_idx", (None,), "layers share keys", written=False),
        Only("attn_config.reuse_kv_x_layer_idx", (None,), "layers share inputs", written=False),
        Only("residual_modification", (None,), "branches are scaled", written=False),
        Only("block_overrides", (None,), "layers differ", written=False),
        Only("attn_config.attn_impl", ("torch", "flash", "triton", "flex"), "not a known kernel"),
        Key("vocab_size", "vocab_size"),
        Key("d_model", "d_model"),
        Key("n_layers", "num_layers"),
        Key("n_heads", "num_heads"),
        Key("max_seq_len", "max_len", 2048),
        Key("attn_config.attn_type", "num_kv_heads", None, write=_attention_type),
        Key("attn_config.kv_n_heads", "num_kv_heads", None, write=_grouped_heads),
        Key("attn_config.clip_qkv", "qkv_clip", None, _clip, _clip),
        Key("attn_config.qk_ln", "qk_norm", False),
        Key("attn_config.softmax_scale", "attention_scale", None),
        Key("attn_config.alibi_bias_max", "bias_max", 8, write=_integer_if_whole),
        Key("attn_config.attn_pdrop", "attention_dropout", 0, write=_integer_if_whole),
        Key("resid_pdrop", "dropout", 0.0),
        Key("emb_pdrop", "embedding_dropout", 0.0),
        Key(
            "ffn_config.ffn_type",
            "gated_ffn",
            "mptmlp",
            **one_of(("mptmlp", False), ("mptglu", True)),
        ),
        Key("ffn_config.ffn_act_fn", "activation", None, **_ACTIVATIONS),
        Key("ffn_config.ffn_hidden_size", "feed_forward_dim", None),
        Key("expansion_ratio", "expansion_factor", 4, aliases=("mlp_ratio",)),
        Key("no_bias", "norm_bias", True, _negated, _negated),
        Key("no_bias", "attention_bias", True, _negated, _negated),
        Key("no_bias", "ffn_bias", True, _negated, _negated),
        Key("norm_type", "norm", "low_precision_layernorm", _norm, _NORMS["write"]),
        Key("norm_eps", "norm_eps", 1e-5, aliases=("layer_norm_epsilon",)),
        Key("layer_norm_epsilon", "norm_eps", 1e-5, aliases=("norm_eps",)),
        Key(
            "logit_scale",
            "logit_scale",
            None,
            lambda scale: 1.0 if scale is None else scale,
            lambda scale: None if scale == 1 else float(scale),
        ),
        Key("initializer_range", "init_std", 0.02),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Neutral(("learned_pos_emb",), "ALiBi turns them off"),
        Neutral(
            (
                "attn_config.rope_dail_config",
                "attn_config.rope_hf_config",
                "attn_config.rope_impl",
                "attn_config.rope_theta",
            ),
            "nothing is rotated",
        ),
        Neutral(("attention_bias", "head_dim", "attn_config.head_dim"), "checked when refined"),
        Neutral(("attn_config.attn_temperature_tuning.floor_scale",), "the tuning is off"),
        Neutral(("residual_coeff",), "branches are not scaled"),
        Neutral(("attn_config.attn_uses_sequence_id",), "only for inputs with sequence ids"),
        Neutral(("attn_config.seq_parallel_world_size",), "how work is divided"),
        Neutral(("use_pad_tok_in_ffn",), "changes only padded positions"),
        Neutral(("embedding_fraction",), "scales only gradients"),
        Neutral(("low_precision_layernorm",), "an older norm_type; a LayerNorm either way"),
        Neutral(_INITIAL_WEIGHTS, "initial weights"),
        Neutral(
            ("fc_type", "ffn_config.fc_type", "init_device", "loss_fn", "name", "verbose"),
            "not about the model",
        ),
    ),
    implied={},
    refine=_refine,
)

_MODULES = (
    ("transformer.blocks.{i}.norm_1", "transformer.layers.{i}.attn_norm"),
    ("transformer.blocks.{i}.attn.Wqkv", "transformer.layers.{i}.attn.{query,key,value}"),
    ("transformer.blocks.{i}.attn.q_ln", "transformer.layers.{i}.attn.query_norm"),
    ("transformer.blocks.{i}.attn.k_ln", "transformer.layers.{i}.attn.key_norm"),
    ("transformer.blocks.{i}.attn.out_proj", "transformer.layers.{i}.attn.output"),
    ("transformer.blocks.{i}.norm_2", "transformer.layers.{i}.ffn_norm"),
    ("transformer.blocks.{i}.ffn.gate_proj", "transformer.layers.{i}.ffn.gate"),
    ("transformer.blocks.{i}.ffn.up_proj", "transformer.layers.{i}.ffn.fc1"),
    ("transformer.blocks.{i}.ffn.down_proj", "transformer.layers.{i}.ffn.fc2"),
    ("transformer.norm_f", "transformer.final_norm"),
)
_ROWS = (
    Row("transformer.wte.weight", "token_embedding.weight"),
    *(row for names in _MODULES for row in both(*names)),
    Row("lm_head.weight", "lm_head.weight"),
)
_BLOCK = r"(transformer\.blocks\.\d+)"
_ALIASES = (  # of the model without its head; of Replit-code-v1 and MPT before llm-foundry
    (r"((?:wte|blocks\.\d+|norm_f|ln_f)\..+)", r"transformer.\1"),
    (_BLOCK + r"\.ln_([12])\.(.+)", r"\1.norm_\2.\3"),
    (_BLOCK + r"\.mlp\.(?:mlp_up|up_proj)\.(.+)", r"\1.ffn.up_proj.\2"),
    (_BLOCK + r"\.mlp\.(?:mlp_down|down_proj)\.(.+)", r"\1.ffn.down_proj.\2"),
    (r"transformer\.ln_f\.(.+)", r"transformer.norm_f.\1"),
)


def _recognises(source: Source) -> bool:
    return source.model_type in _MODEL_TYPES


def _read_config(source: Source) -> ALiBiConfig:
    return _KEYS.read(_nested(source.config or {}), source.ignored)


def _nested(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with an attn_config of which all keys are about attention."""
    attention = foreign.get("attn_config")
    if not isinstance(attention, Mapping | None):
        return dict(foreign)
    is_flat = "attn_config" not in foreign and any(name in _FLAT for name in foreign)
    if is_flat:
        attention = {_FLAT[name]: value for name, value in foreign.items() if name in _FLAT}
        if foreign.get("multiquery_attention", False):
            attention["attn_type"] = "multiquery_attention"
        foreign = {name: value for name, value in foreign.items() if name not in _FLAT}
        foreign.pop("multiquery_attention", None)
    own = without_general_keys(attention or {})
    # Its MPT has ALiBi where nothing is said; that of llm-foundry, without these keys, has not.
    if not is_flat and {"initializer_range", "layer_norm_epsilon"} <= foreign.keys():
        own = {"alibi": True, **own}
    return dict(foreign) | {"attn_config": own}


def _write_config(config: ALiBiConfig) -> dict[str, Any]:
    """Without the keys that are null: llm-foundry takes some of them only where they have a use."""
    foreign = _KEYS.write(config)
    for section in ("attn_config", "ffn_config"):
        foreign[section] = {
            name: value for name, value in foreign[section].items() if value is not None
        }
    return foreign


# The values that transformers' MPT always has: it ignores these fields.
_TRANSFORMERS_ALWAYS = {
    "activation": "gelu",
    "attention_bias": False,
    "bias_max": 8.0,
    "ffn_bias": False,
    "gated_ffn": False,
    "logit_scale": 1.0,
    "norm": "layer",
    "norm_bias": False,
    "qk_norm": False,
}


def _ignored_by_transformers(config: ALiBiConfig) -> list[str]:
    always = _TRANSFORMERS_ALWAYS | {"kv_heads": config.num_heads}
    ignored = [name for name, value in always.items() if getattr(config, name) != value]
    return ignored if config.ffn_dim == 4 * config.d_model else [*ignored, "feed_forward_dim"]


FAMILY = Family(
    "mpt",
    _recognises,
    _read_config,
    _ROWS,
    aliases=_ALIASES,
    derived=tied_head("transformer.wte.weight"),
    write_config=_write_config,
    label="folder, as llm-foundry's and transformers' MPT",
    neutral_keys=_KEYS.neutral_keys,
    peer=Peer(ignores=_ignored_by_transformers),
)
