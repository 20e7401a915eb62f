"""Continuation of prompts, with a cache, token by token (SPEC.md §11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Int32, Integer

from alibi_flax.cache import KVCache
from alibi_flax.model import SCANNED_CACHE, ALiBiLM, AttentionMask, checked_tokens
from alibi_flax.sampling import chosen_tokens
from alibi_spec.cache import bucket
from alibi_spec.checks import (
    UNPROVED,
    check_array,
    check_count,
    check_generation,
    check_mask,
    check_windows,
    require_vocabulary,
)
from alibi_spec.sampling import Endings, Sampling, left_padded, uniforms

BLOCK = 16  # steps that run on the device before their tokens are looked at


@dataclass(frozen=True)
class Generated:
    """The result of `generate`.

    Attributes:
        tokens: the prompts as passed, then the new tokens; `pad_token_id` after the end of a
            sequence.
        lengths: number of new tokens of each sequence, including the one that ended it.
        finish_reasons: of each sequence: "eos", "stop_string" or "length".
        log_probabilities: of the new tokens, by the model (before penalty, temperature and cuts);
            0 after the end of a sequence; None unless requested.
    """

    tokens: Integer[Array, "batch total_len"]
    lengths: Int[np.ndarray, " batch"]
    finish_reasons: tuple[str, ...]
    log_probabilities: Float[Array, "batch new_len"] | None


def generate(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch prompt_len"],
    max_new_tokens: int,
    *,
    attention_mask: AttentionMask | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    prefill_chunk: int = 1024,
    windows: Int[np.ndarray, "layers heads"] | None = None,
    return_log_probabilities: bool = False,
) -> Generated:
    """Continue prompts by up to `max_new_tokens` tokens, past `max_len` too.

    One compiled program serves prompts of all lengths in a bucket, another all steps, which run on
    the device 16 at a time; with stop strings, which are looked for on the host, one at a time.

    The same seed gives the same tokens in both backends, except where a drawn number is within
    rounding of the boundary between two tokens (SPEC.md §11).

    Args:
        tokens: the prompts.
        attention_mask: 0 for padding, on either side: prompts may have unequal lengths. Each is
            continued as if the others were absent (but for `slope_interpolation`: SPEC.md §11).
        do_sample: draw from the distribution; else the likeliest token is taken.
        temperature: it and the next four are those of `alibi_spec.sampling.Sampling`.
        eos_token_id: tokens that end a sequence.
        pad_token_id: what follows an ended sequence; None is the first of `eos_token_id`, or 0.
        stop_strings: texts that end a sequence; the tokens that complete one are kept.
        tokenizer: decodes tokens for `stop_strings`.
        seed: of the numbers that draw tokens.
        prefill_chunk: positions of the prompt that are read at a time.
        windows: keep only the keys that each head provably needs, so that memory stops growing:
            `alibi_spec.bounds.model_windows` (SPEC.md §16). None keeps all.
        return_log_probabilities: return those of the new tokens.

    Raises:
        ValueError: an encoder, a prompt that is only padding, or an option out of its range;
            with windows, logits so large that a key is needed which is gone.
    """
    endings, steps = _begun(
        *(model, params, tokens, max_new_tokens, attention_mask),
        Sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty),
        *(eos_token_id, pad_token_id, stop_strings, tokenizer, seed, prefill_chunk, windows),
        BLOCK,
    )
    prompts = jnp.asarray(tokens)
    taken, scores = [prompts.astype(jnp.promote_types(prompts.dtype, jnp.int32))], []
    for new, log_probability in steps:
        taken.append(jnp.asarray(new[:, None], taken[0].dtype))
        scores.append(log_probability)
    lengths, log_probabilities = np.array(endings.lengths), None
    if return_log_probabilities:
        every = np.stack(scores, axis=1) if scores else np.zeros((len(tokens), 0), np.float32)
        goes_on = np.arange(every.shape[1])[None] < lengths[:, None]
        log_probabilities = jnp.asarray(np.where(goes_on, every, every.dtype.type(0)))
    return Generated(
        jnp.concatenate(taken, axis=1), lengths, tuple(endings.reasons), log_probabilities
    )


def stream(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch prompt_len"],
    max_new_tokens: int,
    *,
    attention_mask: AttentionMask | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    prefill_chunk: int = 1024,
    windows: Int[np.ndarray, "layers heads"] | None = None,
) -> Iterator[Integer[Array, " batch"]]:
    """The new tokens of `generate`, [batch], as they come. Arguments and errors are the same."""
    _, steps = _begun(
        *(model, params, tokens, max_new_tokens, attention_mask),
        Sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty),
        *(eos_token_id, pad_token_id, stop_strings, tokenizer, seed, prefill_chunk, windows),
        1,
    )
    return (jnp.asarray(new) for new, _ in steps)


_Steps = Iterator[tuple[Integer[np.ndarray, " batch"], Float[np.ndarray, " batch"]]]


def _begun(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch prompt_len"],
    max_new_tokens: int,
    attention_mask: AttentionMask | None,
    sampling: Sampling,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any,
    seed: int,
    prefill_chunk: int,
    windows: Int[np.ndarray, "layers heads"] | None,
    block: int,
) -> tuple[Endings, _Steps]:
    """Check the arguments; return the state of the endings, and the steps."""
    config = model.config
    check_generation(config.causal, config.head, max_new_tokens)
    if model.scan_layers:
        raise ValueError(SCANNED_CACHE)
    check_count("prefill_chunk", prefill_chunk)
    if windows is not None:
        check_windows(np.shape(windows), bool((np.asarray(windows) >= 0).any()), config)
    vocab_size = require_vocabulary(config.vocab_size)
    prompts = np.asarray(checked_tokens(tokens, vocab_size))
    visible = np.ones(prompts.shape, bool)
    if attention_mask is not None:
        kinds = (Array, np.ndarray)
        check_array("attention_mask", attention_mask, kinds, "a JAX or NumPy array")
        is_integer = not jnp.issubdtype(attention_mask.dtype, jnp.floating)
        check_mask("attention_mask", attention_mask.shape, is_integer, *prompts.shape)
        prompts, visible = left_padded(prompts, np.asarray(attention_mask))
    endings = Endings.of(
        *(len(prompts), vocab_size),
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    drawn = uniforms(seed, len(prompts)) if sampling.do_sample else None
    return endings, _steps(
        *(model, params, prompts, visible, max_new_tokens, sampling, endings, drawn),
        *(prefill_chunk, windows, 1 if endings.stop_strings else block),
    )


def _steps(
    model: ALiBiLM,
    params: dict[str, Any],
    prompts: Integer[np.ndarray, "batch prompt_len"],
    visible: Bool[np.ndarray, "batch prompt_len"],
    max_new_tokens: int,
    sampling: Sampling,
    endings: Endings,
    drawn: Iterator[Float[np.ndarray, " batch"]] | None,
    prefill_chunk: int,
    windows: Int[np.ndarray, "layers heads"] | None,
    block: int,
) -> _Steps:
    """The new tokens of each step and their log-probabilities, `block` steps at a time."""
    if max_new_tokens == 0:
        return
    batch, prompt_len = prompts.shape
    is_there = None
    if sampling.repetition_penalty != 1.0:
        is_there = np.zeros((batch, require_vocabulary(model.config.vocab_size)), bool)
        is_there[np.nonzero(visible)[0], prompts[visible]] = True
        is_there = jnp.asarray(is_there)
    # More padding on the left: whole chunks, so that few programs serve all lengths.
    prefill_chunk = min(prefill_chunk, bucket(prompt_len))
    filler = -prompt_len % prefill_chunk
    prompts, visible = (np.pad(each, ((0, 0), (filler, 0))) for each in (prompts, visible))
    capacity = bucket(prompts.shape[1] + max_new_tokens - 1)
    cache = KVCache.empty(
        model.config, batch, capacity, windows=windows, dtype=_cache_dtype(model, params)
    )
    read_len, logits = jnp.int32(prompt_len), jnp.zeros(0)
    for start in range(0, prompts.shape[1], prefill_chunk):
        chunk = slice(start, start + prefill_chunk)
        # What reads the first chunk is another program than what reads the others.
        cache = replace(cache, is_new=start == 0)
        logits, cache = _read(model, params, prompts[:, chunk], visible[:, chunk], read_len, cache)
    eos = np.array(sorted(endings.eos), np.int32)
    uniform = None if drawn is None else next(drawn)
    state = _chosen(logits, is_there, uniform, eos, read_len + 1, cache, sampling)
    tokens, scores = state.tokens[None], state.log_probabilities[None]
    count, left = 1, max_new_tokens
    while True:
        if windows is not None and not state.cache.is_proved:
            raise ValueError(UNPROVED)
        tokens, scores = np.asarray(tokens)[:count], np.asarray(scores)[:count]
        for new, log_probabilities in zip(tokens, scores, strict=True):
            yield np.array(endings.take(new.tolist()), new.dtype), log_probabilities
            if endings.are_all:
                return
        left -= count
        if left == 0:
            return
        count = min(block, left)
        uniforms = None if drawn is None else np.stack([next(drawn) for _ in range(block)])
        tokens, scores, state = _block(
            model, params, state, np.int32(count), uniforms, eos, block, sampling
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "log_probabilities", "has_ended", "is_there", "read_len", "cache"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _State:
    """What a step takes over from the one before.

    Attributes:
        tokens: the newest of each sequence, which the cache does not hold yet.
        log_probabilities: of these tokens.
        has_ended: by a token of `eos_token_id`.
        is_there: tokens that the penalty applies to, without the newest; None without a penalty.
        read_len: positions that will have been read with these tokens, without what was padded.
        cache: of all tokens before these.
    """

    tokens: Integer[Array, " batch"]
    log_probabilities: Float[Array, " batch"]
    has_ended: Bool[Array, " batch"]
    is_there: Bool[Array, "batch vocab"] | None
    read_len: Int32[Array, ""]
    cache: KVCache


def _cache_dtype(model: ALiBiLM, params: dict[str, Any]) -> Any:
    def first_key(model: ALiBiLM) -> Array:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return model.transformer.layers[0].attn.attention_inputs(model.embed(tokens))["key"]

    return jax.eval_shape(lambda: model.apply({"params": params}, method=first_key)).dtype


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _read(
    model: ALiBiLM,
    params: dict[str, Any],
    tokens: Integer[Array, "batch seq"],
    visible: Bool[Array, "batch seq"],
    interpolated_len: Int32[Array, ""],
    cache: KVCache,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """The logits after the last of these tokens, and the cache that holds them."""
    cache = replace(cache, interpolated_len=interpolated_len)
    call: Any = partial(model.apply, {"params": params})
    logits, cache = call(tokens, visible, cache=cache, logits_to_keep=1)
    return logits[:, 0], replace(cache, interpolated_len=None)


@partial(jax.jit, static_argnums=6, donate_argnums=5)
def _chosen(
    logits: Float[Array, "batch vocab"],
    is_there: Bool[Array, "batch vocab"] | None,
    uniform: Float[Array, " batch"] | None,
    eos: Int32[Array, " eos"],
    read_len: Int32[Array, ""],
    cache: KVCache,
    sampling: Sampling,
) -> _State:
    """The state after the choice of the tokens that these logits are of."""
    tokens = chosen_tokens(logits, is_there, uniform, sampling)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    every = jax.nn.log_softmax(wide, axis=-1)
    log_probabilities = jnp.take_along_axis(every, tokens[:, None], axis=1)[:, 0]
    return _State(tokens, log_probabilities, jnp.isin(tokens, eos), is_there, read_len, cache)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def _step(
    model: ALiBiLM,
    params: dict[str, Any],
    state: _State,
    uniform: Float[Array, " batch"] | None,
    eos: Int32[Array, " eos"],
    sampling: Sampling,
) -> _State:
    """Read the newest tokens, and choose those that follow."""
    tokens, is_there, read_len = state.tokens, state.is_there, state.read_len
    if is_there is not None:
        is_there = is_there.at[jnp.arange(len(tokens)), tokens].set(True)
    visible = jnp.ones((len(tokens), 1), jnp.bool_)
    logits, cache = _read(model, params, tokens[:, None], visible, read_len, state.cache)
    new = _chosen(logits, is_there, uniform, eos, read_len + 1, cache, sampling)
    return replace(new, has_ended=state.has_ended | new.has_ended)


@partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def _block(
    model: ALiBiLM,
    params: dict[str, Any],
    state: _State,
    count: Int32[Array, ""],
    uniforms: Float[Array, "size batch"] | None,
    eos: Int32[Array, " eos"],
    size: int,
    sampling: Sampling,
) -> tuple[Integer[Array, "size batch"], Float[Array, "size batch"], _State]:
    """`count` steps, at most `size`, or until every sequence has ended: their tokens, the
    log-probabilities of these, and the last state."""

    def goes_on(carry: Any) -> Bool[Array, ""]:
        step, _, _, state = carry
        return (step < count) & ~state.has_ended.all()

    def one_more(carry: Any) -> Any:
        step, tokens, scores, state = carry
        uniform = None if uniforms is None else uniforms[step]
        state = _step(model, params, state, uniform, eos, sampling)
        tokens = tokens.at[step].set(state.tokens)
        return step + 1, tokens, scores.at[step].set(state.log_probabilities), state

    start, shape = jnp.int32(0), (size, len(state.tokens))
    tokens = jnp.zeros(shape, state.tokens.dtype)
    scores = jnp.zeros(shape, state.log_probabilities.dtype)
    return jax.lax.while_loop(goes_on, one_more, (start, tokens, scores, state))[1:]
