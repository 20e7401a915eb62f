"""Published formulas in float64, one sequence and one head at a time, and the tests around them.

A test writes a checkpoint in its family's own format, with every parameter drawn anew, and gives
the family's forward pass for one unpadded sequence. Ours read the file and see the sequences in a
padded batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import alibi_flax
from alibi_convert import open_checkpoint
from alibi_convert.formats.safetensors import write_safetensors
from alibi_spec import reference_forward
from alibi_spec.budgets import BUDGETS
from alibi_torch import ALiBiLM
from parity_tests.compare import assert_within

Arrays = dict[str, np.ndarray]

SEQ = 320
PADDING = {0: slice(0, 0), 1: slice(0, 37), 2: slice(SEQ - 61, SEQ)}  # none, left, right


def draw(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float64) -> Arrays:
    """Parameters of these shapes: norms around one, biases around zero, maps that keep the scale.

    In float32 they are the same numbers, rounded.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        is_norm = any(word in name.lower() for word in ("norm", ".ln_"))
        if len(shape) > 1:
            values /= math.sqrt(shape[-1])
        else:
            values = (1 if is_norm and name.endswith("weight") else 0) + 0.3 * values
        arrays[name] = values.astype(np.float32).astype(dtype)
    return arrays


def write_folder(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> Path:
    """A folder as Hugging Face's hub has them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", arrays)
    return folder


def slopes(num_heads: int) -> np.ndarray:
    """The recursion that every published implementation copies from the paper's code."""

    def exact(count: int) -> list[float]:
        if math.log2(count).is_integer():
            start = 2 ** (-(2 ** -(math.log2(count) - 3)))
            return [start * start**index for index in range(count)]
        power = 2 ** math.floor(math.log2(count))
        return exact(power) + exact(2 * power)[0::2][: count - power]

    return np.array(exact(num_heads), np.float32).astype(np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    slopes: np.ndarray,
    *,
    causal: bool,
    scale: float | None = None,
) -> np.ndarray:
    """Heads side by side in [seq, width], biased by -m |i - j|, causal or not."""
    seq, width = query.shape
    distance = np.abs(np.arange(seq)[:, None] - np.arange(seq)[None, :])
    future = np.triu(np.ones((seq, seq), bool), 1) & causal
    heads = []
    for head, slope in enumerate(slopes):
        part = slice(head * width // len(slopes), (head + 1) * width // len(slopes))
        factor = 1 / math.sqrt(part.stop - part.start) if scale is None else scale
        logits = query[:, part] @ key[:, part].T * factor - slope * distance
        heads.append(softmax(np.where(future, -np.inf, logits)) @ value[:, part])
    return np.concatenate(heads, axis=1)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    """By torch's error function."""
    return x * 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def assert_same(
    write: Callable[[Any], Path],
    forward: Callable[..., np.ndarray],
    tokens: np.ndarray,
    token_type_ids: np.ndarray | None = None,
    is_padded: bool = True,
) -> None:
    """Reference and both backends, from the file, agree with the published formula.

    Args:
        write: makes the checkpoint with parameters of one dtype.
        forward: of one unpadded sequence of tokens (and token types), with the same parameters.
        tokens: [3, SEQ].
        token_type_ids: [3, SEQ], where the model has them.
        is_padded: one sequence has padding on its left, one on its right.
    """
    mask = np.ones(tokens.shape, int)
    for row, hidden in PADDING.items():
        mask[row, hidden] = 1 - is_padded
    inputs = {"tokens": tokens} | (
        {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    )
    exact = [
        forward(*(array[row][mask[row] == 1] for array in inputs.values()))
        for row in range(len(mask))
    ]
    inputs["attention_mask"] = mask
    for dtype in (np.float64, np.float32):
        path = write(dtype)
        outputs = {"torch": _torch(path, inputs), "flax": _flax(path, inputs)}
        if dtype is np.float64:
            outputs["reference"] = _reference(path, inputs)
        limit = BUDGETS[np.dtype(dtype).name, "cpu"].forward
        for name, output in outputs.items():
            for row, expected in enumerate(exact):
                actual = output[row][mask[row] == 1]
                what = f"{name} sequence {row}"
                assert_within(actual, expected, limit, what, dtype=np.dtype(dtype).name)


def _torch(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    model = ALiBiLM.from_pretrained(path, allow_pt=True)
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return output.numpy()


def _flax(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    model, params = alibi_flax.from_pretrained(path, allow_pt=True)
    return np.asarray(jax.jit(model.apply)({"params": params}, **inputs))


def _reference(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    checkpoint = open_checkpoint(path, allow_pt=True)
    named = {"inputs" if name == "tokens" else name: array for name, array in inputs.items()}
    trace = reference_forward(checkpoint.config, checkpoint.tensors, **named)
    return trace.get("logits", trace["output"])
