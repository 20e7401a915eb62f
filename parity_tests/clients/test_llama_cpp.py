"""llama.cpp runs our GGUF: logits and vectors are ours, and it cuts texts into the same tokens.

Its server says log-probabilities of the next token, after any prompt of tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import runpy
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp

import alibi_torch
from alibi_convert import convert, load_tokenizer
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from parity_tests.checkpoints import write
from parity_tests.compare import assert_within
from parity_tests.gguf_files import (
    ASCII,
    CONFIGS,
    ENCODERS,
    OF_BERT,
    TEXTS,
    VOCAB,
    WORDS,
    folder,
    of_roberta,
    wordpiece,
)

LENGTHS = (1, 2, 17, 64, 200)
# It computes GELU in float16, and by tanh where MPT has it exact, which is less; with float16 or
# bfloat16 matrices it rounds their inputs to that.
LIMITS = {
    ("float32", "gelu"): AGREEMENTS["llama.cpp's GELU"].relative,
    ("float32", "silu"): BUDGETS["float32", "cpu"].forward,
    ("float16", "gelu"): BUDGETS["float16", "cpu"].forward,
    ("float16", "silu"): BUDGETS["float16", "cpu"].forward,
    ("bfloat16", "gelu"): BUDGETS["bfloat16", "cpu"].forward,
    ("bfloat16", "silu"): BUDGETS["bfloat16", "cpu"].forward,
}
CASES = CONFIGS | {
    f"bloom, {heads} heads": dataclasses.replace(CONFIGS["bloom"], num_heads=heads)
    for heads in (8, 12)
}


@contextmanager
def running(file: Path, pooling: str | None = None) -> Iterator[xllamacpp.Server]:
    """llama.cpp's server, on the CPU, with a cache in float32; with a pooling for vectors."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_parallel, parameters.n_gpu_layers = 1, 0
    parameters.cpuparams.n_threads = 2
    parameters.warmup = parameters.fit_params = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = disabled
    parameters.port = parameters.verbosity = 0
    if pooling is not None:
        parameters.embedding = True
        parameters.pooling_type = getattr(xllamacpp.llama_pooling_type, pooling)
    server = xllamacpp.Server(parameters)
    yield server
    del server
    gc.collect()


def log_probabilities(server: xllamacpp.Server, tokens: np.ndarray) -> np.ndarray:
    """Of every token after these."""
    asked = {"prompt": tokens.tolist(), "max_tokens": 1, "logprobs": VOCAB, "cache_prompt": False}
    answer: Any = server.handle_completions(asked)
    found = np.full(VOCAB, np.nan)
    for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found


def our_log_probabilities(file: Path, tokens: np.ndarray) -> np.ndarray:
    model = alibi_torch.ALiBiLM.from_pretrained(file, dtype=torch.float64)
    with torch.no_grad():
        return torch.log_softmax(model(torch.from_numpy(tokens[None]))[0], -1).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, dtype: str, tmp_path: Path) -> None:
    config, file = CASES[name], tmp_path / "model.gguf"
    # Of ASCII alone: the server is silent about a token that is half a letter.
    convert(folder(tmp_path / "model", config, ASCII), file, dtype=dtype, verify="bits")
    tokens = np.random.default_rng(0).integers(0, VOCAB, max(LENGTHS))
    exact = our_log_probabilities(file, tokens)
    limit = LIMITS[dtype, config.activation.removesuffix("_tanh")]
    with running(file) as server:
        for length in LENGTHS:
            found = log_probabilities(server, tokens[:length])
            assert_within(found, exact[length - 1], limit, f"{name}, {length} tokens")


