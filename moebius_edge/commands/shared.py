"""Options that several commands have, each written once."""

from __future__ import annotations

import os
from typing import Annotated

from typer import Option

from ..options import VERBOSE


def _show_logs(asked: bool) -> None:
    if asked:
        os.environ[VERBOSE] = "1"


AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
CacheInterval = Annotated[int | None, Option(min=1, metavar="N", help="Compute deep features in every Nth call alone.")]
Force = Annotated[bool, Option("--force", help="Replace what is there already.")]
Guidance = Annotated[
    float | None, Option(min=0.0, metavar="X", help="Guidance scale; 1 halves the time; default the model's.")
]
MaskFrom = Annotated[
    str | None, Option(metavar="alpha|luma|red|green|blue|index:N", help="What of the mask marks the hole.")
]
Seed = Annotated[int, Option(min=0, metavar="N", help="The same seed gives the same noise.")]
Verbose = Annotated[
    bool,
    Option("--verbose", expose_value=False, callback=_show_logs, help="Show what the runtimes log, on standard error."),
]
