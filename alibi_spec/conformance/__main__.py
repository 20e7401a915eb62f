"""`python -m alibi_spec.conformance [FOLDER]`: write all cases, from the reference alone."""

import sys
from pathlib import Path

from alibi_spec.conformance.cases import all_cases
from alibi_spec.conformance.files import DATA, write_cases

if __name__ == "__main__":
    write_cases(all_cases(), Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
