"""`alibi generate`, `encode`, `fill` and `windows`, from texts to what they print."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import alibi_torch
from alibi_cli.commands.generate import _print_stream
from alibi_cli.main import main
from alibi_cli.tokens import Bytes, Subwords
from alibi_convert import convert
from alibi_convert.tensors import as_torch
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.bounds import model_windows
from alibi_spec.budgets import BUDGETS
from alibi_spec.cache import bucket
from alibi_spec.filling import likeliest
from alibi_spec.pooling import pooled
from parity_tests.cases import draw_parameters
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.families import redraw

CONFIG = ALiBiConfig(num_layers=1, d_model=24, num_heads=3, vocab_size=256)
PROMPTS = ("one prompt", "éé")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "bytes"
    _model(CONFIG).save_pretrained(path)
    return path


def _model(config: ALiBiConfig) -> alibi_torch.ALiBiLM:
    model = alibi_torch.ALiBiLM(config).eval()
    model.load_state_dict({k: as_torch(v) for k, v in draw_parameters(config).items()})
    return model


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes in, bytes out: unequal prompts, both backends, the functions' own tokens."""
    command = ["generate", str(folder), "--max-new-tokens=12", "--json"]
    command += [f"--prompt={prompt}" for prompt in PROMPTS]
    sampling = ["--do-sample", "--top-p=0.8", "--seed=3"]
    results = {}
    for backend in ("torch", "flax"):
        for options in ([], sampling):
            assert main([*command, *options, f"--backend={backend}"]) == 0
            results[backend, len(options)] = json.loads(capsys.readouterr().out)
        assert main([*command, f"--backend={backend}", "--windows"]) == 0
        assert json.loads(capsys.readouterr().out) == results[backend, 0]
    assert results["torch", 0] == results["flax", 0]
    assert results["torch", 3] == results["flax", 3] != results["torch", 0]
    for row, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([list(prompt.encode())])
        expected = alibi_torch.generate(_model(CONFIG), tokens, 12).tokens[0, tokens.shape[1] :]
        found = results["torch", 0][row]
        assert found["tokens"] == expected.tolist()
        assert found["text"] == bytes(expected.tolist()).decode(errors="replace")
        assert found["prompt"] == prompt
        assert found["finish_reason"] == "length"


