"""Positions of a model divided over devices: each process computes a run of them (SPEC.md §19).

A call takes and returns whole sequences. Between, tokens and masks are those of a process's own
positions; only attention reads others, by `kernels.neighbours`. A call with a cache is not divided.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from alibi_spec.checks import check_mask
from alibi_spec.sharding import batch_axes


@dataclass(frozen=True)
class Positions:
    """Which positions of every sequence a process computes: one of several runs of equal length.

    Attributes:
        mesh: of the processes that share the sequences, in the order of their positions.
        number: of this process's run.
        count: of the runs.
    """

    mesh: Any
    number: int
    count: int

    @classmethod
    def of(cls, mesh: Any) -> Self | None:
        """Those of a model's mesh; None where positions are not divided."""
        if mesh is None or mesh["sequence"].size() == 1:
            return None
        along = mesh["sequence"]
        return cls(along, along.get_local_rank(), along.size())

    def own(self, x: Shaped[Tensor, "batch seq *width"]) -> Shaped[Tensor, "batch own *width"]:
        """This process's positions of all.

        Raises:
            ValueError: the devices do not divide them.
        """
        batch_axes(x.shape[:2], {"sequence": self.count})
        length = x.shape[1] // self.count
        return x[:, self.number * length : (self.number + 1) * length]

    def gathered(self, x: Float[Tensor, "batch own width"]) -> Float[Tensor, "batch seq width"]:
        """All positions, of which each process has its own.

        Gradients are taken to be the same in all processes, and each keeps its part of them.
        """
        from torch.distributed.tensor import DTensor, Shard

        divided = DTensor.from_local(x.contiguous(), self.mesh, (Shard(1),), run_check=False)
        return divided.full_tensor()


def divide_positions(model: nn.Module, transformer: Any, positions: Positions) -> None:
    """Let a model compute its own positions, between whole inputs and whole results."""
    names = inspect.signature(model.forward)

    def enter(module: Any, args: Any, options: Any) -> tuple[Any, Any]:  # noqa: ARG001
        given = names.bind(*args, **options).arguments
        first = next(iter(given.values()))
        if given.get("cache") is not None or not isinstance(first, Tensor) or first.ndim < 2:
            return args, options
        for name in ("attention_mask", "segment_ids"):
            mask = given.get(name)
            if isinstance(mask, Tensor):
                check_mask(name, mask.shape, not mask.is_floating_point(), *first.shape[:2])
        own = {name: positions.own(x) if isinstance(x, Tensor) else x for name, x in given.items()}
        return (own.pop(next(iter(own))),), own

    def leave(module: Any, args: Any, options: Any, output: Any) -> Any:  # noqa: ARG001
        if options.get("cache") is not None or not module.gathers_positions:
            return output
        kept = options.get("logits_to_keep")
        found = positions.gathered(output)
        return found if kept is None else found[:, -kept:]  # of each process so many

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, with_kwargs=True)
    transformer.positions = positions
    for layer in transformer.layers:
        layer.attn.positions = positions
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                of_positions = _DropoutOfPositions(child.p, positions)
                setattr(module, name, of_positions.train(child.training))


class _DropoutOfPositions(nn.Dropout):
    """Drops what one device would: every process draws for all positions, and keeps its own."""

    def __init__(self, rate: float, positions: Positions) -> None:
        super().__init__(rate)
        self._positions = positions

    def forward(self, input: Float[Tensor, "batch own width"]) -> Float[Tensor, "batch own width"]:
        batch, length, width = input.shape
        if not self.training or length == 0 or self.p == 0:
            return input
        every = input.new_ones((batch, length * self._positions.count, width))
        # A copy, so that what autograd keeps is this process's part alone.
        return input * self._positions.own(F.dropout(every, self.p)).clone()


@contextmanager
def of_own_positions(model: Any) -> Iterator[Positions | None]:
    """Let calls of a model return the results of these positions, this process's, only."""
    positions = Positions.of(model.mesh)
    if positions is None:
        yield None
        return
    model.gathers_positions = False
    try:
        yield positions
    finally:
        model.gathers_positions = True


def require_whole_positions(mesh: Any, what: str) -> None:
    """Raise ValueError for a model whose positions are divided."""
    if Positions.of(mesh) is not None:
        raise ValueError(
            f"{what} shows the attention of all positions, which are divided over sequence; divide "
            "the model over other axes, or load it on one device"
        )
