"""How far float32 models err on devices that round the factors of products, emulated on the CPU.

`python -m benchmarks.precision`: every tensor of every layer against float64, and every gradient;
the largest error of any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alibi_flax
from alibi_convert.rules import canonical_tensors
from alibi_spec import ALiBiConfig, parameter_table
from alibi_spec.budgets import gradient_floor, relative_error
from alibi_verify.backends import FlaxBackend, TorchBackend
from alibi_verify.emulation import emulated
from alibi_verify.inputs import random_inputs
from benchmarks.compare import write

RESULTS = Path(__file__).parent / "results" / "precision.json"
LENGTH = 512
_LAYERS: dict[str, Any] = {"num_layers": 4, "d_model": 256, "num_heads": 8, "vocab_size": 1_000}
MODELS: Mapping[str, ALiBiConfig] = {
    "`ALiBiConfig()`": ALiBiConfig(),
    "like BLOOM": ALiBiConfig(
        **_LAYERS, expansion_factor=4, activation="gelu_tanh", embedding_norm=True
    ),
    "like MPT": ALiBiConfig(
        **_LAYERS, expansion_factor=4, attention_bias=False, ffn_bias=False, norm_bias=False
    ),
    "like Falcon-RW": ALiBiConfig(**_LAYERS, expansion_factor=4, distance="bfloat16"),
}
# How products are computed that ask for nothing, and those that ask for the highest precision, as
# attention's do in alibi_flax.
DEVICES: Mapping[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "TPU, in `full_precision()`": ("bfloat16, 6 passes", "bfloat16, 6 passes"),
    "TPU, three passes": ("bfloat16, 3 passes", "bfloat16, 3 passes"),
    "recent GPU, by default": ("TF32", "float32"),
    "TPU, by default": ("bfloat16, 1 pass", "bfloat16, 6 passes"),
}


def drawn(config: ALiBiConfig) -> dict[str, np.ndarray]:
    """Parameters of a trained model's size: no bias is zero, no gain one."""
    rng = np.random.default_rng(0)
    parameters = {}
    for row in parameter_table(config):
        values = rng.standard_normal(row.shape)
        scale = {"ones": 0.3, "zeros": 0.3}.get(row.init, 1 / np.sqrt(row.shape[-1]))
        parameters[row.name] = ((row.init == "ones") + scale * values).astype(np.float32)
    return parameters


class Measured:
    """One model on one input, and its exact tensors and gradients."""

    def __init__(self, config: ALiBiConfig, length: int) -> None:
        rng = np.random.default_rng(1)
        self.config, self.parameters = config, drawn(config)
        inputs = random_inputs(config, 1, length, rng)
        self.inputs = inputs if config.vocab_size else inputs.astype(np.float32)
        self.cotangent = rng.standard_normal((1, length, config.output_dim)).astype(np.float32)
        call = (config, self.parameters, self.inputs, None)
        self.exact = TorchBackend().trace(*call, "float64", "dense")
        self.exact_gradients = TorchBackend().gradients(*call, self.cotangent, "float64", "dense")

    def errors(self, default: str, highest: str) -> dict[str, float]:
        """The largest "forward" error of any tensor, and the largest of any "gradient"."""
        backend = FlaxBackend()
        model = backend.model(self.config, "float32", "dense")
        params = backend.params(self.config, self.parameters, "float32")
        run = partial(emulated, default=default, highest=highest)
        traced: Callable[..., Any] = partial(alibi_flax.trace, model)
        found = run(traced)(params, jnp.asarray(self.inputs))

        def weighted(params: Any, inputs: Any) -> Any:
            return (model.apply({"params": params}, inputs) * self.cotangent).sum()

        gradients = run(jax.grad(weighted))(params, jnp.asarray(self.inputs))
        floor = gradient_floor(self.exact_gradients)
        return {
            "forward": max(
                relative_error(np.asarray(each, np.float64), self.exact[name])
                for name, each in found.items()
                if not name.endswith("biased_logits")  # attention shows them
            ),
            "gradient": max(
                relative_error(each.astype(np.float64), self.exact_gradients[name], floor)
                for name, each in canonical_tensors(gradients, self.config).items()
            ),
        }


def main() -> None:
    """Measure, and write the file of results."""
    rows = []
    for name, config in MODELS.items():
        measured = Measured(config, LENGTH)
        for device, algorithms in DEVICES.items():
            rows.append({"model": name, "device": device, **measured.errors(*algorithms)})
            print(rows[-1], flush=True)
    packages = ("alibi-duo", "torch", "jax", "flax")
    results = {
        "versions": {package: version(package) for package in packages},
        "length": LENGTH,
        "devices": DEVICES,
        "rows": rows,
    }
    write(RESULTS, results)


if __name__ == "__main__":
    main()
