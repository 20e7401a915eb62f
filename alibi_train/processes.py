"""The mesh of devices of one run, and the processes that drive them together.

PyTorch has a process for each device, which torchrun starts and ends. In JAX one process drives all
devices of a host, and several of them find one another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

_WAIT = timedelta(minutes=10)  # for another process: longer than a checkpoint takes to write
AUTO = "auto"  # the group of processes that a cluster tells of
_LOST = ("gloo", "connection", "heartbeat", "coordination service", "nccl")  # in errors


@contextmanager
def processes(
    sizes: Mapping[str, int], backend: str = "torch", group: str | None = None
) -> Iterator[Any]:
    """The mesh of all devices, in each of the processes that drive them.

    Args:
        sizes: by axis, as for `device_mesh` of the backend.
        backend: "torch", in processes of torchrun, or "flax".
        group: of JAX: None for the devices of this process alone; "auto" for processes that Slurm,
            Open MPI, Kubernetes or Cloud TPU have started, of which JAX reads what it must know;
            or "ADDRESS:PORT,COUNT,NUMBER": where the first process listens, how many there are,
            and which one this is, from 0.

    Raises:
        ValueError: sizes that do not fit the devices, an unknown axis; torchrun has not started
            this process, or JAX finds no cluster; or a group of PyTorch.
        ConnectionError: the processes of JAX do not find one another.
    """
    if backend == "flax":
        if group is not None:
            _join(group)
        from alibi_flax.sharding import device_mesh

        yield device_mesh(sizes)
        if group is not None:
            import jax

            jax.distributed.shutdown()  # waits for the others; not after an error
        return
    if group is not None:
        raise ValueError("torchrun tells PyTorch of its processes; leave out the group")
    with _processes_of_torchrun(sizes) as mesh:
        yield mesh


def _join(group: str) -> None:
    import jax

    given: dict[str, Any] = {}
    if group != AUTO:
        try:
            address, count, number = group.split(",")
            given = {"num_processes": int(count), "process_id": int(number)}
        except ValueError:
            raise ValueError(
                f"{group!r} is no group of processes; expected {AUTO!r} or "
                "ADDRESS:PORT,COUNT,NUMBER, as in 10.0.0.1:1234,2,0"
            ) from None
        given["coordinator_address"] = address
    try:
        jax.distributed.initialize(**given)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"JAX cannot tell the processes of {group!r} ({error}); on hosts that no cluster knows "
            "pass ADDRESS:PORT,COUNT,NUMBER, with a NUMBER of its own from 0 to COUNT - 1"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(f"the processes do not find one another: {error}") from error


@contextmanager
def _processes_of_torchrun(sizes: Mapping[str, int]) -> Iterator[Any]:
    if "RANK" not in os.environ:
        raise ValueError(
            "a mesh needs processes, and this is the only one; start them by torchrun "
            "--nproc-per-node=NUMBER -m alibi_cli ..."
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
    if mesh is None:
        return True
    if hasattr(mesh, "get_rank"):  # of torch
        return mesh.get_rank() == 0
    import jax

    return jax.process_index() == 0


@contextmanager
def explaining_loss(mesh: Any) -> Iterator[None]:
    """Say what it means that another process of a mesh does not answer.

    Raises:
        ConnectionError: instead of the framework's own error.
    """
    try:
        yield
    except RuntimeError as error:  # and what torch and JAX derive from it
        text = str(error)
        torch = sys.modules.get("torch.distributed")
        is_lost = torch is not None and isinstance(error, torch.DistError)
        if mesh is None or not (is_lost or any(word in text.lower() for word in _LOST)):
            raise
        raise ConnectionError(
            "another process of the run has ended or does not answer; start all of them again "
            f"to go on from the newest checkpoint ({text.splitlines()[0]})"
        ) from error
