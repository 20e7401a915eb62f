"""Tokens that are chosen: the same in both backends, in the specification and in transformers."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import generation as theirs

import alibi_flax
import alibi_flax.sampling
import alibi_torch
import alibi_torch.sampling
from alibi_convert import torch_to_flax
from alibi_convert.tensors import as_numpy, as_torch
from alibi_flax import generation as flax_generation
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS, DRAWING
from alibi_spec.sampling import (
    Endings,
    Sampling,
    boundary_distance,
    drawn_tokens,
    left_padded,
    processed,
    uniforms,
)
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.families import redraw

VOCAB, PROMPT_LEN = 101, 30
CONFIG = dataclasses.replace(CONFIGS["lm-tied"], num_layers=1)
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (3, PROMPT_LEN))
MASK = np.ones((3, PROMPT_LEN), int)
MASK[0, :7] = MASK[1, 20:] = 0  # padding on the left, on the right, and none
each_backend = pytest.mark.parametrize("backend", ["torch", "flax"])


def _uniforms(seed: int, steps: int, rows: int) -> np.ndarray:
    return np.array(list(itertools.islice(uniforms(seed, rows), steps)))


@lru_cache
def _models(config: ALiBiConfig = CONFIG) -> tuple[alibi_torch.ALiBiLM, Any, Any]:
    """The same model in both backends."""
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({k: as_torch(v) for k, v in draw_parameters(config).items()})
    return model, alibi_flax.ALiBiLM(config), torch_to_flax(model.state_dict(), config)


def _generated(backend: str, prompts: np.ndarray, new_len: int, **options: Any) -> Any:
    model, module, params = _models(options.pop("config", CONFIG))
    mask = options.pop("attention_mask", None)
    if backend == "torch":
        mask = None if mask is None else torch.tensor(mask)
        found = alibi_torch.generate(
            model, torch.tensor(prompts), new_len, attention_mask=mask, **options
        )
        scores = found.log_probabilities
        return dataclasses.replace(
            found,
            tokens=as_numpy(found.tokens),
            log_probabilities=None if scores is None else as_numpy(scores),
        )
    found = alibi_flax.generate(
        *(module, params, jnp.asarray(prompts), new_len), attention_mask=mask, **options
    )
    return dataclasses.replace(found, tokens=np.asarray(found.tokens))


def _logits(tokens: np.ndarray) -> np.ndarray:
    """Of the whole sequence, without a cache."""
    with torch.no_grad():
        return as_numpy(_models()[0](torch.tensor(tokens)))


@each_backend
def test_each_prompt_is_continued_as_if_by_itself(backend: str) -> None:
    """Greedy tokens of unequal prompts are those of the whole sequence, read without a cache."""
    found = _generated(
        *(backend, PROMPTS, 40),
        attention_mask=MASK,
        prefill_chunk=11,
        return_log_probabilities=True,
    )
    assert_bitwise(found.tokens[:, :PROMPT_LEN], PROMPTS, "prompts")
    assert found.lengths.tolist() == [40, 40, 40]
    assert found.finish_reasons == ("length", "length", "length")
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        whole = np.concatenate([prompt[mask != 0], found.tokens[row, PROMPT_LEN:]])
        logits = _logits(whole[None])[0, -41:-1].astype(np.float64)
        assert_bitwise(logits.argmax(axis=-1), whole[-40:], f"row {row}")
        exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        exact = exact[np.arange(40), whole[-40:]]
        limit = BUDGETS["float32", "cpu"].forward
        scores = found.log_probabilities[row]
        assert_within(scores, exact, limit, f"row {row}", dtype="float32", floor=10.0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 1.5},
        {"min_p": 0.1, "repetition_penalty": 1.4},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
    ids=lambda options: ",".join(options),
)
def test_the_same_seed_gives_the_same_text(options: dict[str, Any]) -> None:
    """In both backends, and by the float64 text of the specification, step by step."""
    options = {"do_sample": True, "seed": 7, **options}
    ours, flax = (
        _generated(backend, PROMPTS, 32, attention_mask=MASK, **options)
        for backend in ("torch", "flax")
    )
    sampling = Sampling(**{k: v for k, v in options.items() if k != "seed"})
    drawn = _uniforms(7, 32, 3)
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        whole = np.concatenate([prompt[mask != 0], ours.tokens[row, PROMPT_LEN:]])
        logits = _logits(whole[None])[0, -33:-1].astype(np.float64)
        for step in range(32):
            is_there = np.zeros((1, VOCAB), bool)
            is_there[0, whole[: len(whole) - 32 + step]] = True
            chosen_by = processed(logits[step][None], is_there, sampling)
            uniform, place = drawn[step, row][None], (row, PROMPT_LEN + step)
            expected = drawn_tokens(chosen_by, uniform)[0]
            if not ours.tokens[place] == flax.tokens[place] == expected:
                assert boundary_distance(chosen_by, uniform)[0] <= DRAWING, place
                break  # the texts have parted
        assert step > 5, "next to nothing was compared"


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Its tokens are those of its seed and its place alone; another seed gives others."""
    options: dict[str, Any] = {"do_sample": True, "seed": 2**63}
    three = _generated("torch", PROMPTS, 16, **options).tokens
    assert_bitwise(_generated("torch", PROMPTS[:2], 16, **options).tokens, three[:2], "two rows")
    other = _generated("torch", PROMPTS, 16, do_sample=True, seed=1).tokens
    assert (other != three).any()
    longer = _uniforms(2**63, 50, 3)
    assert_bitwise(_uniforms(2**63, 16, 2), longer[:16, :2], "uniforms")


