"""How the tests compile JAX programs: into a folder that several processes share, and quickly."""

from __future__ import annotations

import os
from pathlib import Path

ONE_THREAD = " --xla_cpu_multi_thread_eigen=false"
QUICKLY_COMPILED = " --xla_cpu_use_fusion_emitters=false"


def shared_by_environment(folder: Path | str, is_quick: bool) -> dict[str, str | int | bool]:
    """Let processes that are started from now on find what others have compiled.

    Most of the time of the tests is compilation, and most programs are needed by several modules in
    several processes: workers, and what tests start. These find the folder in their environment.
    Quick compilation takes a third of the time: LLVM does not optimise, and loops are not emitted
    through MLIR. XLA's own passes stay.

    Returns:
        the options of JAX in the environment, for a process that has imported it already.
    """
    options: dict[str, str | int | bool] = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": is_quick,
    }
    os.environ.update({option.upper(): str(value) for option, value in options.items()})
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    flags = ONE_THREAD + QUICKLY_COMPILED * is_quick
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    return options
