"""`alibi generate` and `alibi windows`, from texts to texts."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM

import alibi_torch
from alibi_cli.commands.generate import _print_stream
from alibi_cli.main import main
from alibi_cli.tokens import Bytes, Subwords
from alibi_convert import convert
from alibi_convert.tensors import as_torch
from alibi_spec import ALiBiConfig
from alibi_spec.bounds import model_windows
from parity_tests.cases import draw_parameters
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
