"""How a command ends."""

from __future__ import annotations

import signal

OK, MISMATCH, USAGE, BROKEN = 0, 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
