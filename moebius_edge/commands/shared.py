"""Options that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated

from typer import Option

AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
CacheInterval = Annotated[int | None, Option(min=1, metavar="N", help="Compute deep features in every Nth call alone.")]
Force = Annotated[bool, Option("--force", help="Replace what is there already.")]
Guidance = Annotated[float | None, Option(min=0.0, metavar="X", help="1 halves the time; default the model's.")]
MaskFrom = Annotated[str | None, Option(metavar="alpha|luma|red|green|blue|index:N", help="What marks the hole.")]
Seed = Annotated[int, Option(min=0, metavar="N", help="The same seed gives the same noise.")]