@pytest.mark.parametrize("package", [alibi_torch.sampling, alibi_flax.sampling])
def test_processors_are_those_of_the_specification(package: Any) -> None:
    """Which tokens stay, and their logits; ties stay or go together."""
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((40, 67))).astype(np.float32)
    logits[:10] = logits[:10].round()  # many ties
    is_there = rng.random(logits.shape) < 0.3
    array = torch.tensor if package is alibi_torch.sampling else jnp.asarray
    for options in (
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.55},
        {"top_p": 1.0},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 2.0, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
    ):
        sampling = Sampling(do_sample=True, **options)
        found = np.asarray(package.processed(array(logits), array(is_there), sampling))
        exact = processed(logits, is_there, sampling)
        limit = BUDGETS["float32", "cpu"].forward
        assert_within(found, exact, limit, str(options), dtype="float32")


def test_processors_are_those_of_transformers() -> None:
    """One by one, and in the same order, where no two tokens tie."""
    rng = np.random.default_rng(1)
    logits = (4 * rng.standard_normal((8, 53))).astype(np.float32)
    seen = rng.integers(0, 53, (8, 6))
    is_there = np.zeros(logits.shape, bool)
    np.put_along_axis(is_there, seen, True, axis=1)
    pairs = (
        ({"repetition_penalty": 1.3}, theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"temperature": 0.7}, theirs.TemperatureLogitsWarper(0.7)),
        ({"top_k": 9}, theirs.TopKLogitsWarper(9)),
        ({"top_p": 0.8}, theirs.TopPLogitsWarper(0.8)),
        ({"min_p": 0.05}, theirs.MinPLogitsWarper(0.05)),
    )
    every, chained = {}, torch.tensor(logits)
    for options, processor in pairs:
        expected = processor(torch.tensor(seen), torch.tensor(logits))
        found = processed(logits, is_there, Sampling(do_sample=True, **options))
        limit = BUDGETS["float32", "cpu"].forward
        assert_within(as_numpy(expected), found, limit, str(options), dtype="float32")
        every, chained = every | options, processor(torch.tensor(seen), chained)
    found = processed(logits, is_there, Sampling(do_sample=True, **every))
    assert_within(as_numpy(chained), found, limit, "all of them", dtype="float32")


@pytest.mark.parametrize("package", [alibi_torch.sampling, alibi_flax.sampling])
def test_draws_have_the_distribution(package: Any) -> None:
    """Chi-square of 20,000 draws of one distribution, by rows and by steps."""
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], np.float32))
    array = torch.tensor if package is alibi_torch.sampling else jnp.asarray
    for drawn in (_uniforms(3, 1, 20_000)[0], _uniforms(4, 20_000, 1)[:, 0]):
        rows = array(np.tile(logits, (20_000, 1)))
        tokens = package.chosen_tokens(rows, None, array(drawn), Sampling(do_sample=True))
        counts = np.bincount(np.asarray(tokens), minlength=6)
        expected = 20_000 * np.exp(logits.astype(np.float64))
        # 5 degrees of freedom: 30 is passed by one in 70,000 seeds.
        assert ((counts - expected) ** 2 / expected).sum() < 30
    assert drawn.min() >= 0
    assert drawn.max() < 1


