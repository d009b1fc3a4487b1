"""``python -m moebius_edge``: the command line, where the script is not on the path."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
