"""Small pictures for the page as data URIs: the hole and its surroundings, and differences made visible.

The folder's pictures are read one input at a time, so memory stays that of one input. What cannot be read becomes a
sentence in its place: a report with a picture missing is still a report.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import MoebiusError
from ..imaging.masks import bounds
from ..imaging.pictures import read_picture
from ..system.files import safe_join
from .figures import Configuration, Results, at
from .inputs import rgb8
from .results import PICTURES_FOLDER, shown_stem

AMPLIFICATION = 4  # of differences
MOST_THUMBNAILS = 400  # in one page; with 240 pixels a side and JPEG's quality of 82 they take about 5 MB
_EDGE, _QUALITY = 240, 82
RESULT, TO_TRUTH, TO_REFERENCE = "result", "truth", "reference"
VIEWS = {
    RESULT: "result",
    TO_TRUTH: f"difference to the ground truth, times {AMPLIFICATION}",
    TO_REFERENCE: f"difference to the float32 reference, times {AMPLIFICATION}",
}


class Thumbnail(NamedTuple):
    """One cell of the grid: the result of a ``configuration``, or one of the input's own pictures.

    ``views`` has a data URI for those of ``VIEWS`` that there are, and ``link`` the path of the whole picture relative
    to the page; ``problem`` says why there is none.
    """

    caption: str
    configuration: Configuration | None
    views: dict[str, str]
    link: str
    problem: str


def shown_inputs(results: Results, folder: Path) -> Iterator[tuple[dict[str, Any], list[Thumbnail]]]:
    """The entries of the first inputs with their thumbnails, as many as a page can hold."""
    each = 3 + 2 * len(results["configurations"])
    for entry in results["inputs"][: max(1, MOST_THUMBNAILS // each)]:
        yield entry, _thumbnails(entry, results, folder)


def _thumbnails(entry: dict[str, Any], results: Results, folder: Path) -> list[Thumbnail]:
    stem = shown_stem(entry["name"])
    paths = {"image": f"inputs/{stem}.png", "mask": f"inputs/{stem}_mask.png"}
    paths |= {"ground truth": f"truth/{stem}.png"} if entry["truth"] else {}
    own = {name: _read(folder, f"{PICTURES_FOLDER}/{path}") for name, path in paths.items()}
    mask, (truth, _) = own["mask"][0], own.get("ground truth", (None, ""))

    def thumbnail(
        caption: str, path: str, picture: tuple[np.ndarray | None, str], of: Configuration | None, **others: Any
    ) -> Thumbnail:
        pixels, problem = picture
        views = {} if pixels is None else {RESULT: _data_uri(_cut(pixels, mask))}
        for view, other in others.items():
            if pixels is not None and other is not None and pixels.shape == other.shape:
                # The absolute difference, amplified and clipped, is taken before scaling down.
                difference = cv2.absdiff(*(np.ascontiguousarray(_cut(each, mask)) for each in (pixels, other)))
                views[view] = _data_uri(cv2.convertScaleAbs(difference, alpha=AMPLIFICATION))
        return Thumbnail(caption, of, views, path if views else "", problem)

    cells = [thumbnail(name, f"{PICTURES_FOLDER}/{paths[name]}", picture, None) for name, picture in own.items()]
    rows = {c["id"]: c for c in results["configurations"] if entry["name"] in c["pictures"]}
    references: dict[str, np.ndarray | None] = {}
    for name, row in rows.items():
        reference = at(row, "accuracy.against_reference.reference")
        if reference in rows and reference != name and reference not in references:
            references[reference] = _read(folder, rows[reference]["pictures"][entry["name"]])[0]
        others = {TO_TRUTH: truth, TO_REFERENCE: None if reference == name else references.get(reference)}
        path = row["pictures"][entry["name"]]
        cells.append(thumbnail(row["label"], path, _read(folder, path), row, **others))
    return cells


def _read(folder: Path, path: str) -> tuple[np.ndarray | None, str]:
    """(H, W, 3) uint8, or why there is none; a path that leaves the folder is refused."""
    try:
        return rgb8(read_picture(safe_join(folder, path))), ""
    except MoebiusError as error:
        return None, str(error).replace(f"{folder}/", "")


def _cut(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The hole with as much again around it; everything where the mask is absent, empty or of another size."""
    if mask is None or mask.shape != pixels.shape or (box := bounds(mask[..., 0] > 127)) is None:
        return pixels
    top, left, bottom, right = box
    rows, columns = (bottom - top) // 2 + 8, (right - left) // 2 + 8
    return pixels[max(0, top - rows) : bottom + rows, max(0, left - columns) : right + columns]


def _data_uri(pixels: np.ndarray) -> str:
    """A JPEG of at most ``_EDGE`` pixels each way; a smaller picture keeps its size."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _EDGE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
