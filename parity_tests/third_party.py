"""A third implementation, in plain jax.numpy, written from SPEC.md for the conformance kit."""

import types

import jax
import jax.numpy as jnp
import numpy as np


def slopes_of(c):
    n, power = c["num_heads"], 2 ** int(np.log2(c["num_heads"]))
    k = np.concatenate([np.arange(1, power + 1), np.arange(1, 2 * (n - power), 2) / 2]) / power
    k = np.arange(1, n + 1) / n if c["slopes"] == "geometric" else k
    return np.array(c["slopes"] if isinstance(c["slopes"], list) else 2 ** (-c["bias_max"] * k))


def biased_logits(config, query, key, slopes=None, attention_mask=None):
    if config["distance"] == "bfloat16":
        raise NotImplementedError("distances rounded to bfloat16")
    n, limit = key.shape[2], config["slope_interpolation"] or key.shape[2]
    m = (slopes_of(config) if slopes is None else slopes) * (limit / max(limit, n))
    relative = np.arange(n)[None] - np.arange(n - query.shape[2], n)[:, None]
    distance = relative if config["distance"] == "signed" else -abs(relative)
    bias = m.astype("f")[None, :, None, None] * distance.astype("f")[None, None]
    products = query @ key.repeat(query.shape[1] // key.shape[1], 1).swapaxes(2, 3)
    logits = (config["attention_scale"] or query.shape[3] ** -0.5) * products + bias
    seen = (relative <= 0) | (not config["causal"])
    mask = np.ones((1, n)) if attention_mask is None else attention_mask
    return jnp.where(seen[None, None] & (mask != 0)[:, None, None], logits, -jnp.inf)


def attention(config, query, key, value, slopes=None, attention_mask=None):
    logits = biased_logits(config, query, key, slopes, attention_mask)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    e = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))
    p = e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)
    return p @ value.repeat(query.shape[1] // value.shape[1], 1)


def forward(config, parameters, inputs, attention_mask=None, cache=None):
    c, top, trace = config, "transformer." if config["vocab_size"] else "", {}
    p = {name: jnp.asarray(x[None] if x.ndim == 1 else x.T) for name, x in parameters.items()}
    if c["gated_ffn"]:
        raise NotImplementedError("gated feed-forward layers")

    def linear(x, name):
        return x @ p[f"{name}.weight"] + p.get(f"{name}.bias", jnp.zeros((1, 1)))[None]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + c["norm_eps"]) * p[f"{name}.weight"][None]
        return x + p.get(f"{name}.bias", jnp.zeros((1, 1)))[None]

    x = p["token_embedding.weight"].T[inputs] if top else inputs
    x = norm(x, "embedding_norm") if c["embedding_norm"] else x
    for i in range(c["num_layers"]):
        at, clip = f"{top}layers.{i}", c["qkv_clip"] or np.inf
        y = norm(x, f"{at}.attn_norm")
        shape = (*x.shape[:2], -1, c["d_model"] // c["num_heads"])
        qkv = (linear(y, f"{at}.attn.{each}") for each in ("query", "key", "value"))
        q, k, v = (each.clip(-clip, clip).reshape(shape).swapaxes(1, 2) for each in qkv)
        if cache is not None:
            before = cache.get(i, (k[:, :, :0], v[:, :, :0]))
            k, v = cache[i] = jax.tree.map(lambda *each: jnp.concatenate(each, 2), before, (k, v))
        y = attention(c, q, k, v, parameters.get(f"{at}.attn.slopes"), attention_mask)
        y = y.swapaxes(1, 2).reshape(x.shape)
        x = x + (linear(y, f"{at}.attn.output") if c["output_projection"] else y)
        y = linear(norm(x, f"{at}.ffn_norm"), f"{at}.ffn.fc1")
        y = jax.nn.gelu(y, approximate=c["activation"] == "gelu_tanh")
        x = trace[f"layers.{i}"] = x + linear(y, f"{at}.ffn.fc2")
    trace["output"] = norm(x, f"{top}final_norm") if c["final_norm"] else x
    if top:
        head = p["token_embedding.weight" if c["tie_embeddings"] else "lm_head.weight"]
        trace["logits"] = trace["output"] @ head
    return trace


def gradients(config, parameters, inputs, cotangent, attention_mask=None):
    def weighted(p):
        return (cotangent * [*forward(config, p, inputs, attention_mask).values()][-1]).sum()

    return jax.jit(jax.grad(weighted))(parameters)


def decode(config, parameters, inputs, lengths, attention_mask=None):
    @jax.jit
    def step(part, mask, cache):
        return forward(config, parameters, part, mask, cache := dict(cache))["logits"], cache

    mask = np.ones(inputs.shape) if attention_mask is None else attention_mask
    ends, parts, cache = np.cumsum(lengths), [], {}
    for start, end in zip(ends - lengths, ends, strict=True):
        logits, cache = step(inputs[:, start:end], mask[:, :end], cache)
        parts.append(logits)
    return np.concatenate(parts, 1)


def create():
    return types.SimpleNamespace(**globals())
