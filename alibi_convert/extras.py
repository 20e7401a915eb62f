"""Optional packages, asked for by the extra that installs them."""

from __future__ import annotations

import importlib.util


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError, with the command that mends it, unless `module` is installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        found = False
    if not found:
        raise ValueError(
            f"{purpose} needs {module}, which is not installed; pip install 'alibi-duo[{extra}]'"
        )
