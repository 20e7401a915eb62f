"""MPT's forward pass in float64, derived from llm-foundry's equations: every option that it has.

One sequence and one head at a time, straight from a config.json and the tensors of its file, so
that nothing of what is tested is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])
_ACTIVATIONS = {
    "none": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def draw_arrays(config: Mapping[str, Any], hidden: int) -> dict[str, np.ndarray]:
    """The tensors of a file with this configuration, far from their initial values."""
    width, heads, attention = config["d_model"], config["n_heads"], config["attn_config"]
    kv_width = width // heads * attention.get("kv_n_heads", heads)
    if attention["attn_type"] == "multiquery_attention":
        kv_width = width // heads
    linears = {"attn.Wqkv": (width + 2 * kv_width, width), "attn.out_proj": (width, width)}
    linears |= {"ffn.up_proj": (hidden, width), "ffn.down_proj": (width, hidden)}
    if config["ffn_config"]["ffn_type"] == "mptglu":
        linears["ffn.gate_proj"] = (hidden, width)
    norms = {"norm_1": width, "norm_2": width}
    if attention.get("qk_ln"):
        norms |= {"attn.q_ln": width, "attn.k_ln": kv_width}
    rng = np.random.default_rng(0)
    biased, arrays = not config["no_bias"], {}

    def draw(name: str, shape: tuple[int, ...], has_bias: bool) -> None:
        centre, scale = (0.0, shape[-1] ** -0.5) if len(shape) == 2 else (1.0, 0.3)
        arrays[f"{name}.weight"] = centre + scale * rng.standard_normal(shape)
        if has_bias:
            arrays[f"{name}.bias"] = 0.3 * rng.standard_normal(shape[0])

    draw("transformer.wte", (config["vocab_size"], width), has_bias=False)
    norm_bias = biased and not config["norm_type"].endswith("rmsnorm")
    for index in range(config["n_layers"]):
        for name, shape in linears.items():
            draw(f"transformer.blocks.{index}.{name}", shape, biased)
        for name, size in norms.items():
            draw(f"transformer.blocks.{index}.{name}", (size,), norm_bias)
    draw("transformer.norm_f", (width,), norm_bias)
    if not config["tie_word_embeddings"]:
        draw("lm_head", (config["vocab_size"], width), has_bias=False)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class PlainMPT:
    """The model of one folder."""

    def __init__(self, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.attention: Mapping[str, Any] = config["attn_config"]
        self.ffn: Mapping[str, Any] = config.get("ffn_config", {})
        self.weights = {name: array.astype(np.float64) for name, array in arrays.items()}

    def logits(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of every position; those of padded queries mean nothing."""
        return np.stack([self._sequence(*row) for row in zip(tokens, mask == 1, strict=True)])

    def _sequence(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        x = self.weights["transformer.wte.weight"][tokens]
        for index in range(self.config["n_layers"]):
            block = f"transformer.blocks.{index}"
            x = x + self._attend(self._norm(x, f"{block}.norm_1"), f"{block}.attn", real)
            x = x + self._feed_forward(self._norm(x, f"{block}.norm_2"), f"{block}.ffn")
        head = "transformer.wte" if self.config["tie_word_embeddings"] else "lm_head"
        logits = self._norm(x, "transformer.norm_f") @ self.weights[f"{head}.weight"].T
        scale = self.config.get("logit_scale") or 1.0
        return logits * (self.config["d_model"] ** -0.5 if scale == "inv_sqrt_d_model" else scale)

    def _attend(self, x: np.ndarray, module: str, real: np.ndarray) -> np.ndarray:
        heads, width = self.config["n_heads"], self.config["d_model"]
        head_dim = width // heads
        kinds = {"multihead_attention": heads, "multiquery_attention": 1}
        kv_heads = kinds.get(self.attention["attn_type"]) or self.attention["kv_n_heads"]
        qkv = self._linear(x, f"{module}.Wqkv")
        if self.attention.get("clip_qkv"):
            qkv = qkv.clip(-self.attention["clip_qkv"], self.attention["clip_qkv"])
        query, key, value = np.split(qkv, [width, width + kv_heads * head_dim], axis=-1)
        if self.attention.get("qk_ln"):
            query, key = self._norm(query, f"{module}.q_ln"), self._norm(key, f"{module}.k_ln")
        scale = self.attention.get("softmax_scale") or 1 / math.sqrt(head_dim)
        positions = np.arange(len(x))
        distance = positions[None, :] - positions[:, None]
        outputs = []
        for head, slope in enumerate(self._slopes()):
            own = slice(head * head_dim, (head + 1) * head_dim)
            group = head // (heads // kv_heads)
            shared = slice(group * head_dim, (group + 1) * head_dim)
            scores = scale * query[:, own] @ key[:, shared].T + slope * distance
            scores = np.where((distance <= 0) & real[None, :], scores, -1e300)
            exponentials = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(exponentials / exponentials.sum(-1, keepdims=True) @ value[:, shared])
        return self._linear(np.concatenate(outputs, axis=-1), f"{module}.out_proj")

    def _slopes(self) -> np.ndarray:
        """Those of the next power of two: every other one first, then the rest.

        Rounded once to float32, as the specification does.
        """
        power = 2 ** math.ceil(math.log2(self.config["n_heads"]))
        bias_max = self.attention.get("alibi_bias_max", 8)
        all_slopes = np.array([2 ** (-bias_max * k / power) for k in range(1, power + 1)])
        if power != self.config["n_heads"]:
            all_slopes = np.concatenate([all_slopes[1::2], all_slopes[::2]])
        return all_slopes[: self.config["n_heads"]].astype(np.float32).astype(np.float64)

    def _feed_forward(self, x: np.ndarray, module: str) -> np.ndarray:
        options = self.ffn.get("ffn_act_fn") or {"name": "gelu"}
        name = options["name"]
        act = _ACTIVATIONS[options.get("approximate", "none") if name == "gelu" else name]
        hidden = self._linear(x, f"{module}.up_proj")
        if self.ffn.get("ffn_type") == "mptglu":
            hidden = act(self._linear(x, f"{module}.gate_proj")) * hidden
        else:
            hidden = act(hidden)
        return self._linear(hidden, f"{module}.down_proj")

    def _linear(self, x: np.ndarray, module: str) -> np.ndarray:
        y = x @ self.weights[f"{module}.weight"].T
        return y if self.config["no_bias"] else y + self.weights[f"{module}.bias"]

    def _norm(self, x: np.ndarray, module: str) -> np.ndarray:
        eps = self.config.get("norm_eps", 1e-5)
        weight = self.weights[f"{module}.weight"]
        if self.config["norm_type"].endswith("rmsnorm"):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight
        return y if self.config["no_bias"] else y + self.weights[f"{module}.bias"]


# As published with mosaicml/mpt-7b, mpt-7b-storywriter and mpt-30b.
MPT_7B: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}


def with_attention(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | {"attn_config": config["attn_config"] | changes}


STORYWRITER = with_attention(
    MPT_7B | {"max_seq_len": 65536}, alibi_bias_max=16, attn_impl="triton", clip_qkv=6
)
MPT_30B = MPT_7B | {"d_model": 7168, "max_seq_len": 8192, "n_heads": 64, "n_layers": 48}
# As published with replit/replit-code-v1-3b.
REPLIT: dict[str, Any] = {
    "_name_or_path": "replit/replit-code-v1-3b",
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MPTForCausalLM"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": False,
    "attn_uses_sequence_id": False,
    "d_model": 2560,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "fan_mode": "fan_in",
    "init_device": "cpu",
    "init_div_is_residual": True,
    "init_gain": 0,
    "init_nonlinearity": "relu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 2048,
    "mlp_ratio": 4,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "replit/replit-code-v1-3b",
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 32768,
}
# mosaicml/mpt-1b-redpajama-200b differs from it in these.
MPT_1B = REPLIT | {
    "architectures": ["MosaicGPT"],
    "attn_qk_ln": True,
    "d_model": 2048,
    "model_type": "mosaic_gpt",
    "n_heads": 16,
    "n_layers": 24,
    "vocab_size": 50368,
}
