"""Small pictures for the page as data URIs: the hole and its surroundings, and differences made visible.

The folder's pictures are read one input at a time, so memory stays that of one input. What cannot be read becomes a
sentence in its place: a report with a picture missing is still a report.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_EDGE = 240
_QUALITY = 82
RESULT, TO_TRUTH, TO_REFERENCE = "result", "truth", "reference"


@dataclass(frozen=True)
class Thumbnail:
    """One cell of the grid.

    Attributes:
        caption: what it shows, for one of the input's own pictures.
        configuration: whose result it is; None for the input's own pictures.
        views: data URI by ``RESULT``, ``TO_TRUTH``, ``TO_REFERENCE``; those that there are.
        link: path of the whole picture relative to the page.
        problem: why there is no picture.
    """

    caption: str
    configuration: Configuration | None = None
    views: dict[str, str] = field(default_factory=dict)
    link: str | None = None
    problem: str | None = None


def shown_inputs(results: Results, folder: Path) -> Iterator[tuple[dict[str, Any], list[Thumbnail]]]:
    """The entries of the first inputs with their thumbnails, as many as a page can hold."""
    each = 3 + 2 * len(results["configurations"])
    for entry in results["inputs"][: max(1, MOST_THUMBNAILS // each)]:
        yield entry, _thumbnails(entry, results, folder)


def _thumbnails(entry: dict[str, Any], results: Results, folder: Path) -> list[Thumbnail]:
    stem = shown_stem(entry["name"])
    own = {"image": f"inputs/{stem}.png", "mask": f"inputs/{stem}_mask.png"}
    own |= {"ground truth": f"truth/{stem}.png"} if entry["truth"] else {}
    pictures = {name: _read(folder, f"{PICTURES_FOLDER}/{path}") for name, path in own.items()}
    mask, truth = pictures["mask"][0], pictures.get("ground truth", (None, None))[0]
    cells = [_thumbnail(name, *picture, f"{PICTURES_FOLDER}/{own[name]}", mask) for name, picture in pictures.items()]
    paths = {c["id"]: c["pictures"][entry["name"]] for c in results["configurations"] if entry["name"] in c["pictures"]}
    references: dict[str, np.ndarray | None] = {}
    for configuration in results["configurations"]:
        if configuration["id"] not in paths:
            continue
        pixels, problem = _read(folder, paths[configuration["id"]])
        cell = _thumbnail("", pixels, problem, paths[configuration["id"]], mask, configuration)
        reference = at(configuration, "accuracy.against_reference.reference")
        if reference != configuration["id"] and reference in paths:
            if reference not in references:
                references[reference] = _read(folder, paths[reference])[0]
            _add_difference(cell, TO_REFERENCE, pixels, references[reference], mask)
        _add_difference(cell, TO_TRUTH, pixels, truth, mask)
        cells.append(cell)
    return cells


def _read(folder: Path, path: str) -> tuple[np.ndarray | None, str | None]:
    """(H, W, 3) uint8, or why there is none; a path that leaves the folder is refused."""
    try:
        return rgb8(read_picture(safe_join(folder, path))), None
    except MoebiusError as error:
        return None, str(error).replace(f"{folder}/", "")


def _thumbnail(
    caption: str,
    pixels: np.ndarray | None,
    problem: str | None,
    link: str,
    mask: np.ndarray | None,
    configuration: Configuration | None = None,
) -> Thumbnail:
    if pixels is None:
        return Thumbnail(caption, configuration, problem=problem)
    return Thumbnail(caption, configuration, {RESULT: _data_uri(_cut(pixels, mask))}, link)


def _cut(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The hole with as much again around it; everything where the mask is absent, empty or of another size."""
    if mask is None or mask.shape != pixels.shape or (box := bounds(mask[..., 0] > 127)) is None:
        return pixels
    top, left, bottom, right = box
    rows, columns = (bottom - top) // 2 + 8, (right - left) // 2 + 8
    return pixels[max(0, top - rows) : bottom + rows, max(0, left - columns) : right + columns]


def _add_difference(
    cell: Thumbnail, view: str, result: np.ndarray | None, other: np.ndarray | None, mask: np.ndarray | None
) -> None:
    """The absolute difference, times ``AMPLIFICATION`` and clipped, taken before scaling down."""
    if result is None or other is None or result.shape != other.shape:
        return
    difference = cv2.absdiff(*(np.ascontiguousarray(_cut(pixels, mask)) for pixels in (result, other)))
    cell.views[view] = _data_uri(cv2.convertScaleAbs(difference, alpha=AMPLIFICATION))


def _data_uri(pixels: np.ndarray) -> str:
    """A JPEG of at most ``_EDGE`` pixels each way; a smaller picture keeps its size."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _EDGE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
