"""What holds for every test."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

from moebius_edge.runtimes import auto

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C would
# then wait for an interrupt that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tables are not cut to the width of whatever terminal, or none, the tests are started in.
os.environ["COLUMNS"] = "200"

# What is installed beside the program must not decide what its tests see: those of OpenVINO name it.
auto.CANDIDATES = tuple(
    replace(candidate, problem=lambda bundle: "left out of the tests") if candidate.runtime == "openvino" else candidate
    for candidate in auto.CANDIDATES
)
