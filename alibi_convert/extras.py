"""Optional packages, asked for by the extra that installs them."""

from __future__ import annotations

import importlib.util


def is_installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError, with the command that mends it, unless `module` is installed."""
    if not is_installed(module):
        raise ValueError(
            f"{purpose} needs {module}, which is not installed; pip install 'alibi-duo[{extra}]'"
        )
