"""Print the sources and licences of a collection of photographs as Markdown, for the model's documentation.

    python -m examples.train_tiny.credits PHOTOS/PHOTOS.tsv

The table has tabs between its columns file, title, author, licence and source; a source is a repository or package,
then a colon and the path in it. The photographs in the folder held-out, which no model is trained on, come last.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

HELD_OUT = "held-out/"


def credits_table(table: Path) -> str:
    """The titles of each author, licence and source together in one row, training photographs first."""
    with open(table, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    parts = []
    for held_out, heading in ((False, "photographs to train on"), (True, "never trained on")):
        titles: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        chosen = [row for row in rows if row["file"].startswith(HELD_OUT) == held_out]
        for row in chosen:
            source = row["source"].partition(":")[0]
            titles[source, row["author"].replace('\\"', '"'), row["licence"]].append(row["title"])
        lines = [f"| {len(chosen)} {heading} | author | licence | from |", "| --- | --- | --- | --- |"]
        for (source, author, licence), names in sorted(titles.items()):
            cells = (", ".join(names), author, licence, source)
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(credits_table(Path(sys.argv[1])))
