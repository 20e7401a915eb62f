"""Foreign checkpoint families: how each is recognised, configured and renamed. One file each."""

from alibi_convert.families import jaketae
from alibi_convert.families.family import Family

FAMILIES = (jaketae.FAMILY,)

__all__ = ["FAMILIES", "Family"]
