"""`python -m alibi_cli`: the `alibi` command where its script is not on the path."""

import sys

from alibi_cli.main import main

sys.exit(main())
