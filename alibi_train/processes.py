"""The processes of one run, which torchrun starts and ends together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

_WAIT = timedelta(minutes=10)  # for another process: longer than a checkpoint takes to write


@contextmanager
def processes(sizes: Mapping[str, int]) -> Iterator[Any]:
    """The mesh of the processes that torchrun has started, in each of them.

    Args:
        sizes: by axis, as for `alibi_torch.sharding.device_mesh`.

    Raises:
        ValueError: torchrun has not started this process, or another number of them.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "a mesh needs processes, and this is the only one; start them by torchrun "
            "--nproc-per-node=NUMBER -m alibi_cli train ..."
        )
    import torch
    import torch.distributed as dist

    from alibi_torch.sharding import device_mesh

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=_WAIT)
    yield device_mesh(sizes)
    # Not after an error: the others may be waiting, and torchrun ends them.
    dist.destroy_process_group()


def is_first(mesh: Any) -> bool:
    """Whether this is the process that writes: the only one, or the first of a mesh."""
    return mesh is None or mesh.get_rank() == 0


@contextmanager
def explaining_loss(mesh: Any) -> Iterator[None]:
    """Say what it means that another process of a mesh does not answer.

    Raises:
        ConnectionError: instead of torch's own error.
    """
    if mesh is None:
        yield
        return
    from torch.distributed import DistError

    try:
        yield
    except (DistError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, DistError) or "gloo" in text or "Connection" in text:
            raise ConnectionError(
                "another process of the run has ended or does not answer; start all of them again "
                f"to go on from the newest checkpoint ({text.splitlines()[0]})"
            ) from error
        raise
