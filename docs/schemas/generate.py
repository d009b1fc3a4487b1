"""Write the JSON Schemas of the program's documents beside this file, or to the folder that is named.

    python docs/schemas/generate.py [FOLDER]

They are made from the types that the program itself checks with. Rules between fields, such as that the latent size is
an eighth of the resolution, and that no file leaves its folder, are the program's alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moebius_edge.bundle.manifest import BundleDocument
from moebius_edge.calibration.blocks import Recipe as Int8Recipe
from moebius_edge.report.results import ResultsDocument
from moebius_edge.runtimes.engine_files import Engine
from moebius_edge.training.recipe import Recipe

# The name of a document -> its type, and the fields that are not in the file. A new document is one line here.
DOCUMENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bundle": (BundleDocument, ()),
    "engine": (Engine, ("path",)),
    "results": (ResultsDocument, ()),
    "int8-recipe": (Int8Recipe, ()),
    "recipe": (Recipe, ()),
}


def main(folder: Path) -> None:
    for name, (kind, absent) in DOCUMENTS.items():
        schema = TypeAdapter(kind).json_schema()
        for field in absent:
            del schema["properties"][field]
            schema["required"].remove(field)
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"{name}.json"}
        (folder / f"{name}.schema.json").write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
