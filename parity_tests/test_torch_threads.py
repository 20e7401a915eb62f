"""The worker threads of torch's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import alibi_torch
from alibi_convert.tensors import as_numpy
from alibi_torch.kernels.windowed import aten, workers
from parity_tests.compare import assert_bitwise
from parity_tests.torch_calls import (
    draw,
    each_windowed,
    masks_of,
    slopes_of,
    with_gradients,
)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More than one, whatever the machine and however the tests are run."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@each_windowed
def test_bits_do_not_depend_on_threads(implementation: str, dropout: float) -> None:
    """Nor on autocast or inference mode, which are settings of the thread that calls."""
    arrays = draw(700, 700, dtype="float32")
    options = {"implementation": implementation, "dropout": dropout}
    shared = with_gradients(arrays, slopes_of(), **options, **masks_of("mask", 700))
    torch.set_num_threads(1)
    alone = with_gradients(arrays, slopes_of(), **options, **masks_of("mask", 700))
    torch.set_num_threads(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(arrays, slopes_of(), **options, **masks_of("mask", 700))
    for name, array in alone.items():
        assert_bitwise(shared[name], array, name)
        assert_bitwise(cast[name], array, f"{name} under autocast")
    with torch.inference_mode():
        views = {name: each.clone() for name, each in arrays.items()}
        options |= {"dropout_rng": torch.Generator().manual_seed(3), **masks_of("mask", 700)}
        found = alibi_torch.attention(**views, slopes=slopes_of(), **options).numpy()
    assert_bitwise(found, alone["attended"], "inference")


@pytest.mark.usefixtures("three_threads")
def test_threads_of_others_keep_their_number() -> None:
    """Workers compute with one thread each, and nobody else does."""
    workers._end()
    seen: list[int] = []

    def record(device: torch.device) -> None:
        team = workers.Team.of(device)
        count = lambda item: (item, torch.get_num_threads())  # noqa: E731
        results = team.lead(lambda: list(team.each(count, range(40))))
        assert [item for item, _ in results] == [item for _, (item, _) in results] == [*range(40)]
        seen.extend(count for _, (_, count) in results)

    record(torch.device("cpu"))
    assert set(seen) == {1}
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert [seen[-1], torch.get_num_threads()] == [3, 3]


@pytest.mark.usefixtures("three_threads")
def test_more_threads_join_the_first() -> None:
    workers._end()
    _, few = workers._pools(2)
    first = set(few.threads)
    _, more = workers._pools(3)
    _, again = workers._pools(2)
    assert more is few is again
    assert first < set(more.threads)
    assert len(more.threads) == 3


@pytest.mark.usefixtures("three_threads")
def test_faults_in_workers_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room for a tile")

    monkeypatch.setattr(aten, "forward", broken)
    with pytest.raises(MemoryError, match="no room for a tile"):
        alibi_torch.attention(**draw(300, 300, dtype="float32"), slopes=slopes_of())


@pytest.mark.usefixtures("three_threads")
def test_many_callers_at_once() -> None:
    """More than there are workers: none waits for another for ever."""
    arrays = draw(300, 300, dtype="float32")
    expected = as_numpy(alibi_torch.attention(**arrays, slopes=slopes_of()))
    with ThreadPoolExecutor(12) as pool:
        calls = [
            pool.submit(alibi_torch.attention, **arrays, slopes=slopes_of()) for _ in range(40)
        ]
        for call in calls:
            assert_bitwise(as_numpy(call.result(timeout=60)), expected, "attended")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes_have_their_own_workers() -> None:
    """As those of a DataLoader: they inherit no thread of their parent."""
    code = """
        import os, torch, alibi_torch
        torch.set_num_threads(2)
        array = torch.ones(1, 2, 300, 8)
        attend = lambda: alibi_torch.attention(
            array, array, array, torch.ones(2), implementation="blockwise"
        )
        before = attend()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attend(), before) else 3)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.parametrize(
    "is_first",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["first call", "later call"],
)
def test_threads_outlive_the_main_one(is_first: bool) -> None:
    """Python ends the pools of its own library when the main thread does."""
    code = f"""
        import threading, torch, alibi_torch
        from alibi_spec.budgets import BUDGETS
        from parity_tests.compare import assert_within
        torch.set_num_threads(2)
        array = torch.randn(1, 2, 300, 8, dtype=torch.float64)

        def attend(implementation):
            leaf = array.clone().requires_grad_()
            options = {{"implementation": implementation}}
            attended = alibi_torch.attention(leaf, leaf, leaf, torch.ones(2), **options)
            return attended, *torch.autograd.grad(attended.square().sum(), leaf)

        def attend_late():
            threading.main_thread().join()
            limit = BUDGETS["float64", "cpu"].gradient
            for ours, dense in zip(attend("aten_flash"), attend("dense"), strict=True):
                assert_within(ours.detach().numpy(), dense.detach().numpy(), limit, "late")
            print("attended")

        if not {is_first}:
            attend("aten_flash")
        threading.Thread(target=attend_late).start()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "attended\n", done.stderr
