"""Fine-tune a model in JAX, write it as GGUF, and let llama.cpp continue a text: the same text.

    python examples/train_in_jax_serve_in_llama_cpp.py --output tuned

trains a small MPT from nothing; with `--folder bloom-560m --text my.txt`, that model on that text
(docs/gguf.md: which models and tokenizers). Needs '.[all]' and xllamacpp, a wheel of llama.cpp.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import alibi_flax
from alibi_convert import convert, load_tokenizer
from alibi_flax import ALiBiConfig, ALiBiLM, Recipe, Trainer


def drawn(folder: Path, text: str) -> Path:
    """A folder of a small MPT with random weights, and a tokenizer that was trained on the text."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], **alphabet)
    words.train_from_iterator([text], trainer)
    sizes = {"num_layers": 1, "d_model": 64, "num_heads": 4, "vocab_size": words.get_vocab_size()}
    model = ALiBiLM(ALiBiConfig(**sizes, dropout=0.0))
    params = model.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    alibi_flax.save_pretrained(folder, model, params)
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return folder


def continued(file: Path, prompt: str, count: int) -> str:
    """What llama.cpp adds to a text, always the likeliest token."""
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_gpu_layers, asked.verbosity = str(file), 0, 0
    server = xllamacpp.Server(asked)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": count, "temperature": 0})
    return answer["choices"][0]["text"]


def main(arguments: list[str] | None = None) -> None:
    """Train, convert, generate twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--prompt", default="import ")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="trained models: 1e-5")
    options = parser.parse_args(arguments)

    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or drawn(Path(name) / "drawn", text)
        words = load_tokenizer(folder)
        model, params = alibi_flax.from_pretrained(folder)
        ids, rng = np.array(words.encode(text).ids), np.random.default_rng(0)
        recipe = Recipe(steps=options.steps, batch_size=4, learning_rate=options.learning_rate)
        trainer = Trainer(model, params, recipe)
        for _ in range(options.steps):
            starts = rng.integers(0, len(ids) - 64, 4)
            rows = ids[starts[:, None] + np.arange(65)]
            metrics = trainer.step({"tokens": rows[:, :-1], "targets": rows[:, 1:]})
        print(f"loss: {float(metrics.loss):.3f}")
        alibi_flax.save_pretrained(options.output / "ours", model, trainer.params)
    convert(options.output / "ours", options.output / "tuned.gguf")  # read back and compared

    prompt = np.array([words.encode(options.prompt).ids])
    found = np.asarray(alibi_flax.generate(model, trainer.params, prompt, 16).tokens)
    in_llama_cpp = continued(options.output / "tuned.gguf", options.prompt, 16)
    print("agree:", words.decode(found[0, prompt.shape[1] :].tolist()) == in_llama_cpp)
    print("text:", in_llama_cpp)


if __name__ == "__main__":
    main()
