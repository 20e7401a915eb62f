"""Whether a model computes the same before and after its conversion between families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from alibi_convert.checkpoint import Checkpoint
from alibi_convert.errors import MismatchError
from alibi_convert.formats.config_file import OURS
from alibi_convert.machine import available_memory, is_installed
from alibi_convert.progress import Begin, ignore, progress_steps
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS, relative_error
from alibi_verify.peers import peer_outputs, why_no_peer

_Run = Callable[[np.ndarray, np.ndarray, str], np.ndarray]
BUDGET = BUDGETS["float32", "cpu"].forward
_MAGNIFIED = 1e-3  # largest error that a model can make of a thousand times smaller rounding
_BATCH, _SEQ = 2, 48
_OVERHEAD = 2**30  # interpreter, frameworks and activations of so short a sequence


def compare_logits(
    source: Checkpoint, result: Checkpoint, is_cast: bool, progress: bool = False
) -> dict[str, Any]:
    """Run both sides of a conversion on the same tokens, on the CPU.

    Its own library runs the foreign side if it can be trusted; both backends run the other side.
    After a cast the backends run the foreign side, too: the result was compared bit by bit before.

    Args:
        source, result: one of them of a foreign family; of two the one whose library can run.
        is_cast: their dtypes differ.
        progress: print on the standard error stream what is running.

    Returns:
        `OutputErrors` as plain JSON values, with "no_peer" if the library did not run; or
        "not_run" with the reason.

    Raises:
        MismatchError: an implementation differs by more than rounding can explain.
    """
    if source.family == result.family:
        return {"not_run": "nothing was renamed: the same bits are the same model"}
    needed, available = _needed_memory(source), available_memory()
    if available is not None and needed > available:
        return {
            "not_run": f"about {needed:,} bytes of memory are needed, {available:,} are available; "
            "run `alibi verify` where there is more"
        }
    foreign, other = (result, source) if _is_judged_by(result, source) else (source, result)
    other = foreign if is_cast else other
    with progress_steps(progress, "comparing outputs") as begin:
        if len(list(_runs(foreign, other))) < 2:
            needed = "two of transformers, torch and flax are needed; install alibi-duo[all]"
            return {"not_run": needed}
        found = output_errors(foreign, other, begin)
    for name, error in found.errors.items():
        if not error <= BUDGET:
            raise MismatchError(
                f"{name} differs from {found.against} by {error:.1e} of the largest output, in "
                f"{found.dtype}, where {BUDGET:.0e} is allowed; this conversion cannot be trusted: "
                "please report it"
            )
    reason = why_no_peer(foreign)
    no_peer = {} if reason is None else {"no_peer": reason}
    return {**asdict(found), "budget": BUDGET, **no_peer}


def _is_judged_by(result: Checkpoint, source: Checkpoint) -> bool:
    """Whether the foreign side is the result."""
    if OURS in (source.family, result.family):
        return source.family == OURS
    return why_no_peer(source) is not None and why_no_peer(result) is None


@dataclass(frozen=True)
class OutputErrors:
    """How far implementations differ.

    Attributes:
        against: the implementation that the others are compared with.
        errors: of the others, relative to its largest output.
        dtype: of the computation of all.
    """

    against: str
    errors: dict[str, float]
    dtype: str


def output_errors(foreign: Checkpoint, other: Checkpoint, begin: Begin = ignore) -> OutputErrors:
    """Run a foreign checkpoint by its own library, the other by every installed backend.

    If `why_no_peer` has a reason against the library, only the backends run. If errors exceed
    `BUDGET` but not `_MAGNIFIED`, the model can have magnified the rounding of float32: all run
    again in float64, where only another model has such errors.
    """
    found = OutputErrors("", {}, "")
    # transformers' BLOOM spoils sequences that are padded on the left in float64.
    for dtype, padding in (("float32", "left"), ("float64", "right")):
        inputs, attention_mask = _inputs(foreign.config, padding)
        real = attention_mask.astype(bool)
        outputs = {}
        for name, run in _runs(foreign, other):
            begin(f"{name} in {dtype}")
            outputs[name] = run(inputs, attention_mask, dtype)[real].astype(np.float64)
        against, *others = outputs
        errors = {name: relative_error(outputs[name], outputs[against]) for name in others}
        found = OutputErrors(against, errors, dtype)
        worst = max(errors.values())
        if worst <= BUDGET or not worst <= _MAGNIFIED:
            break
    return found


def _needed_memory(checkpoint: Checkpoint) -> int:
    sizes = [header.size for header in checkpoint.tensors.headers.values()]
    return 8 * (sum(sizes) + max(sizes)) + _OVERHEAD  # float64, if it must run again


def _runs(foreign: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, _Run]]:
    """The implementations that can run a side, the most independent first."""
    if why_no_peer(foreign) is None:
        yield f"transformers' {foreign.family}", partial(peer_outputs, foreign)
    if is_installed("torch"):
        yield "alibi_torch", partial(_torch_outputs, other)
    if is_installed("flax"):
        yield "alibi_flax", partial(_flax_outputs, other)


def _torch_outputs(
    checkpoint: Checkpoint, inputs: np.ndarray, attention_mask: np.ndarray, dtype: str
) -> np.ndarray:
    import torch

    import alibi_torch

    is_bare = checkpoint.config.vocab_size is None
    model_class = alibi_torch.ALiBiTransformer if is_bare else alibi_torch.ALiBiLM
    options = _options(checkpoint)
    model = model_class.from_pretrained(checkpoint.path, dtype=getattr(torch, dtype), **options)
    placed = torch.from_numpy(inputs)
    placed = placed.to(getattr(torch, dtype)) if is_bare else placed
    with alibi_torch.full_precision(), torch.no_grad():
        return model(placed, torch.from_numpy(attention_mask)).numpy()


def _flax_outputs(
    checkpoint: Checkpoint, inputs: np.ndarray, attention_mask: np.ndarray, dtype: str
) -> np.ndarray:
    import jax

    import alibi_flax

    cpu, is_bare = jax.default_device(jax.devices("cpu")[0]), checkpoint.config.vocab_size is None
    inputs = inputs.astype(dtype) if is_bare else inputs
    with cpu, alibi_flax.full_precision(), jax.enable_x64(dtype == "float64"):
        options = _options(checkpoint)
        model, params = alibi_flax.from_pretrained(checkpoint.path, dtype=dtype, **options)
        return np.asarray(model.apply({"params": params}, inputs, attention_mask))


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    """How to open it again: a foreign checkpoint holds its own configuration."""
    config = checkpoint.config if checkpoint.family == OURS else None
    adapter = None if checkpoint.merged is None else checkpoint.merged.adapter.path
    return {"config": config, "allow_pt": True, "adapter": adapter}


def _inputs(config: ALiBiConfig, padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (embeddings without a vocabulary) and a mask that pads the first sequence."""
    rng, shape = np.random.default_rng(0), (_BATCH, min(_SEQ, config.max_len))
    attention_mask = np.ones(shape, dtype=np.int64)
    padded = shape[1] // 4
    attention_mask[0, slice(padded) if padding == "left" else slice(shape[1] - padded, None)] = 0
    if config.vocab_size is None:
        inputs = rng.standard_normal((*shape, config.d_model)).astype(np.float32)
    else:
        inputs = rng.integers(0, config.vocab_size, shape)
    return inputs, attention_mask
