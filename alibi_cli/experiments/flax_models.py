"""Models with any positions in Flax, and how well they predict a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from alibi_cli.experiments.positions import ROTARY, SINUSOIDAL, config_for, sinusoids, turn
from alibi_flax import ALiBiLM
from alibi_spec import ALiBiConfig

Method = Callable[..., Any]
Context = nn.module.InterceptorContext


def bits_per_byte(config: ALiBiConfig, positions: str) -> Callable[[Any, np.ndarray, int], float]:
    """A function of params, excerpts and a length, compiled once for all params.

    Its result is that of `torch_models.bits_per_byte` for sequences that do not overlap.

    Args:
        config: of the ALiBi model.
        positions: "ALiBi", "rotary" or "sinusoidal".
    """
    model = ALiBiLM(config_for(positions, config))
    interceptor = {ROTARY: _turned, SINUSOIDAL: _with_sinusoids}.get(positions, _as_it_is)

    @jax.jit
    def mean_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        with nn.intercept_methods(interceptor):
            logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def measured(params: Any, excerpts: np.ndarray, length: int) -> float:
        inputs, targets = (part.reshape(-1, length) for part in (excerpts[:, :-1], excerpts[:, 1:]))
        return float(
            mean_loss(params, inputs.astype(np.int32), targets.astype(np.int32))
        ) / math.log(2)

    return measured


def _as_it_is(method: Method, args: Any, kwargs: Any, _context: Context) -> Any:
    return method(*args, **kwargs)


def _with_sinusoids(method: Method, args: Any, kwargs: Any, context: Context) -> Any:
    if (context.module.name, context.method_name) != ("transformer", "__call__"):
        return method(*args, **kwargs)
    x, *others = args
    return method(x + sinusoids(x.shape[1], x.shape[2])[None], *others, **kwargs)


def _turned(method: Method, args: Any, kwargs: Any, context: Context) -> Any:
    """Queries and keys, [batch, seq, heads, head_dim], turned by their positions."""
    output = method(*args, **kwargs)
    if context.method_name != "__call__" or context.module.name not in ("query", "key"):
        return output
    cos, sin = map(jnp.asarray, turn(output.shape[1], output.shape[3]))
    left, right = jnp.split(output, 2, axis=-1)
    return jnp.concatenate((left * cos - right * sin, left * sin + right * cos), axis=-1)
