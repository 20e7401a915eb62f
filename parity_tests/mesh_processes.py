"""What several processes compute together, on the CPU by gloo, for `test_torch_mesh`.

Nothing here imports JAX: every process would.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from alibi_convert.tensors import Tensors, as_numpy
from alibi_spec import ALiBiConfig, Recipe
from alibi_torch import ALiBiLM, Trainer, generate, loss
from alibi_torch.checkpoint import with_gathered
from alibi_torch.divided import own_part, summed, total_norm, whole
from alibi_torch.sharding import device_mesh, parallelize
from parity_tests.compare import assert_bitwise

Results = dict[str, np.ndarray]

_SMALL: dict[str, Any] = {"num_layers": 2, "d_model": 48, "vocab_size": 64, "dropout": 0.0}
CONFIGS = {
    "decoder": ALiBiConfig(**_SMALL, num_heads=4, qkv_clip=1.0),
    "gated": ALiBiConfig(
        **_SMALL,
        num_heads=8,
        num_kv_heads=4,
        norm="rms",
        norm_bias=False,
        gated_ffn=True,
        attention_bias=False,
        tie_embeddings=False,
        slopes="learned",
    ),
    "masked": ALiBiConfig(
        **_SMALL,
        num_heads=4,
        causal=False,
        head="masked_lm",
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        type_vocab_size=2,
    ),
    "normed": ALiBiConfig(**_SMALL, num_heads=4, qk_norm=True, output_projection=False),
    "normed by RMS": ALiBiConfig(
        **_SMALL, num_heads=4, qk_norm=True, norm="rms", norm_bias=False, adaptive_cutoffs=(16, 32)
    ),
    "whole keys": ALiBiConfig(**_SMALL, num_heads=4, num_kv_heads=2, qk_norm=True),
}
RULES: Mapping[str, Any] = {"whole keys": {"kv_heads": None, "vocab": None}}
RECIPE = Recipe(
    steps=20,
    batch_size=8,
    accumulation_steps=2,
    learning_rate=3e-3,
    warmup_steps=3,
    epsilon=1e-3,
    max_grad_norm=0.5,
    recompute=True,
)


def run(task: Callable[..., None], count: int, *arguments: Any, **options: Any) -> None:
    """Call a function in so many new processes, which are one group.

    This one is none of them: DTensor remembers meshes of groups that were before, by whose names
    torch then finds other groups.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (count, f"{folder}/store", task, arguments, options)
        torch.multiprocessing.spawn(_as_one, given, nprocs=count)


def _as_one(rank: int, *given: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    _joined(rank, *given)
    # Its work is done. While Python shuts down, PyTorch has aborted ("terminate called without an
    # active exception"), rarely and for a reason that is not known.
    os._exit(0)


def _joined(
    rank: int,
    count: int,
    file: str,
    task: Callable[..., None],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    store = dist.FileStore(file, count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        task(*arguments, **options)
    finally:
        dist.destroy_process_group()


def drawn_model(name: str, dtype: torch.dtype = torch.float64) -> ALiBiLM:
    """The same in every process; its biases are not zero."""
    torch.manual_seed(0)
    model = ALiBiLM(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.05 * torch.randn_like(each))
    return model


def batch(seed: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Tokens and targets, of which not every row has as many."""
    drawn = np.random.default_rng(seed).integers(0, 64, (2, rows, 12))
    drawn[1, : rows // 2, :5] = -100
    return dict(zip(("tokens", "targets"), map(torch.from_numpy, drawn), strict=True))


def computed(model: ALiBiLM) -> Results:
    """The next tokens of a decoder, logits, gradients and their norm."""
    whole_batch, found = batch(1), {}
    if model.config.causal:  # first: FSDP keeps what it gathers here, for the gradients too
        made = generate(model, whole_batch["tokens"], 6, return_log_probabilities=True)
        found["tokens"] = made.tokens.numpy()
    options = {"token_type_ids": whole_batch["tokens"] % 2} if model.config.type_vocab_size else {}
    found["logits"] = model(whole_batch["tokens"], **options).detach().numpy()
    total, _ = loss(model, own_part(whole_batch | options, model.mesh))
    total.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    found["loss"] = summed(total.detach(), model.mesh).numpy()
    found["norm"] = total_norm([each for each in gradients.values() if each is not None]).numpy()
    return found | {f"gradient {name}": whole(each).numpy() for name, each in gradients.items()}


def trained(model: ALiBiLM, compute_dtype: str = "float32") -> Results:
    """Losses, norms and weights of twenty steps, and the loss of other batches."""
    trainer = Trainer(model, dataclasses.replace(RECIPE, compute_dtype=compute_dtype))
    steps = [trainer.step(batch(seed)) for seed in range(RECIPE.steps)]
    found = {
        "losses": torch.stack([each.loss for each in steps]).numpy(),
        "norms": torch.stack([each.grad_norm for each in steps]).numpy(),
        "evaluated": np.array(
            [trainer.evaluate(batch(99)), trainer.evaluate(batch(98, rows=3))], np.float64
        ),
    }
    return found | weights(model)


def weights(model: ALiBiLM) -> Results:
    """Every parameter, whole."""
    return {name: whole(each).detach().numpy() for name, each in model.named_parameters()}


def on_a_mesh(
    sizes: Mapping[str, int], folder: Path, names: tuple[str, ...], *, trains: bool = True
) -> None:
    """Write what models compute on a mesh, the same in every process, and how one is trained.

    Args:
        sizes: of the axes.
        folder: for the results, and with a checkpoint of each model.
        names: of the models.
        trains: train one of them as well.
    """
    mesh = device_mesh(sizes)
    results = {}
    for name in names:
        model = parallelize(drawn_model(name), mesh, RULES.get(name))
        results[name] = computed(model)
        _require_the_same(name, results[name])
        model.save_pretrained(folder / f"saved {name}")
        with_gathered(model.state_dict(), partial(_require_whole, name))
        again = ALiBiLM.from_pretrained(folder / f"plain {name}", mesh=mesh, rules=RULES.get(name))
        results[f"opened {name}"] = weights(again)
    if trains:
        results["trained"] = trained(parallelize(drawn_model("gated", torch.float32), mesh))
        _require_the_same("trained", results["trained"])
        model = drawn_model("decoder", torch.float32)
        parallelize(model, mesh, compute_dtype="bfloat16")
        results["rounded"] = trained(model, "bfloat16")
    if dist.get_rank() == 0:
        for name, arrays in results.items():
            np.savez(folder / f"{name}.npz", **arrays)


def _require_whole(name: str, gathered: Tensors) -> None:
    """Read by several threads, as several files are written."""
    exact = drawn_model(name).state_dict()
    with ThreadPoolExecutor(4) as pool:
        for key, found in zip(exact, pool.map(gathered.__getitem__, exact), strict=True):
            assert_bitwise(as_numpy(found), as_numpy(exact[key]), f"{key} gathered")


def _require_the_same(what: str, found: Results) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    for rank, other in enumerate(every):
        for name, array in found.items():
            if not np.array_equal(array, other[name]):
                raise AssertionError(f"{what}: process {rank} has another {name}")
