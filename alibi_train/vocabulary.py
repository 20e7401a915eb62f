"""A tokenizer of one's own, trained on the documents of a run."""

from __future__ import annotations

from pathlib import Path

from alibi_convert.machine import require
from alibi_convert.tokenizer import TOKENIZER_FILE
from alibi_train.documents import files_of, texts_of
from alibi_train.settings import Settings


def train_tokenizer(settings: Settings, folder: Path, size: int) -> Path:
    """The file of a byte-level BPE tokenizer; one that is in the folder already stays.

    Args:
        folder: of the run.
        size: tokens, at least the 256 bytes.

    Raises:
        ValueError: a size below 256, files that are no texts, or tokenizers is not installed.
    """
    file = folder / TOKENIZER_FILE
    if file.exists():
        return file
    if size < 256:
        raise ValueError(f"a tokenizer of {size} tokens is too small; expected at least 256")
    require("tokenizers", "train", "training a tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    files = files_of(settings.data.train, settings.folder)
    tokenizer.train_from_iterator(texts_of(files), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.new")
    tokenizer.save(str(draft))
    draft.replace(file)
    return file
