"""Adapters that peft trained on a family's model: what their folder says, and merging them.

A merged tensor is W + scaling · B A. The sum is taken in float64 and rounded once.
"""

from alibi_convert.adapters.folder import Adapter, open_adapter
from alibi_convert.adapters.merging import Merged, merge

__all__ = ["Adapter", "Merged", "merge", "open_adapter"]
