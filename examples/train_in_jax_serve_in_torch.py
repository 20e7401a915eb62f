"""Fine-tune a BLOOM in JAX, convert it, and generate with transformers: the same tokens.

    python examples/train_in_jax_serve_in_torch.py --output tuned     # a small one, random weights
    python examples/train_in_jax_serve_in_torch.py --folder bloom-560m --text my.txt --output tuned

The output has two folders: `ours`, which both backends open, and `bloom`, which transformers opens.
`alibi train` has more: checkpoints, resuming, validation, meshes (docs/training.md). Needs
'.[all,hf]'.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import BloomForCausalLM

import alibi_flax
from alibi_convert import convert, load_tokenizer
from alibi_flax import ALiBiConfig, ALiBiLM, Recipe, Trainer


def opened(folder: Path | None) -> tuple[ALiBiLM, dict]:
    """The BLOOM of a folder, or one of random weights that reads bytes."""
    if folder is not None:
        return alibi_flax.from_pretrained(folder)
    sizes = {"num_layers": 1, "d_model": 64, "num_heads": 4, "vocab_size": 256}
    bloom = {"expansion_factor": 4, "activation": "gelu_tanh", "embedding_norm": True}
    model = ALiBiLM(ALiBiConfig(**sizes, **bloom, dropout=0.0))
    return model, model.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]


def fine_tune(trainer: Trainer, tokens: np.ndarray, length: int) -> dict:
    """The params after all steps, on random pieces of the text."""
    recipe = trainer.recipe
    rng = np.random.default_rng(0)
    for step in range(recipe.steps):
        starts = rng.integers(0, len(tokens) - length, recipe.batch_size)
        rows = tokens[starts[:, None] + np.arange(length + 1)]
        metrics = trainer.step({"tokens": rows[:, :-1], "targets": rows[:, 1:]})
        if step in (0, recipe.steps - 1):
            print(f"step {step}: loss {float(metrics.loss):.3f}")
    return trainer.params


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of a BLOOM; without it a small one is made")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file of UTF-8")
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="trained BLOOMs: 1e-5")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    options = parser.parse_args(arguments)

    text = options.text.read_text(encoding="utf-8")
    has_words = options.folder is not None and (options.folder / "tokenizer.json").exists()
    ids = load_tokenizer(options.folder).encode(text).ids if has_words else list(text.encode())
    model, params = opened(options.folder)
    recipe = Recipe(steps=options.steps, batch_size=4, learning_rate=options.learning_rate)
    params = fine_tune(Trainer(model, params, recipe), np.array(ids), options.length)

    alibi_flax.save_pretrained(options.output / "ours", model, params)
    # Proved, since both sides are run. For llama.cpp: alibi convert tuned/ours tuned.gguf
    convert(options.output / "ours", options.output / "bloom", to="bloom")

    prompt = np.array([ids[:16]])
    in_jax = np.asarray(alibi_flax.generate(model, params, prompt, 16).tokens)
    bloom = BloomForCausalLM.from_pretrained(options.output / "bloom").eval()
    greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(1, 16, dtype=torch.int64)
    in_torch = bloom.generate(torch.from_numpy(prompt), attention_mask=mask, **greedy)
    print("JAX and transformers agree:", bool((in_jax == in_torch.numpy()).all()))
    print("tokens:", in_jax[0, 16:].tolist())


if __name__ == "__main__":
    main()
