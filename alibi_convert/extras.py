"""Optional packages, asked for by the extra that installs them."""

from __future__ import annotations

import importlib.util


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError, with the command that mends it, unless `module` is installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{purpose} needs {module}, which is not installed; pip install 'alibi-duo[{extra}]'"
        )