# Where the file says that the mean is wanted, the server takes it without being told.
POOLINGS = {"LLAMA_POOLING_TYPE_UNSPECIFIED": "mean", "LLAMA_POOLING_TYPE_CLS": "cls"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_vectors(name: str, dtype: str, tmp_path: Path) -> None:
    """Of whole sequences, scaled to length 1; and the hidden states of every position."""
    config, file = ENCODERS[name], tmp_path / "model.gguf"
    convert(write(tmp_path / "model", config=config), file, dtype=dtype, verify="bits")
    model = alibi_torch.ALiBiLM.from_pretrained(file, dtype=torch.float64).eval()
    drawn = np.random.default_rng(0).integers(0, VOCAB, max(LENGTHS)).tolist()
    sequences = [drawn[:length] for length in LENGTHS]
    limit = LIMITS[dtype, "gelu"]
    for theirs, ours in POOLINGS.items():
        exact = alibi_torch.encode(model, sequences, pooling=ours).numpy()
        with running(file, theirs) as server:
            for sequence, wanted in zip(sequences, exact, strict=True):
                (found,) = server.handle_embeddings({"input": sequence})["data"]
                what = f"{name}, {ours} of {len(sequence)} tokens"
                assert_within(np.array(found["embedding"]), wanted, limit, what)
    with running(file, "LLAMA_POOLING_TYPE_NONE") as server:
        (found,) = post(server, "embedding", content=drawn)
    with torch.no_grad():
        hidden = model(torch.tensor([drawn]))[0].numpy()
    limit = max(limit, AGREEMENTS["llama.cpp's GELU, hidden states"].relative)
    assert_within(np.array(found["embedding"]), hidden, limit, f"{name}, every position")


def post(server: xllamacpp.Server, path: str, **values: Any) -> Any:
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        json.dumps(values).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", ["bloom", "mpt", "jais", "baichuan"])
def test_tokens(name: str, tmp_path: Path) -> None:
    assert_same_tokens(folder(tmp_path / "model", CONFIGS[name]), TEXTS)


def test_tokens_of_roberta(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", ENCODERS["jina-bert-v2-twice-normalised"])
    of_roberta().save(str(source / "tokenizer.json"))
    assert_same_tokens(source, (*TEXTS, "a  <mask>\t <mask> b"))


def test_tokens_of_bert(tmp_path: Path) -> None:
    """It spells a text back without small letters, accents and spaces, so that is not compared."""
    source = folder(tmp_path / "model", ENCODERS["jina-bert-v2"])
    wordpiece().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(OF_BERT))
    assert_same_tokens(source, WORDS, spells=False)


def assert_same_tokens(source: Path, texts: tuple[str, ...], *, spells: bool = True) -> None:
    file = source.parent / "model.gguf"
    convert(source, file, verify="bits")
    ours = load_tokenizer(source)
    with running(file) as server:
        for text in texts:
            wanted = ours.encode(text).ids
            options = {"content": text, "add_special": True, "parse_special": True}
            assert post(server, "tokenize", **options)["tokens"] == wanted, text
            spelled = post(server, "detokenize", tokens=wanted)["content"]
            assert not spells or spelled == ours.decode(wanted, skip_special_tokens=False)


def test_models_without_a_tokenizer_load(tmp_path: Path) -> None:
    """Its server cannot spell what they say, but has them."""
    file = tmp_path / "model.gguf"
    convert(write(tmp_path / "model", config=CONFIGS["bloom"]), file, verify="bits")
    with running(file) as server:
        assert server.listening_address


# What is refused because llama.cpp fails on it: these files are written past the refusal.
UNABLE: dict[str, ALiBiConfig] = {
    name: dataclasses.replace(CONFIGS[name], tie_embeddings=True) for name in ("jais", "baichuan")
}


@pytest.mark.parametrize("name", UNABLE)
def test_what_is_refused_does_not_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it loads, the refusal can go."""
    from alibi_convert.families.gguf import architecture_named
    from alibi_convert.formats import FORMATS, gguf
    from alibi_convert.tensors import Tensors
    from parity_tests.cases import draw_parameters

    architecture = architecture_named(name)
    assert architecture is not None
    told = {**architecture.implied}
    told.pop("tie_embeddings")
    able = dataclasses.replace(architecture, implied=told)
    monkeypatch.setattr(gguf, "architecture_of", lambda _: able)
    tensors = Tensors.of(draw_parameters(UNABLE[name]))
    FORMATS["gguf"].write(tmp_path / "model.gguf", UNABLE[name], tensors)
    with (
        pytest.raises(RuntimeError, match="Failed to init server"),
        running(tmp_path / "model.gguf"),
    ):
        pass


def test_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is trained in JAX, llama.cpp continues in the same words."""
    path = Path(__file__).parents[2] / "examples/train_in_jax_serve_in_llama_cpp.py"
    runpy.run_path(str(path))["main"]([f"--output={tmp_path / 'tuned'}"])
    out = capsys.readouterr().out
    assert "agree: True" in out
    text = out.partition("text: ")[2].removesuffix("\n")
    file = tmp_path / "tuned/tuned.gguf"
    words, model = load_tokenizer(file), alibi_torch.ALiBiLM.from_pretrained(file)
    prompt = torch.tensor([words.encode("import ").ids])
    tokens = alibi_torch.generate(model, prompt, 16).tokens[0, prompt.shape[1] :]
    assert len(text) >= 16
    assert text == words.decode(tokens.tolist())
