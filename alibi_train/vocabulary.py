"""A tokenizer of one's own, trained on the documents of a run."""

from __future__ import annotations

from pathlib import Path

from alibi_convert.machine import require
from alibi_convert.tokenizer import TOKENIZER_FILE
from alibi_train.documents import files_of, texts_of
from alibi_train.settings import Settings


def train_tokenizer(settings: Settings, folder: Path, size: int) -> None:
    """Write a byte-level BPE tokenizer into the folder; one that is there already stays.

    Args:
        folder: of the run.
        size: tokens, at least the 256 bytes.

    Raises:
        ValueError: a size below 256, settings that name a tokenizer or a checkpoint, files that are
            no texts, or tokenizers is not installed.
    """
    named = settings.data.tokenizer or settings.checkpoint
    if named is not None:
        raise ValueError(f"the settings name a tokenizer already: that of {named}; train none")
    file = folder / TOKENIZER_FILE
    if file.exists():
        return
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
