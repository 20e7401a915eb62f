"""What the words of a command line may be."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def count(text: str) -> int:
    """A number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def path(text: str) -> Path:
    """A path; a `~` that the shell left there, as in `--output=~/x`, is the user's home."""
    return Path(os.path.expanduser(text))
