"""`python -m alibi_cli`: the `alibi` command by its module, as torchrun starts it."""

import os
import sys

from alibi_cli.main import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # All is written. While Python shuts down, threads of PyTorch's process groups have aborted the
    # process, and torchrun would call a finished run a failed one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
