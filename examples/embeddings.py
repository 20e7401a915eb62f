"""Vectors of sentences: which of them is most like the first one?

    python examples/embeddings.py                 # an encoder of random weights: shows the way
    python examples/embeddings.py --folder jina-embeddings-v2-small-en 'A cat sat.' 'It rained.'

Without a folder the model knows bytes and has learned nothing, so that its order means nothing. Any
encoder that `alibi inspect` recognises will do (docs/embedding.md). Needs '.[torch,hub]'.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from alibi_convert import load_tokenizer
from alibi_torch import ALiBiConfig, ALiBiLM, encode

SENTENCES = ("Where did the cat sit?", "A kitten took a seat on the mat.", "Rain fell all night.")


def drawn_encoder(folder: Path) -> Path:
    """An encoder with the shape of Jina's, of random weights, that reads bytes."""
    torch.manual_seed(0)
    config = ALiBiConfig(
        num_layers=2,
        d_model=64,
        num_heads=4,
        vocab_size=256,
        causal=False,
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        gated_ffn=True,
        head="none",
    )
    ALiBiLM(config).save_pretrained(folder / "encoder")
    return folder / "encoder"


def similarities(folder: Path, sentences: list[str], pooling: str) -> torch.Tensor:
    """The cosine of each sentence with each, [sentences, sentences]."""
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    else:
        tokens = [list(sentence.encode()) for sentence in sentences]
    vectors = encode(ALiBiLM.from_pretrained(folder), tokens, pooling=pooling)
    return vectors @ vectors.T  # they have length 1


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--folder", type=Path, help="of an encoder; without it a small one is made")
    parser.add_argument("--pooling", default="mean", choices=("mean", "cls", "last"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or drawn_encoder(Path(scratch))
        cosines = similarities(folder, list(options.sentences), options.pooling)
    print(options.sentences[0])
    for place in cosines[0, 1:].argsort(descending=True).add(1).tolist():
        print(f"{cosines[0, place]:8.4f}  {options.sentences[place]}")


if __name__ == "__main__":
    main()
