"""Read a long text with an MPT in PyTorch, and continue it in memory that stops growing.

    python examples/mpt_long_context.py                        # a small MPT of random weights
    python examples/mpt_long_context.py --folder mpt-7b --text novel.txt --new-tokens 2000

MPT's own code stops at max_seq_len. Here the prompt is read in chunks, past any trained length, and
the weights prove how many keys each head can need, so that its cache keeps no more
(docs/concepts.md). Every step proves anew that what is gone does not matter. Needs '.[torch,hub]'.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from alibi_convert import convert, load_tokenizer, open_checkpoint
from alibi_spec import ALiBiConfig
from alibi_spec.bounds import model_windows
from alibi_spec.cache import rings
from alibi_torch import ALiBiLM, generate

SAMPLING = {"do_sample": True, "top_p": 0.9, "seed": 7}


def drawn_mpt(folder: Path) -> Path:
    """An MPT of random weights, trained (as it says) at 128 bytes, as llm-foundry writes it."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 256, "max_len": 128}
    no_bias = dict.fromkeys(("attention_bias", "ffn_bias", "norm_bias"), False)
    ALiBiLM(ALiBiConfig(**sizes, **no_bias, expansion_factor=4)).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "mpt", to="mpt", verify="bits")
    return folder / "mpt"


def cached_numbers(config: ALiBiConfig, windows: np.ndarray | None, positions: int) -> int:
    """How many numbers a cache holds once that many positions were read."""
    layers = rings(config, windows, positions)
    slots = sum(len(ring.heads) * ring.size for layer in layers for ring in layer)
    return 2 * slots * config.d_model // config.num_heads


def continued(folder: Path, text: str, new_tokens: int, chunk: int) -> torch.Tensor:
    """The tokens of the text and those that the model adds, [1, tokens]."""
    checkpoint = open_checkpoint(folder)
    config, windows = checkpoint.config, model_windows(checkpoint.config, checkpoint.tensors)
    for layer, row in enumerate(windows.tolist()):
        print(f"layer {layer}: its heads need at most {row} keys")  # -1: nothing could be proved
    for positions in (1_000, 10_000, 100_000):
        kept, whole = (cached_numbers(config, each, positions) for each in (windows, None))
        print(f"cache at {positions:,} positions: {kept:,} numbers instead of {whole:,}")

    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    ids = list(text.encode()) if tokenizer is None else tokenizer.encode(text).ids
    print(f"reading {len(ids):,} tokens, {chunk:,} at a time; trained at {config.max_len:,}")
    model = ALiBiLM.from_pretrained(folder)
    memory = {"prefill_chunk": chunk, "windows": windows}
    found = generate(model, torch.tensor([ids]), new_tokens, **SAMPLING, **memory)
    new = found.tokens[0, len(ids) :].tolist()
    print("tokens:", new if tokenizer is None else tokenizer.decode(new))
    return found.tokens


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of an MPT; without it a small one is made")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file of UTF-8")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or drawn_mpt(Path(scratch))
        text = options.text.read_text(encoding="utf-8")
        continued(folder, text, options.new_tokens, options.chunk)


if __name__ == "__main__":
    main()
