"""Who writes checkpoints and who reads them: every pair, and which are refused.

Only names, which `python -m benchmarks.render` makes the table of docs/converting.md from;
test_pairs.py writes and reads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Party:
    """A writer or a reader.

    Attributes:
        name: in the tables.
        family: whose models it knows; None is any model of ours.
    """

    name: str
    family: str | None = None


WRITERS = (
    Party("`alibi_torch`'s `save_pretrained`"),
    Party("`alibi_flax`'s `save_pretrained`"),
    Party("`convert` to shards"),
    Party("`convert` to .safetensors"),
    Party("`convert` to .pt"),
    Party("`convert` to .msgpack"),
    Party("`convert` to orbax"),
    Party("safetensors' `save_file`"),
    Party("`torch.save`"),
    Party("flax's `to_bytes`"),
    Party("orbax's `StandardCheckpointer`"),
    Party("transformers' BLOOM", "bloom"),
    Party("transformers' BLOOM, in shards", "bloom"),
    Party("transformers' MPT", "mpt"),
    Party("transformers' Falcon-RW", "falcon"),
    Party("jaketae/alibi's state dict", "jaketae"),
)
READERS = (
    Party("`alibi_torch`"),
    Party("`alibi_flax`"),
    Party("`alibi_spec`"),
    Party("folder"),
    Party("shards"),
    Party(".safetensors"),
    Party(".pt"),
    Party(".msgpack"),
    Party("orbax"),
    Party("BLOOM", "bloom"),
    Party("MPT", "mpt"),
    Party("Falcon-RW", "falcon"),
    Party("jaketae", "jaketae"),
)
PAIRS = tuple(itertools.product(WRITERS, READERS))


def is_refused(writer: Party, reader: Party) -> bool:
    """Whether one family's models are asked for as another's, which cannot express them."""
    return None not in (writer.family, reader.family) and writer.family != reader.family