def test_prompts_from_a_file_and_the_standard_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One text each; a stream prints what the whole prints."""
    (tmp_path / "prompt.txt").write_bytes(PROMPTS[0].encode())
    printed = []
    for options in (
        [f"--prompt={PROMPTS[0]}"],
        [f"--prompt-file={tmp_path / 'prompt.txt'}"],
        [],
        ["--stream"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[0]))
        assert main(["generate", str(folder), "--max-new-tokens=20", *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed == printed[:1] * 4


def test_a_tokenizer_and_the_folders_own_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {f"w{index}": index for index in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    _model(dataclasses.replace(CONFIG, vocab_size=60)).save_pretrained(folder)
    command = ["generate", str(folder), "--prompt=w3 w4 w5", "--max-new-tokens=30", "--json"]
    assert main(command) == 2
    assert "has no tokenizer.json; add one" in capsys.readouterr().err
    tokenizer.save(str(folder / "tokenizer.json"))
    assert main(command) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["text"] == " ".join(f"w{token}" for token in whole["tokens"])
    ends = whole["tokens"][4]
    length = whole["tokens"].index(ends) + 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ends]}))
    assert main(command) == 0
    (ended,) = json.loads(capsys.readouterr().out)
    assert ended["tokens"] == whole["tokens"][:length]
    assert ended["finish_reason"] == "eos"
    assert main([*command, "--eos-token-id=59", f"--stop=w{whole['tokens'][1]}"]) == 0
    (stopped,) = json.loads(capsys.readouterr().out)
    assert stopped["finish_reason"] == "stop_string"
    assert len(stopped["tokens"]) <= 2


def test_the_familys_ending_survives_the_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.json may be all that names it; conversion.json remembers that."""
    config = BloomConfig(vocab_size=256, hidden_size=24, n_layer=1, n_head=3)
    redraw(BloomForCausalLM(config)).save_pretrained(tmp_path / "bloom")
    (tmp_path / "bloom" / "generation_config.json").unlink()
    command = ["generate", str(tmp_path / "bloom"), "--prompt=a", "--max-new-tokens=9", "--json"]
    assert main(command) == 0
    ends = json.loads(capsys.readouterr().out)[0]["tokens"][2]
    settings = json.loads((tmp_path / "bloom" / "config.json").read_text())
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    convert(tmp_path / "bloom", tmp_path / "ours")
    for folder in ("bloom", "ours"):
        assert main(["generate", str(tmp_path / folder), *command[2:]]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["finish_reason"] == "eos"
        assert len(found["tokens"]) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt=a", "--prompt=b", "--stream"], "--stream prints one text as it grows"),
        (["--prompt="], "prompt 0 has no tokens; expected at least one"),
        (["--prompt=a", "--top-p=0.9"], "top_p=0.9 has no effect without sampling; pass do_sample"),
        (["--prompt=a", "--do-sample", "--temperature=0"], "temperature=0.0 is not valid"),
        (["--prompt=a", "--eos-token-id=256"], "eos_token_id=256 is not a token"),
    ],
)
def test_bad_options(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_would_change_each_others_slopes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With interpolated slopes, prompts of unequal lengths go together only up to the limit."""
    _model(dataclasses.replace(CONFIG, slope_interpolation=8)).save_pretrained(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "--prompt=abc", "--max-new-tokens"]
    assert main([*command, "7", "--prompt=a"]) == 2
    message = "prompts of 1 and 3 tokens change each other's slopes past slope_interpolation=8"
    assert message in capsys.readouterr().err
    for allowed in (["6", "--prompt=a"], ["7", "--prompt=xyz"], ["7"]):
        assert main([*command, *allowed]) == 0


def test_models_without_a_next_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alibi_torch.ALiBiTransformer(dataclasses.replace(CONFIG, vocab_size=None)).save_pretrained(
        tmp_path / "bare"
    )
    assert main(["generate", str(tmp_path / "bare"), "--prompt=a"]) == 2
    assert "needs vocab_size" in capsys.readouterr().err
    _model(dataclasses.replace(CONFIG, causal=False)).save_pretrained(tmp_path / "encoder")
    assert main(["generate", str(tmp_path / "encoder"), "--prompt=a"]) == 2
    assert "an encoder (causal=False) cannot generate" in capsys.readouterr().err


def test_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `model_windows` proves, and what share of all keys that is."""
    expected = model_windows(CONFIG, draw_parameters(CONFIG))
    assert main(["windows", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == expected.tolist()
    assert found["keys_at_any_length"] == expected.sum()
    for length in (4_096, 131_072):
        share = np.minimum(expected, length).sum() / (3 * length)
        assert found["share"][str(length)] == pytest.approx(share)
    # 8 numbers of 4 bytes, twice: the heads have rings of 2^n or 3 * 2^n positions.
    sizes = [bucket(int(window)) for window in expected[0]]
    assert found["cache_bytes_at_any_length"] == 2 * 4 * 8 * sum(sizes)
    assert found["cache_bytes"]["4096"] == 2 * 4 * 8 * sum(min(size, 4096) for size in sizes)
    assert main(["windows", str(folder), "--tolerance=0.5"]) == 0
    narrower = model_windows(CONFIG, draw_parameters(CONFIG), tolerance=0.5)
    printed = capsys.readouterr().out
    assert f"{narrower[0, 0]:,}" in printed
    assert f"at most {narrower.sum():,} keys" in printed


class _Counting(Subwords):
    """A tokenizer that counts the tokens that it is asked to decode."""

    decoded: ClassVar[list[int]] = []

    def decode(self, ids: list[int]) -> str:
        self.decoded.append(len(ids))
        return self.tokenizer.decode(ids)


def test_streams_print_the_whole_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces that depend on the token before, characters of several tokens, one that is cut."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.train_from_iterator(["the cat éé … sat"] * 5, trainers.BpeTrainer(vocab_size=40))
    text = "the cat éé … sat the sat cat"
    for tokenizer, rest in ((Bytes(), []), (Bytes(), [0xC3]), (Subwords(words), [])):
        ids = [*tokenizer.encode(text), *rest]
        counting = _Counting(tokenizer)
        _print_stream(iter([[each] for each in ids]), counting)
        assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
        assert max(counting.decoded) < 10, "a step costs more the longer the text is"


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "##s")
ENCODER = dataclasses.replace(CONFIG, vocab_size=len(WORDS), causal=False, head="masked_lm")
TEXTS = ("the cats sat on the mat", "the mat", "cats cats cats on")
LIMIT = BUDGETS["float32", "cpu"].forward


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model, with a tokenizer like BERT's as transformers saves it."""
    words = Tokenizer(models.WordPiece(dict(zip(WORDS, range(11), strict=True)), unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    ends = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    path = tmp_path_factory.mktemp("models") / "encoder"
    _model(ENCODER).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


def _exact(
    folder: Path, texts: tuple[str, ...], what: str, config: ALiBiConfig = ENCODER
) -> list[np.ndarray]:
    """The reference's output or logits for each text, by transformers' tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = [np.array([tokenizer(text)["input_ids"]]) for text in texts]
    return [reference_forward(config, draw_parameters(config), row)[what] for row in rows]


@pytest.mark.parametrize("options", [[], ["--pooling=cls", "--no-normalize", "--batch-size=2"]])
def test_encode(
    encoder: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vector for each line, of the family's own tokens, [CLS] and [SEP] among them."""
    pooling = ("cls", False) if options else ("mean", True)
    exact = np.concatenate(
        [pooled(x, np.ones(x.shape[:2], bool), *pooling) for x in _exact(encoder, TEXTS, "output")]
    )
    file, output = tmp_path / "lines.txt", tmp_path / "vectors"
    file.write_bytes("\r\n".join(TEXTS).encode())
    for backend in ("torch", "flax"):
        command = ["encode", str(encoder), str(file), f"--backend={backend}", *options]
        assert main([*command, "--json"]) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert tuple(each["text"] for each in printed) == TEXTS
        assert main([*command, f"--output={output}", "--overwrite"]) == 0
        assert capsys.readouterr().out == f"3 vectors of 24 numbers: {output}\n"
        vectors = np.load(output)
        assert_within(vectors, exact, LIMIT, backend, dtype="float32")
        assert_bitwise(np.float32([each["vector"] for each in printed]), vectors, "printed")


def test_encode_compares_a_few_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decoder's bytes, too; a long vector is no less alike than a short one."""
    command = ["encode", str(folder), "--text=a b", "--text=c", "--text=a b", "--no-normalize"]
    assert main(command) == 0
    first, second, *rows = capsys.readouterr().out.splitlines()
    assert (first, second) == ("3 vectors of 24 numbers", "cosine similarities:")
    alike = np.array([row.split() for row in rows], float)
    assert (alike[[0, 1, 2, 0], [0, 1, 2, 2]] == 1).all()
    assert -1 < alike[0, 1] == alike[1, 0] < 1
    assert main([*command[:2], *(f"--text={number}" for number in range(11))]) == 0
    assert capsys.readouterr().out == "11 vectors of 24 numbers\n"


def test_encode_never_replaces_what_it_should_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, there = ["encode", str(folder), "--text=a"], tmp_path / "there.npy"
    there.write_bytes(b"mine")
    assert main([*command, f"--output={there}"]) == 3
    assert "there.npy exists; choose another name or pass" in capsys.readouterr().err
    assert main([*command, f"--output={folder}", "--overwrite"]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert main([*command, f"--output={there}", "--overwrite", "--json"]) == 2
    assert "--output writes the vectors and --json prints them" in capsys.readouterr().err
    assert there.read_bytes() == b"mine"
    assert main([*command, f"--output={there}", "--overwrite"]) == 0
    assert np.load(there).shape == (1, 24)
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"a\n\nb\n", "line 2 of {} is empty; expected a text"),
        (b"a\n \t\n", "line 2 of {} is empty"),
        (b"", "{} holds no text; expected one in each line"),
        (b"a\nb\xff", "{} is not UTF-8: "),
    ],
)
def test_files_without_a_text_in_each_line(
    folder: Path, given: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_bytes(given)
    assert main(["encode", str(folder), str(tmp_path / "texts")]) == 2
    assert message.format(tmp_path / "texts") in capsys.readouterr().err


MASKED = ("[MASK] cats sat on the [MASK]!", "the [MASK]", "[MASK] [MASK]s")


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_fill(
    encoder: Path,
    backend: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts of any lengths, with several masks, more than are read together."""
    monkeypatch.setattr("alibi_cli.commands.fill.BATCH", 2)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(MASKED)))
    assert main(["fill", str(encoder), f"--backend={backend}", "--top-k=11", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    places = ([1, 7], [2], [1, 2])
    for text, place, logits, found in zip(
        MASKED, places, _exact(encoder, MASKED, "logits"), results, strict=True
    ):
        assert found["text"] == text
        assert [mask["position"] for mask in found["masks"]] == place
        tokens, probabilities = likeliest(logits[0][place], 11)
        listed = [mask["candidates"] for mask in found["masks"]]
        assert [[each["token"] for each in row] for row in listed] == tokens.tolist()
        assert [[each["text"] for each in row] for row in listed] == [
            [WORDS[token] for token in row] for row in tokens
        ]
        likely = np.array([[each["probability"] for each in row] for row in listed])
        assert_within(likely, probabilities, LIMIT, backend)


def test_fill_pads_no_text_whose_slopes_would_change(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(encoder, tmp_path / "model")
    config = dataclasses.replace(ENCODER, slope_interpolation=3)
    _model(config).save_pretrained(tmp_path / "model", overwrite=True)
    texts = [f"--text={text}" for text in MASKED]
    exact = _exact(encoder, MASKED, "logits", config)
    for backend in ("torch", "flax"):
        command = ["fill", str(tmp_path / "model"), *texts, "--top-k=11", "--json"]
        assert main([*command, f"--backend={backend}"]) == 0
        for logits, found in zip(exact, json.loads(capsys.readouterr().out), strict=True):
            places = [mask["position"] for mask in found["masks"]]
            expected = likeliest(logits[0][places], 11)[1]
            listed = [mask["candidates"] for mask in found["masks"]]
            likely = np.array([[each["probability"] for each in row] for row in listed])
            assert_within(likely, expected, LIMIT, backend)


def test_fill_prints_the_likeliest(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logits,) = _exact(encoder, MASKED[1:2], "logits")
    ((token, other),), ((probability, _),) = likeliest(logits[0][[2]], 2)
    assert main(["fill", str(encoder), f"--text={MASKED[1]}", "--top-k=2"]) == 0
    text, mask, first, second = capsys.readouterr().out.splitlines()
    assert (text, mask) == (MASKED[1], "  mask 1:")
    assert first == f"    {probability:.4f}  {WORDS[token]!r}"
    assert second.endswith(f"  {WORDS[other]!r}")


def test_what_stands_for_a_mask(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What settings or the tokenizer name, or what is asked for."""
    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    settings, others = copy / "tokenizer_config.json", copy / "special_tokens_map.json"

    def filled(text: str, *options: str) -> str:
        code = main(["fill", str(copy), f"--text={text}", "--top-k=1", *options])
        printed = capsys.readouterr()
        assert code == (2 if printed.err else 0)
        return printed.err or printed.out.split("\n", 1)[1]

    expected = filled("the [MASK]")
    assert expected.startswith("  mask 1:\n")
    settings.write_text("{}")
    assert filled("the [MASK]") == expected
    others.write_text(json.dumps({"mask_token": {"content": "mat"}}))
    assert "--text 1 of the command line holds no mask; write mat where" in filled("the [MASK]")
    assert filled("the mat") != expected
    settings.write_text(json.dumps({"mask_token": "sat"}))
    assert "write sat where a token" in filled("the mat")
    assert filled("the [MASK]", "--mask-token=[MASK]") == expected
    assert "'dog' is not a token of" in filled("the dog", "--mask-token=dog")
    settings.write_text("{}")
    others.unlink()
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["[M]"] = tokenizer["model"]["vocab"].pop("[MASK]")
    tokenizer["added_tokens"] = []
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "names no mask token; pass the text of one: --mask-token" in filled("the [MASK]")
    assert filled("the [M]", "--mask-token=[M]") == expected


def test_masks_of_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tmp_path / "bytes"
    _model(dataclasses.replace(ENCODER, vocab_size=256)).save_pretrained(encoder)
    command = ["fill", str(encoder), "--text=a_b_", "--json"]
    assert main([*command, "--mask-token=_"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [mask["position"] for mask in found["masks"]] == [1, 3]
    assert main(command) == 2
    assert "names no mask token; pass the text of one" in capsys.readouterr().err
    assert main([*command, "--mask-token=ab"]) == 2
    assert "'ab' is not a token of" in capsys.readouterr().err
    assert main(["fill", str(folder), "--text=a_b", "--mask-token=_"]) == 2
    assert "a decoder (causal=True) predicts the next token" in capsys.readouterr().err