@each_backend
def test_tokens_without_probability_are_never_drawn(backend: str) -> None:
    """At either end of the uniforms."""
    package = {"torch": alibi_torch.sampling, "flax": alibi_flax.sampling}[backend]
    array = torch.tensor if backend == "torch" else jnp.asarray
    logits = np.full((2, 1000), -np.inf, np.float32)
    logits[:, 300:700] = np.random.default_rng(0).standard_normal((2, 400))
    uniform = np.array([0.0, 1 - 2.0**-23], np.float32)
    tokens = package.chosen_tokens(array(logits), None, array(uniform), Sampling(do_sample=True))
    assert np.asarray(tokens)[0] == 300
    assert 300 <= np.asarray(tokens)[1] < 700


@each_backend
def test_endings(backend: str) -> None:
    """By an end-of-sequence token, by a text, by length; behind it stands the padding."""
    plain = _generated(backend, PROMPTS, 40)
    new = plain.tokens[:, PROMPT_LEN:]
    eos = [int(new[0, 3]), int(new[1, 9])]
    found = _generated(
        *(backend, PROMPTS, 40), eos_token_id=eos, pad_token_id=5, return_log_probabilities=True
    )
    for row in range(3):
        ends = np.flatnonzero(np.isin(new[row], eos))
        length = ends[0] + 1 if len(ends) else found.tokens.shape[1] - PROMPT_LEN
        assert found.lengths[row] == length
        assert found.finish_reasons[row] == ("eos" if len(ends) else "length")
        kept = found.tokens[row, PROMPT_LEN:]
        assert_bitwise(kept[:length], new[row, :length], f"row {row}")
        assert (kept[length:] == 5).all()
        assert (found.log_probabilities[row, length:] == 0).all()
        assert (found.log_probabilities[row, :length] < 0).all()

    class Decoder:
        """Token 17 is the text "<17>"."""

        def decode(self, ids: list[int]) -> str:
            return "".join(f"<{each}>" for each in ids)

    text = f"{new[2, 4]}><{new[2, 5]}"  # begins within one token and ends within the next
    stopped = _generated(backend, PROMPTS, 40, stop_strings=text, tokenizer=Decoder())
    for row in range(3):
        complete = [
            length for length in range(1, 41) if text in Decoder().decode(new[row, :length])
        ]
        assert stopped.lengths[row] == min([*complete, stopped.tokens.shape[1] - PROMPT_LEN])
        assert stopped.finish_reasons[row] == ("stop_string" if complete else "length")
    assert stopped.finish_reasons[2] == "stop_string"


def test_a_stop_string_costs_the_same_at_every_step() -> None:
    """However long the text is, a bounded number of tokens is decoded; the string is still seen."""
    decoded: list[int] = []

    class Decoder:
        def decode(self, ids: list[int]) -> str:
            decoded.append(len(ids))
            return bytes(ids).decode(errors="replace")

    text = "é…end"  # characters of two and three bytes
    options: Any = {"eos_token_id": None, "pad_token_id": 0}
    endings = Endings.of(1, 256, stop_strings=["never", text], tokenizer=Decoder(), **options)
    for token in (*([65] * 500), *text.encode()):
        assert endings.reasons == ["length"]
        endings.take([token])
    assert endings.reasons == ["stop_string"]
    assert endings.lengths == [500 + len(text.encode())]
    assert max(decoded) <= len(text.encode()) + 16


@each_backend
def test_stream_is_generate(backend: str) -> None:
    options: dict[str, Any] = {"do_sample": True, "seed": 3, "eos_token_id": [1, 2, 3, 4, 5, 6, 7]}
    expected = _generated(backend, PROMPTS, 30, attention_mask=MASK, **options).tokens
    model, module, params = _models()
    if backend == "torch":
        mask = torch.tensor(MASK)
        steps = alibi_torch.stream(model, torch.tensor(PROMPTS), 30, attention_mask=mask, **options)
    else:
        steps = alibi_flax.stream(
            *(module, params, jnp.asarray(PROMPTS), 30), attention_mask=MASK, **options
        )
    streamed = np.stack([np.asarray(step) for step in steps], axis=1)
    assert_bitwise(streamed.astype(expected.dtype), expected[:, PROMPT_LEN:], "tokens")


