"""Open a BLOOM in JAX, divided over all devices that there are, and continue a prompt.

    python examples/bloom_on_tpu.py              # a small BLOOM of random weights, on any machine
    python examples/bloom_on_tpu.py --folder bloom-7b1 --dtype bfloat16 --prompt 'The sea was'

The same program serves one CPU, one GPU and a host with TPUs. Each device is sent its own part of
every weight while the folder is read, so that neither a device nor the host holds a whole large
model. XLA_FLAGS=--xla_force_host_platform_device_count=8 shows the division on a CPU. Needs
'.[flax,hub]'.
"""

import argparse
import math
import tempfile
from pathlib import Path

import jax
import numpy as np

import alibi_flax
from alibi_convert import convert, load_tokenizer, open_checkpoint
from alibi_flax.sharding import device_mesh
from alibi_spec import ALiBiConfig

SAMPLING = {
    "do_sample": True,
    "top_p": 0.9,
    "seed": 7,
}  # alibi_torch.generate gives the same tokens


def drawn_bloom(folder: Path) -> Path:
    """A BLOOM of random weights that reads bytes, in the files that transformers writes."""
    sizes = {"num_layers": 2, "d_model": 64, "num_heads": 8, "vocab_size": 256}
    bloom = {"expansion_factor": 4, "activation": "gelu_tanh", "embedding_norm": True}
    model = alibi_flax.ALiBiLM(ALiBiConfig(**sizes, **bloom))
    params = model.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    alibi_flax.save_pretrained(folder / "ours", model, params)
    convert(folder / "ours", folder / "bloom", to="bloom", verify="bits")
    return folder / "bloom"


def continued(folder: Path, prompt: str, new_tokens: int, dtype: str | None) -> np.ndarray:
    """The tokens of the prompt and those that the model adds, [1, tokens]."""
    heads = open_checkpoint(folder).config.num_heads
    # Heads over as many devices as divide them; the rest divide the weights (docs/parallel.md).
    tensor = math.gcd(jax.device_count(), heads)
    mesh = device_mesh({"fsdp": jax.device_count() // tensor, "tensor": tensor})
    model, params = alibi_flax.from_pretrained(folder, sharding=mesh, dtype=dtype)
    query = params["transformer"]["layers_0"]["attn"]["query"]["kernel"]
    print(f"{jax.device_count()} devices ({jax.default_backend()}): {dict(mesh.shape)}")
    part = query.addressable_shards[0].data.shape
    print(f"a query matrix of {query.shape}, of which each has {part}")

    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    ids = list(prompt.encode()) if tokenizer is None else tokenizer.encode(prompt).ids
    with jax.set_mesh(mesh):
        found = alibi_flax.generate(model, params, np.array([ids]), new_tokens, **SAMPLING)
    tokens = np.asarray(found.tokens)
    print("tokens:", tokens[0, len(ids) :].tolist())
    if tokenizer is not None:
        print(tokenizer.decode(tokens[0].tolist()))
    return tokens


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of a BLOOM; without it a small one is made")
    parser.add_argument("--prompt", default="The sea was")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", help="bfloat16 on TPUs; else that of the folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or drawn_bloom(Path(scratch))
        continued(folder, options.prompt, options.new_tokens, options.dtype)


if __name__ == "__main__":
    main()
