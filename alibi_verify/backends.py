"""Both backends behind the same methods, in NumPy terms; each framework is imported when used.

`verify` and the parity tests call both through these methods, so that neither can treat them
differently. Parameters are canonical tensors (torch names and layout).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from alibi_convert.rules import canonical_tensors, flax_tree, flax_view
from alibi_convert.tensors import Tensors, as_numpy, as_torch
from alibi_spec import ALiBiConfig, Parameter
from alibi_spec.exact import ExactAttention

Array = np.ndarray
Arrays = Mapping[str, Array]
Mask = Array | None


class TorchBackend:
    """`alibi_torch` on one torch device, with matrix products in full float32."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.name = f"torch {device}"

    def attention_implementations(self) -> tuple[str, ...]:
        """What this backend has to compute attention with."""
        import alibi_torch

        return alibi_torch.attention_implementations()

    def exact_logits(self, case: ExactAttention) -> Array:
        """Biased logits of the attention layer of `case`, float32."""
        model = self.model(case.config, case.parameters, "float32")
        with self.settings():
            logits = model.layers[0].attn.biased_logits(
                self.put(case.inputs), attention_mask=self.put(case.attention_mask)
            )
        return as_numpy(logits)

    def trace(
        self,
        config: ALiBiConfig,
        tensors: Arrays,
        inputs: Array,
        attention_mask: Mask,
        dtype: str,
        implementation: str = "auto",
    ) -> dict[str, Array]:
        """Every intermediate, with parameters and computation in `dtype`.

        Raises:
            RefusalError: this implementation of attention cannot compute the model's calls.
        """
        import torch

        import alibi_torch

        model = self.model(config, tensors, dtype, implementation)
        with self.settings(), torch.no_grad():
            values = alibi_torch.trace(
                model, self._inputs(config, inputs, dtype), self.put(attention_mask)
            )
        return {name: as_numpy(value) for name, value in values.items()}

    def gradients(
        self,
        config: ALiBiConfig,
        tensors: Arrays,
        inputs: Array,
        attention_mask: Mask,
        cotangent: Array,
        dtype: str,
        implementation: str = "auto",
    ) -> dict[str, Array]:
        """Gradient of Σ cotangent · output with respect to every parameter."""
        model = self.model(config, tensors, dtype, implementation)
        with self.settings():
            output = model(self._inputs(config, inputs, dtype), self.put(attention_mask))
            output.backward(self.put(cotangent).to(output.dtype))
        return {name: as_numpy(parameter.grad) for name, parameter in model.named_parameters()}

    def generate(
        self, config: ALiBiConfig, tensors: Arrays, prompt: Array, max_new_tokens: int
    ) -> Array:
        """Greedy continuation in float32."""
        import alibi_torch

        model = self.model(config, tensors, "float32")
        with self.settings():
            generated = alibi_torch.generate(model, self.put(prompt), max_new_tokens)
        return as_numpy(generated.tokens)

    def model(
        self, config: ALiBiConfig, tensors: Arrays, dtype: str, implementation: str = "auto"
    ) -> Any:
        import torch

        import alibi_torch

        bare = config.vocab_size is None
        model_class = alibi_torch.ALiBiTransformer if bare else alibi_torch.ALiBiLM
        model = model_class(config, implementation=implementation)
        model.load_state_dict({name: as_torch(array) for name, array in tensors.items()})
        return model.to(self.device, getattr(torch, dtype)).eval()

    def _inputs(self, config: ALiBiConfig, inputs: Array, dtype: str) -> Any:
        import torch

        tensor = self.put(inputs)
        return tensor.to(getattr(torch, dtype)) if config.vocab_size is None else tensor

    def put(self, array: Mask) -> Any:
        return None if array is None else as_torch(array).to(self.device)

    def settings(self) -> AbstractContextManager[None]:
        """What a block computes with."""
        import alibi_torch

        return alibi_torch.full_precision()


