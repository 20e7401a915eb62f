"""Foreign peers for the tests of checkpoint families: transformers' own models, saved by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

import alibi_flax
import alibi_torch
from alibi_convert import open_checkpoint
from alibi_convert.families import Family, Source, export_tensors, import_tensors
from alibi_convert.formats.shards import read_tensors
from alibi_convert.rules import canonical_tensors
from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import ALiBiConfig, reference_forward
from alibi_spec.budgets import BUDGETS
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB, SEQ = 61, 320


class Float64Inside(TorchFunctionMode):
    """Let a float64 peer stay in float64 where it asks for float32 on the way to its softmax."""

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter far from its initial value: no unit norm, no zero bias, no two alike."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            values = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            values = values / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)
    return model.eval()


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a mask: padding on the left, none, padding on the right."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, SEQ))
    mask = np.ones((3, SEQ), dtype=np.int64)
    mask[0, :100] = 0
    mask[2, SEQ - 70 :] = 0
    return tokens, mask


def peer_logits(model: torch.nn.Module) -> np.ndarray:
    tokens, mask = batch()
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
    return as_numpy(output.logits)


def our_logits(folder: Path, dtype: str = "float32", **reading: Any) -> dict[str, np.ndarray]:
    """Both backends' logits for `batch()`, straight from a family's folder; in float64 the
    specification's too.
    """
    tokens, mask = batch()
    ours = alibi_torch.ALiBiLM.from_pretrained(folder, dtype=getattr(torch, dtype), **reading)
    with torch.no_grad():
        found = as_numpy(ours.eval()(torch.from_numpy(tokens), torch.from_numpy(mask)))
    model, params = alibi_flax.from_pretrained(folder, dtype=dtype, **reading)
    apply = jax.jit(lambda *args: model.apply({"params": args[0]}, *args[1:]))
    logits = {
        "torch": found,
        "flax": np.asarray(apply(params, jnp.asarray(tokens), jnp.asarray(mask))),
    }
    if dtype == "float64":
        checkpoint = open_checkpoint(folder, **reading)
        exact = reference_forward(checkpoint.config, checkpoint.tensors, tokens, mask)
        logits["reference"] = exact["logits"]
    return logits


def assert_same_logits(found: Mapping[str, np.ndarray], expected: np.ndarray, limit: float) -> None:
    """At every real position, where both sides define the result."""
    real = batch()[1] == 1
    for name, logits in found.items():
        assert_within(logits[real], expected[real], limit, name)


def assert_same_gradients(family: Family, folder: Path, model: torch.nn.Module) -> None:
    """Of every parameter: the peer's gradients take the same way as its weights."""
    tokens, mask = batch()
    rng = np.random.default_rng(2)
    cotangent = (rng.standard_normal((*tokens.shape, VOCAB)) * mask[..., None]).astype(np.float32)
    output = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
    output.logits.backward(torch.from_numpy(cotangent))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    config = open_checkpoint(folder).config
    source = Source(read_config(folder), Tensors.of(gradients))
    exact = dict(import_tensors(family, config, source).tensors)
    for name, found in _our_gradients(folder, config, cotangent).items():
        assert_gradients_within(found, exact, BUDGETS["float32", "cpu"].gradient, name)


def _our_gradients(
    folder: Path, config: ALiBiConfig, cotangent: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    tokens, mask = batch()
    ours = alibi_torch.ALiBiLM.from_pretrained(folder).eval()
    ours(torch.from_numpy(tokens), torch.from_numpy(mask)).backward(torch.from_numpy(cotangent))
    model, params = alibi_flax.from_pretrained(folder)

    def weighted_sum(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return (model.apply({"params": params}, tokens, mask) * cotangent).sum()

    gradients = jax.jit(jax.grad(weighted_sum))(params, jnp.asarray(tokens), jnp.asarray(mask))
    return {
        "torch": {name: as_numpy(parameter.grad) for name, parameter in ours.named_parameters()},
        "flax": canonical_tensors(gradients, config),
    }


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_folder(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config)))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return folder


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: as_numpy(parameter) for name, parameter in model.named_parameters()}


def export(family: Family, config: ALiBiConfig, tensors: Tensors, folder: Path) -> Path:
    assert family.write_config is not None
    exported = export_tensors(family, config, tensors)
    return write_folder(folder, family.write_config(config), dict(exported))


def assert_round_trip(family: Family, folder: Path, destination: Path) -> Path:
    """Family -> ours -> family: the same tensors bitwise, and the same for every key written."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.family == family.name
    export(family, checkpoint.config, checkpoint.tensors, destination)
    assert_same_keys(read_config(destination), read_config(folder))
    again = open_checkpoint(destination)
    assert again.config == checkpoint.config
    assert_same_tensors(folder, destination)
    return destination


def assert_same_tensors(folder: Path, other: Path) -> None:
    expected, found = (read_tensors(each, allow_pt=False) for each in (folder, other))
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert_bitwise(found[name], array, name)


def assert_same_keys(written: Mapping[str, Any], original: Mapping[str, Any]) -> None:
    for name, value in written.items():
        if isinstance(value, Mapping) and name in original:
            assert_same_keys(value, original[name])
        elif name in original:
            assert value == original[name], name
            assert type(value) is type(original[name]), name


def assert_peer_loads(model_class: Any, folder: Path, expected: np.ndarray, **options: Any) -> None:
    """transformers finds every tensor, finds no other, and computes what it did before."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert_bitwise(peer_logits(model.eval()), expected, "the peer's logits from our export")
