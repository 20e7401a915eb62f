"""Foreign checkpoint families: how each is recognised, configured and renamed. One file each."""

from alibi_convert.families import (
    baichuan,
    bloom,
    btlm,
    fairseq,
    falcon,
    jaketae,
    jina,
    mosaicbert,
    mpt,
)
from alibi_convert.families.family import (
    Derived,
    Family,
    Fold,
    Source,
    export_tensors,
    import_tensors,
    settle_ties,
)

FAMILIES = (
    jaketae.FAMILY,
    bloom.FAMILY,
    mpt.FAMILY,
    falcon.FAMILY,
    btlm.FAMILY,
    baichuan.FAMILY,
    mosaicbert.FAMILY,
    *jina.FAMILIES,
    *fairseq.FAMILIES,
)

__all__ = [
    "FAMILIES",
    "Derived",
    "Family",
    "Fold",
    "Source",
    "export_tensors",
    "import_tensors",
    "settle_ties",
]