class FlaxBackend:
    """`alibi_flax` on one JAX device, with matrix products in full float32; as `TorchBackend`."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.name = f"flax {device}"

    def attention_implementations(self) -> tuple[str, ...]:
        import alibi_flax

        return alibi_flax.attention_implementations()

    def exact_logits(self, case: ExactAttention) -> Array:
        import jax.numpy as jnp

        model = self.model(case.config, "float32")
        with self.settings():
            logits = model.apply(
                {"params": self.params(case.config, case.parameters, "float32")},
                jnp.asarray(case.inputs),
                attention_mask=jnp.asarray(case.attention_mask),
                method=lambda model, x, **mask: model.layers[0].attn.biased_logits(x, **mask),
            )
        return np.asarray(logits)

    def trace(
        self,
        config: ALiBiConfig,
        tensors: Arrays,
        inputs: Array,
        attention_mask: Mask,
        dtype: str,
        implementation: str = "auto",
    ) -> dict[str, Array]:
        import jax

        import alibi_flax

        model = self.model(config, dtype, implementation)

        @jax.jit
        def trace(*arguments: Any) -> OrderedDict[str, Any]:  # a pytree that keeps the order
            return OrderedDict(alibi_flax.trace(model, *arguments))

        with self.settings(dtype):
            values = trace(
                self.params(config, tensors, dtype),
                self._inputs(config, inputs, dtype),
                self.put(attention_mask),
            )
        return {name: np.asarray(value) for name, value in values.items()}

    def gradients(
        self,
        config: ALiBiConfig,
        tensors: Arrays,
        inputs: Array,
        attention_mask: Mask,
        cotangent: Array,
        dtype: str,
        implementation: str = "auto",
    ) -> dict[str, Array]:
        import jax

        model = self.model(config, dtype, implementation)

        @jax.jit
        def gradients(params: Any, inputs: Any, mask: Any, cotangent: Any) -> Any:
            value, pullback = jax.vjp(
                lambda tree: model.apply({"params": tree}, inputs, mask), params
            )
            return pullback(cotangent.astype(value.dtype))[0]

        with self.settings(dtype):
            found = gradients(
                self.params(config, tensors, dtype),
                self._inputs(config, inputs, dtype),
                self.put(attention_mask),
                self.put(cotangent),
            )
        return canonical_tensors(found, config)

    def generate(
        self, config: ALiBiConfig, tensors: Arrays, prompt: Array, max_new_tokens: int
    ) -> Array:
        import alibi_flax

        with self.settings():
            params = self.params(config, tensors, "float32")
            model = self.model(config, "float32")
            generated = alibi_flax.generate(model, params, self.put(prompt), max_new_tokens)
        return np.asarray(generated.tokens)

    def model(self, config: ALiBiConfig, dtype: str, implementation: str = "auto") -> Any:
        import alibi_flax

        bare = config.vocab_size is None
        model_class = alibi_flax.ALiBiTransformer if bare else alibi_flax.ALiBiLM
        return model_class(config, dtype=dtype, param_dtype=dtype, implementation=implementation)

    def params(self, config: ALiBiConfig, tensors: Arrays, dtype: str) -> Any:
        import jax
        import jax.numpy as jnp

        def placed(row: Parameter, tensor: np.ndarray) -> jax.Array:
            wide = jnp.promote_types(dtype, jnp.float32)
            return jnp.asarray(flax_view(row, tensor), wide if row.is_wide else dtype)

        return flax_tree(Tensors.of(tensors), config, placed)

    def _inputs(self, config: ALiBiConfig, inputs: Array, dtype: str) -> Any:
        array = self.put(inputs)
        return array.astype(dtype) if config.vocab_size is None else array

    def put(self, array: Mask) -> Any:
        import jax.numpy as jnp

        return None if array is None else jnp.asarray(array)

    @contextmanager
    def settings(self, dtype: str = "float32") -> Iterator[None]:
        import jax

        import alibi_flax

        device = jax.default_device(jax.devices(self.device)[0])
        is_wide = dtype == "float64" or jax.config.read("jax_enable_x64")
        with device, alibi_flax.full_precision(), jax.enable_x64(is_wide):
            yield


Backend = TorchBackend | FlaxBackend
