"""A recipe: which blocks of a denoiser are quantised. A JSON file that a person may edit and apply again.

    {"schema_version": 1, "quantised": {"conv_in": false, "down_blocks.0.attentions.0.ff": true, ...},
     "smoothed": ["down_blocks.0.attentions.0.ff"]}

A block that it does not name is not quantised. Before those of ``smoothed``, which may be left out, the activations'
outliers are migrated into the weights (``smoothing``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from ..documents import Flag, Text, read_document
from ..errors import UsageError
from ..system.files import atomic_write

SCHEMA_VERSION = 1


class _Document(TypedDict):
    """The file."""

    schema_version: Literal[1]
    quantised: dict[Text, Flag]
    smoothed: NotRequired[list[Text]]


@dataclass(frozen=True)
class Recipe:
    """``quantised`` maps the names of blocks to whether they are quantised; ``smoothed`` names some of them."""

    quantised: dict[str, bool]
    smoothed: tuple[str, ...] = ()

    @property
    def chosen(self) -> frozenset[str]:
        """The blocks that are quantised."""
        return frozenset(name for name, chosen in self.quantised.items() if chosen)

    def check(self, known: Iterable[str]) -> None:
        """Raise ``UsageError`` where a block is named that the model has not."""
        names = set(known)
        if strange := [name for name in (*self.quantised, *self.smoothed) if name not in names]:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise UsageError(
                f"the recipe names blocks that the model does not have: {', '.join(strange[:3])}{more}: "
                "remove them, or use the recipe with the model it was made for"
            )

    def document(self) -> dict[str, Any]:
        """The recipe as plain JSON, without its version."""
        return {"quantised": self.quantised, "smoothed": list(self.smoothed)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to the file ``path``, whole or not at all."""
        content = {"schema_version": SCHEMA_VERSION, **self.document()}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in the file ``path``.

        Raises:
            MachineError: there is no such file, or it cannot be read.
            UsageError: it is not a recipe, or one of another version.
        """
        remedy = "mend it, or let the export write one"
        content = read_document(Path(path), _Document, UsageError, remedy)
        return cls(content["quantised"], tuple(content.get("smoothed", ())))
