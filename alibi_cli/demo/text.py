"""The text of the demo: bytes to learn from, and bytes that are held out."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BYTES = 256
LENGTHS = (1, 2, 4, 8)  # times the training length
HELD_OUT = 0.1
EVALUATED = 8  # longest sequences per evaluation


@dataclass(frozen=True)
class Text:
    """A text as bytes.

    Attributes:
        source: its description.
        training: bytes to learn from.
        held_out: bytes that no model learns from.
        lengths: of the sequences that are measured.
    """

    source: str
    training: np.ndarray
    held_out: np.ndarray
    lengths: list[int]

    @property
    def evaluated(self) -> np.ndarray:
        """The bytes of every measurement: whole sequences of every length, and a last target."""
        return self.held_out[: EVALUATED * self.lengths[-1] + 1]


def read_text(path: Path | None, length: int) -> Text:
    """A file, or by default Python's own library: its modules, without its test suite.

    Raises:
        ValueError: it is too short.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(library.glob("*.py"))
        content, source = b"".join(each.read_bytes() for each in files), "Python's standard library"
    else:
        content, source = path.read_bytes(), str(path)
    tokens = np.frombuffer(content, dtype=np.uint8).astype(np.int64)
    held_out_size = int(len(tokens) * HELD_OUT)
    lengths = [length * factor for factor in LENGTHS]
    needed = EVALUATED * lengths[-1] + 1
    if held_out_size < needed:
        raise ValueError(
            f"{source} has {len(tokens):,} bytes; at least {int(needed / HELD_OUT):,} are needed "
            f"for --length {length}; choose a longer text or a smaller --length"
        )
    return Text(source, tokens[:-held_out_size], tokens[-held_out_size:], lengths)