class _Remembering(torch.nn.Module):
    """A module of another library, which keeps what it sees."""

    def __init__(self, inner: torch.nn.Module, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.inner(input))
        return self.seen[-1]


@pytest.mark.parametrize("observer", ["hook", "hook of all modules", "forward", "module"])
def test_what_is_seen_of_generation_can_be_trained_on(observer: str) -> None:
    model, seen = alibi_torch.ALiBiLM(CONFIG).eval(), []
    ffn: Any = model.transformer.layers[0].ffn
    hook = None
    if observer == "hook":
        ffn.register_forward_hook(lambda _module, _inputs, result: seen.append(result))
    elif observer == "hook of all modules":
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, _inputs, result: seen.append(result) if module is ffn else None
        )
    elif observer == "forward":  # as accelerate does it
        ffn.forward = _Remembering(alibi_torch.model.FeedForward.forward.__get__(ffn), seen).forward
    else:
        model.transformer.layers[0].ffn = _Remembering(ffn, seen)
    try:
        alibi_torch.generate(model, torch.from_numpy(PROMPTS), 3)
    finally:
        if hook is not None:
            hook.remove()
    probe = torch.nn.Linear(CONFIG.d_model, 1)
    probe(seen[0]).sum().backward()
    assert len(seen) == 3
    assert probe.weight.grad is not None


class _Quantised(torch.nn.Parameter):
    """Weights of another library."""


