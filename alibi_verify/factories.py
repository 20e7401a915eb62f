"""Objects of the caller's own code that a command line names as `module:factory`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any


def made_by(name: str, what: str) -> Any:
    """What the function "module:factory" returns; modules of the current folder are found.

    Args:
        what: it makes, for messages.

    Raises:
        ValueError: the name has another form, or there is no such module or function, or it fails.
    """
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{name!r} names no {what}; expected module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{module_name} cannot be imported from {os.getcwd()}: {error}") from error
    except Exception as error:  # importing runs code that is not ours
        raise ValueError(f"{module_name} cannot be imported: {told(error)}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no factory {factory_name}; expected a function")
    try:
        return factory()
    except Exception as error:
        raise ValueError(f"{name} gives no {what}: {told(error)}") from error


def told(error: Exception) -> str:
    """An error of foreign code, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
