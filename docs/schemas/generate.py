"""Write the JSON Schemas of ``bundle.json``, ``engine.json`` and a training's recipe beside this file.

A folder that is named takes their place:

    python docs/schemas/generate.py [FOLDER]

They are made from the types that the program itself checks with. Rules between fields, such as that the latent size is
an eighth of the resolution, and that no file leaves its folder, are the program's alone.
"""

import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

from moebius_edge.bundle.manifest import BundleDocument
from moebius_edge.runtimes.engine_files import Engine
from moebius_edge.training.recipe import Recipe


def main(folder: Path) -> None:
    engine = TypeAdapter(Engine).json_schema()
    del engine["properties"]["path"]  # where it lies is not in the file
    engine["required"].remove("path")
    recipe = TypeAdapter(Recipe).json_schema()
    for name, schema in (("bundle", TypeAdapter(BundleDocument).json_schema()), ("engine", engine), ("recipe", recipe)):
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"{name}.json"}
        (folder / f"{name}.schema.json").write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
