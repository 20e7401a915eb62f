"""Programs of the Hugging Face ecosystem run our models, and give what they give for BLOOM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import alibi_flax
import alibi_torch
import alibi_torch.transformers
from alibi_convert import convert
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import AGREEMENTS, BUDGETS
from parity_tests import test_family_bloom
from parity_tests.compare import assert_bitwise, assert_within
from parity_tests.families import VOCAB, redraw

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of these libraries about one another
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LIMIT = BUDGETS["float32", "cpu"].forward
WORDS = [f"w{index}" for index in range(VOCAB)]


def write_tokenizer(folder: Path) -> None:
    """A word for each token."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": "w1", "eos_token": "w2", "bos_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(name="folders")
def _folders(tmp_path: Path) -> tuple[Path, Path]:
    """A BLOOM of transformers, and the same as our folder."""
    test_family_bloom.peer(5).save_pretrained(tmp_path / "bloom")
    convert(tmp_path / "bloom", tmp_path / "ours")
    for name in ("bloom", "ours"):
        write_tokenizer(tmp_path / name)
    return tmp_path / "bloom", tmp_path / "ours"


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams that are sampled": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "assisted by the prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation(mode: str, folders: tuple[Path, Path]) -> None:
    rows = 1 if "assisted" in mode else 3  # transformers assists one sequence
    tokens = torch.from_numpy(np.random.default_rng(3).integers(4, VOCAB, (rows, 20)))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0 if rows > 1 else 1
    found = []
    for folder in folders:
        torch.manual_seed(0)
        options: Any = {"attention_mask": mask, "max_new_tokens": 40, "pad_token_id": 1}
        options |= {"eos_token_id": 2} | MODES[mode]
        found.append(opened(folder).generate(tokens, **options).numpy())
    assert_bitwise(found[1], found[0], mode)


def test_pipeline(folders: tuple[Path, Path]) -> None:
    found = []
    for folder in folders:
        writer = pipeline("text-generation", model=str(folder), tokenizer=str(folder))
        options: Any = {"max_new_tokens": 30, "do_sample": False, "return_tensors": True}
        rows = writer(["w5 w9 w23", "w40 w8"], batch_size=2, eos_token_id=0, **options)
        found.append([each[0]["generated_token_ids"] for each in rows])
    assert found[0] == found[1]
    assert all(len(row) >= 30 for row in found[0])


def test_trainer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Twenty steps, with parts and blocks that are computed again; what is saved opens in Flax."""
    rng = np.random.default_rng(4)
    rows = [rng.integers(4, VOCAB, 24).tolist() for _ in range(32)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    losses = []
    for folder in folders:
        output = tmp_path / f"trained {folder.name}"
        options = TrainingArguments(
            output_dir=str(output),
            max_steps=20,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=folder.name == "ours",
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=20,
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model=opened(folder), args=options, train_dataset=data)
        trainer.train()
        history = trainer.state.log_history
        losses.append(np.array([row["loss"] for row in history if "loss" in row]))
    assert losses[0].shape == (20,)
    assert losses[0][-1] < losses[0][0]
    limit = AGREEMENTS["float32 training"].relative
    assert_within(losses[1], losses[0], limit, "losses")
    last = tmp_path / "trained ours" / "checkpoint-20"
    tokens = np.array(rows[:2])
    with torch.no_grad():
        exact = opened(last)(torch.from_numpy(tokens)).logits.numpy()
    model, params = alibi_flax.from_pretrained(last)
    assert_within(np.asarray(model.apply({"params": params}, tokens)), exact, LIMIT, "in Flax")


def test_peft(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter that is trained, saved, read and merged into a folder of ours."""
    settings = LoraConfig(r=3, target_modules=["query", "value", "fc1"], task_type="CAUSAL_LM")
    adapted = get_peft_model(opened(folders[1]), settings)
    tokens = torch.from_numpy(np.random.default_rng(5).integers(4, VOCAB, (2, 24)))
    optimizer = torch.optim.AdamW(
        [each for each in adapted.parameters() if each.requires_grad], lr=1e-2
    )
    for _ in range(5):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        exact = adapted(input_ids=tokens).logits.numpy()
        plain = opened(folders[1])(tokens).logits.numpy()
        again = PeftModel.from_pretrained(opened(folders[1]), str(tmp_path / "adapter")).eval()
        assert_within(again(input_ids=tokens).logits.numpy(), exact, LIMIT, "read again")
    assert np.abs(plain - exact).max() > 1e-2
    merged: Any = again
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    model = alibi_torch.ALiBiLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_within(model(tokens).numpy(), exact, LIMIT, "merged")


def test_lm_eval(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A task of choices and one of perplexity, from files."""
    rng = np.random.default_rng(6)

    def text(length: int) -> str:
        return " ".join(rng.choice(WORDS[4:], length))

    rows = [
        {"text": text(60), "question": text(12), "choices": [text(3) for _ in range(4)], "gold": 1}
        for _ in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data: Any = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
    }
    tasks = [
        data
        | {
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        data
        | {
            "task": "perplexity",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ]
    scores = []
    for folder in folders:
        model = HFLM(
            pretrained=opened(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            batch_size=5,
            max_length=48,
            device="cpu",
        )
        manager = TaskManager(include_defaults=False)
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0
        )
        scores.append(found["results"])
    theirs, ours = scores
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["choices"][metric] == theirs["choices"][metric]
    perplexities = [np.array(each["perplexity"]["word_perplexity,none"]) for each in scores]
    assert_within(perplexities[1], perplexities[0], LIMIT, "perplexity")


def test_sentence_transformers(tmp_path: Path) -> None:
    """Of an encoder like Jina's: the vectors that `encode` gives."""
    config = ALiBiConfig(
        num_layers=2,
        d_model=48,
        num_heads=4,
        vocab_size=VOCAB,
        causal=False,
        head="masked_lm",
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        type_vocab_size=2,
        gated_ffn=True,
    )
    model = alibi_torch.ALiBiLM(config)
    redraw(model)
    model.save_pretrained(tmp_path / "encoder")
    write_tokenizer(tmp_path / "encoder")
    words = Transformer(str(tmp_path / "encoder"), max_seq_length=64)
    encoder = SentenceTransformer(modules=[words, Pooling(config.d_model)], device="cpu")
    texts = ["w5 w9 w23 w8 w11", "w40 w8", "w7 " * 50]
    found = encoder.encode(texts, batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    rows = [tokenizer(each)["input_ids"] for each in texts]
    exact = alibi_torch.encode(model.eval(), rows, normalize=False).numpy()
    assert_within(np.asarray(found), exact, LIMIT, "vectors")