@pytest.mark.parametrize("is_plain", [True, False])
def test_only_plain_models_generate_in_inference_mode(
    is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that leaves `generate` and `stream` is made in it."""
    model, modes = alibi_torch.ALiBiLM(CONFIG).eval(), []
    attend, tokens = alibi_torch.KVCache.attend, torch.from_numpy(PROMPTS)
    if not is_plain:
        fc1: Any = model.transformer.layers[0].ffn.fc1
        fc1.weight = _Quantised(fc1.weight.detach())

    def noted(*arguments: Any) -> Any:
        modes.append(torch.is_inference_mode_enabled())
        return attend(*arguments)

    monkeypatch.setattr(alibi_torch.KVCache, "attend", noted)
    found: Any = alibi_torch.generate(model, tokens, 3, return_log_probabilities=True)
    assert modes == [is_plain] * 3
    results = [found.tokens, found.log_probabilities, *alibi_torch.stream(model, tokens, 2)]
    assert not any(each.is_inference() for each in results)
    model(found.tokens).sum().backward()


def test_flax_compiles_once_for_prompts_of_a_bucket() -> None:
    """Of any length in it, and for any number of steps that ends in the same bucket.

    Later chunks of a prompt have one program more, and the steps after them none.
    """
    config = dataclasses.replace(CONFIG, norm_eps=3e-5)  # nobody else's
    _generated("flax", PROMPTS[:, :20], 20, config=config)
    before = [each._cache_size() for each in (flax_generation._read, flax_generation._block)]
    for length, new_len in ((17, 25), (19, 22), (24, 24)):
        found = _generated("flax", PROMPTS[:, :length], new_len, config=config).tokens
        same = _generated("torch", PROMPTS[:, :length], new_len, config=config).tokens
        assert_bitwise(found, same.astype(found.dtype), f"{length}")
    after = [each._cache_size() for each in (flax_generation._read, flax_generation._block)]
    assert after == before
    for chunks in (2, 3):
        _generated("flax", PROMPTS[:, : 8 * chunks], 20, config=config, prefill_chunk=8)
    after = [each._cache_size() for each in (flax_generation._read, flax_generation._block)]
    assert after == [before[0] + 2, before[1]]


@pytest.mark.parametrize("eos", [[], list(range(VOCAB // 2))])
def test_flax_steps_on_the_device_until_all_have_ended(
    eos: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks; no step follows the end of the last sequence."""
    run, steps = flax_generation._block, []

    def counted(model: Any, params: Any, state: Any, *rest: Any) -> Any:
        before = int(state.cache.length)
        result = run(model, params, state, *rest)
        steps.append(int(result[2].cache.length) - before)
        return result

    monkeypatch.setattr(flax_generation, "_block", counted)
    found = _generated("flax", PROMPTS, 40, eos_token_id=eos, seed=3, do_sample=True)
    assert found.lengths.max() == (sum(steps) + 1)
    assert len(steps) == -(-sum(steps) // flax_generation.BLOCK)
    assert (sum(steps) < 39) == bool(eos)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """256 tokens, three unequal prompts, padded on the left."""
    small = {"vocab_size": VOCAB, "hidden_size": 48}
    model = {
        "bloom": lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(n_layer=2, n_head=3, **small)
        ),
        "mpt": lambda: transformers.MptForCausalLM(
            transformers.MptConfig(
                n_layers=2, n_heads=3, d_model=48, vocab_size=VOCAB, max_seq_len=512
            )
        ),
        "falcon": lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(
                **small,
                num_hidden_layers=2,
                num_attention_heads=3,
                alibi=True,
                bias=True,
                multi_query=False,
                parallel_attn=False,
                new_decoder_architecture=False,
                attn_implementation="sdpa",
            )
        ),
    }[kind]()
    redraw(model).save_pretrained(tmp_path / kind)
    mask = np.ones(PROMPTS.shape, int)
    mask[0, :7] = mask[1, :1] = 0
    expected = model.generate(
        torch.tensor(PROMPTS),
        attention_mask=torch.tensor(mask),
        max_new_tokens=256,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = alibi_torch.generate(
        alibi_torch.ALiBiLM.from_pretrained(tmp_path / kind),
        *(torch.tensor(PROMPTS), 256),
        attention_mask=torch.tensor(mask),
    )
    assert_bitwise(as_numpy(ours.tokens), as_numpy(expected), kind)
    flax = alibi_flax.generate(
        *alibi_flax.from_pretrained(tmp_path / kind), PROMPTS, 256, attention_mask=mask
    )
    assert_bitwise(np.asarray(flax.tokens).astype(np.int64), as_numpy(expected), kind)


def test_prompts_move_to_the_right() -> None:
    tokens, visible = left_padded(PROMPTS, MASK)
    assert_bitwise(tokens[0], PROMPTS[0], "padded on the left")
    assert_bitwise(tokens[1, 10:], PROMPTS[1, :20], "padded on the right")
    assert visible[1].tolist() == [False] * 10 + [True] * 20


@each_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"do_sample": True, "temperature": 0.0},
            "temperature=0.0 is not valid; expected a number",
        ),
        ({"do_sample": True, "temperature": float("nan")}, "temperature=nan is not valid"),
        ({"do_sample": True, "top_p": 0.0}, "top_p=0.0 is not valid; expected a number in"),
        ({"do_sample": True, "top_p": 1.1}, "top_p=1.1 is not valid"),
        ({"do_sample": True, "min_p": -0.1}, "min_p=-0.1 is not valid"),
        ({"do_sample": True, "top_k": 0}, "top_k=0 is not valid; expected an integer of at least"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not valid; expected a number above 0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect without sampling; pass do_sample=True"),
        ({"eos_token_id": VOCAB}, f"eos_token_id={VOCAB} is not a token; expected an integer in"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is not a token"),
        ({"stop_strings": "x"}, "stop_strings need a tokenizer"),
        ({"stop_strings": [""], "tokenizer": object()}, "expected texts"),
        ({"do_sample": True, "seed": -1}, "seed=-1 is not valid; expected an integer in"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is not valid; expected an integer of at least 1"),
        ({"attention_mask": np.zeros((3, PROMPT_LEN), int)}, "prompt 0 is only padding"),
        ({"attention_mask": np.ones((3, 4), int)}, "attention_mask has shape"),
        ({"attention_mask": MASK / 2}, "attention_mask is floating point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_refused(backend: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _generated(backend, PROMPTS, 4, **options)


@each_backend
def test_bad_prompts_are_refused(backend: str) -> None:
    for prompts, message in (
        (PROMPTS.astype(np.float32), "tokens are not integers"),
        (PROMPTS[:, :0], "at least one position"),
        (PROMPTS[0], "add a batch axis"),
        (PROMPTS + VOCAB, "is outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            _generated(backend, prompts, 4)
    assert _generated(backend, PROMPTS, 0).tokens.shape == PROMPTS.shape
    jax.block_until_ready(_models()[2])
