"""BTLM-3B-8k and the first JAIS models: GPT-2 with ALiBi, SwiGLU and μP's constant factors.

GPT-2 stores its linear maps transposed, [in, out]. SwiGLU is c_fc(x) · silu(c_fc2(x)): the gate is
the second map. The first JAIS models have older names for the factors of μP, which an export as
"jais" has too. Both names are read in either family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from alibi_convert.errors import CheckpointError
from alibi_convert.families.family import Derived, Family, Source, tied_head
from alibi_convert.families.keys import Key, KeyTable, Neutral, Only, flag, one_of
from alibi_convert.rules import Row
from alibi_spec import ALiBiConfig, model_slopes, slopes

_LAYER, _OURS = "transformer.h.{i}", "transformer.layers.{i}"
_SLOPES = "transformer.relative_pe.slopes"

_ROWS = (
    Row("transformer.wte.weight", "token_embedding.weight"),
    Row(f"{_LAYER}.ln_1.weight", f"{_OURS}.attn_norm.weight"),
    Row(f"{_LAYER}.ln_1.bias", f"{_OURS}.attn_norm.bias"),
    Row(
        f"{_LAYER}.attn.c_attn.weight",
        f"{_OURS}.attn.{{query,key,value}}.weight",
        "embed rows -> rows embed",
    ),
    Row(f"{_LAYER}.attn.c_attn.bias", f"{_OURS}.attn.{{query,key,value}}.bias"),
    Row(
        f"{_LAYER}.attn.c_proj.weight",
        f"{_OURS}.attn.output.weight",
        "(heads head_dim) embed -> embed (heads head_dim)",
    ),
    Row(f"{_LAYER}.attn.c_proj.bias", f"{_OURS}.attn.output.bias"),
    Row(f"{_LAYER}.ln_2.weight", f"{_OURS}.ffn_norm.weight"),
    Row(f"{_LAYER}.ln_2.bias", f"{_OURS}.ffn_norm.bias"),
    Row(f"{_LAYER}.mlp.c_fc.weight", f"{_OURS}.ffn.fc1.weight", "embed mlp -> mlp embed"),
    Row(f"{_LAYER}.mlp.c_fc.bias", f"{_OURS}.ffn.fc1.bias"),
    Row(f"{_LAYER}.mlp.c_fc2.weight", f"{_OURS}.ffn.gate.weight", "embed mlp -> mlp embed"),
    Row(f"{_LAYER}.mlp.c_fc2.bias", f"{_OURS}.ffn.gate.bias"),
    Row(f"{_LAYER}.mlp.c_proj.weight", f"{_OURS}.ffn.fc2.weight", "mlp embed -> embed mlp"),
    Row(f"{_LAYER}.mlp.c_proj.bias", f"{_OURS}.ffn.fc2.bias"),
    Row("transformer.ln_f.weight", "transformer.final_norm.weight"),
    Row("transformer.ln_f.bias", "transformer.final_norm.bias"),
    Row("lm_head.weight", "lm_head.weight"),
)

_ACTIVATIONS = one_of(  # ours: (activation, gated)
    ("gelu", ("gelu", False)),
    ("gelu_new", ("gelu_tanh", False)),
    ("gelu_fast", ("gelu_tanh", False)),
    ("gelu_pytorch_tanh", ("gelu_tanh", False)),
    ("relu", ("relu", False)),
    ("silu", ("silu", False)),
    ("swish", ("silu", False)),
    ("swiglu", ("silu", True)),
)
# The older names of the first JAIS models.
_OF_JAIS = {
    "mup_embeddings_scale": "embeddings_scale",
    "mup_scale_qk_dot_by_d": "scale_qk_dot_by_d",
    "mup_width_scale": "width_scale",
}


def _factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("expected a number above 0")
    return float(value)


def _factor_or_none(value: Any) -> float | None:
    return None if value is None else _factor(value)


def _refine(fields: dict[str, Any], foreign: Mapping[str, Any]) -> dict[str, Any]:
    fields["activation"], fields["gated_ffn"] = fields["activation"]
    fields["logit_scale"] = fields.pop("width_scale")
    alpha = fields.pop("output_alpha")
    if "width_scale" not in foreign:  # JAIS's old name stands for the product
        fields["logit_scale"] *= alpha
    is_scaled, by_head_dim = fields.pop("is_scaled"), fields.pop("by_head_dim")
    if fields.pop("slope_factor") is not None and fields["slope_interpolation"] is not None:
        raise ValueError("alibi_scaling has both factor and train_seq_len; expected one of them")
    if not is_scaled:
        fields["attention_scale"] = 1.0
    elif by_head_dim:
        fields["attention_scale"] = 1 / ALiBiConfig(**fields).head_dim
    return fields


def _unrefine(fields: dict[str, Any], config: ALiBiConfig) -> dict[str, Any]:
    scale = fields.pop("attention_scale")
    fields |= {"is_scaled": scale != 1.0, "by_head_dim": scale == 1 / config.head_dim}
    fields |= {"width_scale": fields.pop("logit_scale"), "output_alpha": 1.0, "slope_factor": None}
    return fields | {"activation": (fields["activation"], fields.pop("gated_ffn"))}


_BTLM_KEYS = KeyTable(
    family="btlm",
    model_type="btlm",
    architectures=("BTLMLMHeadModel",),
    lines=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_len", default=1024, aliases=("max_position_embeddings",)),
        Key("n_embd", "d_model", aliases=("hidden_size",)),
        Key("n_layer", "num_layers", aliases=("num_hidden_layers",)),
        Key("n_head", "num_heads", aliases=("num_attention_heads",)),
        Key("n_inner", "feed_forward_dim", default=None),
        Key("activation_function", "activation", "gelu_new", **_ACTIVATIONS),
        Key("resid_pdrop", "dropout", default=0.1),
        Key("embd_pdrop", "embedding_dropout", default=0.1),
        Key("attn_pdrop", "attention_dropout", default=0.1),
        Key("layer_norm_epsilon", "norm_eps", default=1e-5),
        Key("initializer_range", "init_std", default=0.02),
        Key("tie_word_embeddings", "tie_embeddings", default=True),
        Key("scale_attn_weights", "is_scaled", default=True, read=flag),
        Key("mup_scale_qk_dot_by_d", "by_head_dim", False, flag, aliases=("scale_qk_dot_by_d",)),
        Key("mup_embeddings_scale", "embedding_scale", default=1.0, aliases=("embeddings_scale",)),
        Key("mup_width_scale", "width_scale", 1.0, _factor, aliases=("width_scale",)),
        Key("mup_output_alpha", "output_alpha", default=1.0, read=_factor),
        Key("alibi_scaling.factor", "slope_factor", default=None, read=_factor_or_none),
        Key("alibi_scaling.train_seq_len", "slope_interpolation", default=None),
        Only(
            "alibi_scaling.type", ("linear", "dynamic"), "slopes are divided by one factor or none"
        ),
        Only(
            "position_embedding_type",
            ("alibi",),
            "learned positions are not ALiBi",
            default="learned",
        ),
        Only("scale_attn_by_inverse_layer_idx", (False,), "all layers share one scale here"),
        Neutral(("reorder_and_upcast_attn",), "another order of the same operations"),
        Neutral(("is_decoder", "n_ctx"), "the model is causal, of any length"),
        Neutral(
            (
                "summary_activation",
                "summary_first_dropout",
                "summary_proj_to_labels",
                "summary_type",
                "summary_use_proj",
            ),
            "a classifier that the language model does not have",
        ),
    ),
    implied={"expansion_factor": 4},
    refine=_refine,
    unrefine=_unrefine,
)
_JAIS_KEYS = replace(
    _BTLM_KEYS, family="jais", model_type="jais", architectures=("JAISLMHeadModel",)
)


def _read_config(keys: KeyTable, source: Source) -> ALiBiConfig:
    """The configuration, with the slopes that the file holds: the published code uses them."""
    foreign = source.config or {}
    config = keys.read(foreign, source.ignored)
    factor = (foreign.get("alibi_scaling") or {}).get("factor")
    if _SLOPES not in source.tensors and factor is None:
        return config
    stored = source.tensors[_SLOPES].ravel() if _SLOPES in source.tensors else None
    if stored is not None and stored.size != config.num_heads:
        raise CheckpointError(
            f"{_SLOPES} holds {stored.size} slopes, expected one for each of the "
            f"{config.num_heads} heads"
        )
    exact = slopes(config.num_heads)
    used = exact if stored is None else stored.astype(np.float32)  # rounded in a 16-bit file
    used = used if factor is None else used / np.float32(factor)
    if np.array_equal(used, exact):
        return config
    try:
        return replace(config, slopes=tuple(used.tolist()))
    except ValueError as error:
        raise CheckpointError(f"{_SLOPES}: {error}") from None


def _write_config(keys: KeyTable, config: ALiBiConfig) -> dict[str, Any]:
    """Without the slopes, which the file holds: one for each head, the same in all layers."""
    rows = model_slopes(config)
    if config.slopes != "learned" and (rows == rows[0]).all():
        config = replace(config, slopes="paper", bias_max=ALiBiConfig.bias_max)
    foreign = keys.write(config)
    scaling = foreign.pop("alibi_scaling")  # the published code wants these two keys or none
    if config.slope_interpolation is not None:
        names = ("type", "train_seq_len")
        foreign["alibi_scaling"] = {name: scaling[name] for name in names}
    return foreign


def _write_jais_config(config: ALiBiConfig) -> dict[str, Any]:
    """With the older names; `width_scale` is the whole factor on the logits."""
    foreign = _write_config(_JAIS_KEYS, config)
    del foreign["mup_output_alpha"]
    return {_OF_JAIS.get(name, name): value for name, value in foreign.items()}


def _slopes(config: ALiBiConfig) -> dict[str, np.ndarray]:
    """The parameter that the published code multiplies distances by."""
    return {_SLOPES: model_slopes(config)[0][:, None]}


def _derived(config: ALiBiConfig) -> tuple[Derived, ...]:
    buffers = (
        Derived(r"transformer\.relative_pe\.slopes", "slopes: they are in the configuration"),
        Derived(r"transformer\.h\.\d+\.attn\.bias", "causal mask: the model is causal anyway"),
        Derived(r"transformer\.h\.\d+\.attn\.masked_bias", "the logit of a masked key"),
    )
    return (*buffers, *tied_head("transformer.wte.weight")(config))


def _family(
    keys: KeyTable, write_config: Callable[[ALiBiConfig], dict[str, Any]], label: str
) -> Family:
    return Family(
        keys.family,
        lambda source: source.model_type == keys.model_type,
        partial(_read_config, keys),
        _ROWS,
        aliases=((r"((?:wte|h|ln_f|relative_pe)\..*)", r"transformer.\1"),),
        derived=_derived,
        write_config=write_config,
        label=label,
        generated=_slopes,
        neutral_keys=keys.neutral_keys,
    )


FAMILIES = BTLM, JAIS = (
    _family(_BTLM_KEYS, partial(_write_config, _BTLM_KEYS), "folder, as BTLM"),
    _family(_JAIS_KEYS, _write_jais_config, "folder, as the first JAIS models"),
)
