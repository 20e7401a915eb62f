"""Foreign checkpoint families: how each is recognised, configured and renamed. One file each."""

from alibi_convert.families import (
    baichuan,
    bloom,
    btlm,
    fairseq,
    falcon,
    gguf,
    jaketae,
    jina,
    mosaicbert,
    mpt,
)
from alibi_convert.families.family import (
    Derived,
    Family,
    Fold,
    Peer,
    Source,
    export_tensors,
    import_tensors,
    same_tensor,
    settle_ties,
    tied_head,
)

FAMILIES = (
    jaketae.FAMILY,
    bloom.FAMILY,
    mpt.FAMILY,
    falcon.FAMILY,
    *btlm.FAMILIES,
    baichuan.FAMILY,
    mosaicbert.FAMILY,
    *jina.FAMILIES,
    *fairseq.FAMILIES,
    *gguf.FAMILIES,
)


def family_named(name: str) -> Family | None:
    """The family of a checkpoint; None for ours."""
    return next((family for family in FAMILIES if family.name == name), None)


__all__ = [
    "FAMILIES",
    "Derived",
    "Family",
    "Fold",
    "Peer",
    "Source",
    "export_tensors",
    "family_named",
    "import_tensors",
    "same_tensor",
    "settle_ties",
    "tied_head",
]
