"""The levels of conformance: each one function, and the cases that it must pass."""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """What can be claimed by itself.

    Attributes:
        function: of the protocol, by which an implementation offers this level.
        result: name of the only array that the function returns; None if it returns several.
        shows: what a claim says.
    """

    function: str
    result: str | None
    shows: str


LEVELS = {
    "bias": Level("biased_logits", "biased_logits", "slopes, distances, scale and masks"),
    "attention": Level("attention", "attention", "softmax, shared heads, queries without keys"),
    "model": Level("forward", None, "every layer, from tokens or embeddings to logits"),
    "gradients": Level("gradients", None, "the gradient of every parameter"),
    "cache": Level("decode", "logits", "keys and values that are kept between calls"),
    "training": Level("train_step", None, "loss, learning rate, clipping and AdamW"),
    "sampling": Level("sample", None, "logits processors, and the token of a uniform number"),
    "seeds": Level("uniforms", "uniforms", "the uniform numbers of a seed"),
    "conversion": Level("to_flax", None, "names, shapes and layouts of parameters"),
}
