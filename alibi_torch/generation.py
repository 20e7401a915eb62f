"""Continuation of prompts, with a cache, token by token (SPEC.md §11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from alibi_spec.checks import (
    check_array,
    check_count,
    check_generation,
    check_mask,
    check_windows,
    require_vocabulary,
)
from alibi_spec.sampling import Endings, Sampling, left_padded, uniforms
from alibi_torch.cache import KVCache
from alibi_torch.model import ALiBiLM, AttentionMask, checked_tokens, has_observers
from alibi_torch.sampling import chosen_tokens


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

    tokens: Integer[Tensor, "batch total_len"]
    lengths: Int[np.ndarray, " batch"]
    finish_reasons: tuple[str, ...]
    log_probabilities: Float[Tensor, "batch new_len"] | None


def generate(
    model: ALiBiLM,
    tokens: Integer[Tensor, "batch prompt_len"],
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
        ValueError: an encoder, a model in training mode, a prompt that is only padding, or an
            option out of its range; with windows, logits so large that a key is needed which is
            gone.
    """
    endings, steps = _begun(
        *(model, tokens, max_new_tokens, attention_mask),
        Sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty),
        *(eos_token_id, pad_token_id, stop_strings, tokenizer, seed, prefill_chunk, windows),
    )
    taken, scores = [tokens.long()], []
    for new, logits in steps:
        taken.append(new[:, None])
        if return_log_probabilities:
            scores.append(_log_probabilities(logits, new))
    lengths = np.array(endings.lengths)
    log_probabilities = None
    if return_log_probabilities:
        every = torch.stack(scores, dim=1) if scores else torch.zeros(len(tokens), 0)
        step = torch.arange(every.shape[1], device=every.device)
        goes_on = step < torch.from_numpy(lengths).to(every.device)[:, None]
        log_probabilities = every.where(goes_on, 0.0)
    return Generated(torch.cat(taken, dim=1), lengths, tuple(endings.reasons), log_probabilities)


def stream(
    model: ALiBiLM,
    tokens: Integer[Tensor, "batch prompt_len"],
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
) -> Iterator[Integer[Tensor, " batch"]]:
    """The new tokens of `generate`, [batch], as they come. Arguments and errors are the same."""
    _, steps = _begun(
        *(model, tokens, max_new_tokens, attention_mask),
        Sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty),
        *(eos_token_id, pad_token_id, stop_strings, tokenizer, seed, prefill_chunk, windows),
    )
    return (new for new, _ in steps)


_Steps = Iterator[tuple[Integer[Tensor, " batch"], Float[Tensor, "batch vocab"]]]


def _begun(
    model: ALiBiLM,
    tokens: Integer[Tensor, "batch prompt_len"],
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
) -> tuple[Endings, _Steps]:
    """Check the arguments; return the state of the endings, and the steps."""
    config = model.config
    check_generation(config.causal, config.head, max_new_tokens)
    check_count("prefill_chunk", prefill_chunk)
    if windows is not None:
        check_windows(np.shape(windows), bool((np.asarray(windows) >= 0).any()), config)
    if model.training:
        raise ValueError("the model is in training mode, with dropout; call model.eval() first")
    vocab_size = require_vocabulary(config.vocab_size)
    prompts, visible = checked_tokens(tokens, vocab_size), None
    if attention_mask is not None:
        check_array("attention_mask", attention_mask, (Tensor,), "a torch.Tensor")
        is_integer = not attention_mask.is_floating_point()
        check_mask("attention_mask", attention_mask.shape, is_integer, *tokens.shape)
        moved = left_padded(prompts.numpy(force=True), attention_mask.numpy(force=True))
        prompts, visible = (torch.from_numpy(each).to(tokens.device) for each in moved)
        visible = None if visible.all() else visible
    endings = Endings.of(
        *(len(prompts), vocab_size),
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    drawn = uniforms(seed, len(prompts)) if sampling.do_sample else None
    return endings, _steps(
        model, prompts, visible, max_new_tokens, sampling, endings, drawn, prefill_chunk, windows
    )


@torch.no_grad()
def _steps(
    model: ALiBiLM,
    prompts: Integer[Tensor, "batch prompt_len"],
    visible: Bool[Tensor, "batch prompt_len"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    endings: Endings,
    drawn: Iterator[Float[np.ndarray, " batch"]] | None,
    prefill_chunk: int,
    windows: Int[np.ndarray, "layers heads"] | None,
) -> _Steps:
    """The new tokens of each step, and the logits that they were chosen by."""
    if max_new_tokens == 0:
        return
    batch, prompt_len = prompts.shape
    capacity = prompt_len + max_new_tokens - 1
    cache = KVCache.empty(model.config, batch, capacity, windows=windows)
    cache, logits = replace(cache, interpolated_len=prompt_len), torch.empty(0)
    # Operators cost less in inference mode, and nothing that leaves this function is made in it.
    reading = torch.inference_mode if _is_unobserved(model) else torch.no_grad
    for start in range(0, prompt_len, prefill_chunk):
        chunk = slice(start, start + prefill_chunk)
        mask = None if visible is None else visible[:, chunk]
        with reading():
            logits, cache = model(prompts[:, chunk], mask, cache=cache, logits_to_keep=1)
    cache, is_there = replace(cache, interpolated_len=None), None
    if sampling.repetition_penalty != 1.0:
        shown = torch.ones_like(prompts) if visible is None else visible.to(prompts.dtype)
        is_there = prompts.new_zeros(logits[:, 0].shape).scatter_add(1, prompts, shown) > 0
    for step in range(max_new_tokens):
        uniform = None if drawn is None else torch.from_numpy(next(drawn)).to(prompts.device)
        new = chosen_tokens(logits[:, 0], is_there, uniform, sampling)
        if endings.can_come:
            new = new.new_tensor(endings.take(new.tolist()))
        else:
            endings.count()
        yield new, logits[:, 0]
        if endings.are_all or step + 1 == max_new_tokens:
            return
        if is_there is not None:
            is_there = is_there.scatter(1, new[:, None], True)
        with reading():
            logits, cache = model(new[:, None], cache=cache, logits_to_keep=1)


def _is_unobserved(model: nn.Module) -> bool:
    """Whether no code but ours sees what a model computes.

    No gradient can ever pass through a tensor of inference mode: modules of other libraries, hooks
    and FSDP could keep one, and the training that follows would fail.
    """
    ours = ("alibi_torch.model", "torch.nn.modules.")
    return (
        all(type(each) is nn.Parameter for each in model.parameters())
        and all(type(each).__module__.startswith(ours) for each in model.modules())
        and not any(map(has_observers, model.modules()))
    )


def _log_probabilities(
    logits: Float[Tensor, "batch vocab"], tokens: Integer[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
