"""What holds for every test."""

from __future__ import annotations

import os
import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C would
# then wait for an interrupt that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tables are not cut to the width of whatever terminal, or none, the tests are started in.
os.environ["COLUMNS"] = "200"
