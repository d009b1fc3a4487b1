"""Small pictures for the page as data URIs: the hole and its surroundings, and differences made visible.

The folder's pictures are read one input at a time, so memory stays that of one input. What cannot be read becomes a
sentence in its place: a report with a picture missing is still a report.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import MoebiusError
from ..imaging.masks import bounds
from ..imaging.pictures import read_picture
from ..system.files import safe_join
from .figures import Configuration, Results, clean, label, reference_of
from .results import shown_stem

AMPLIFICATION = 4  # of differences
BUDGET_BYTES = 5_000_000  # of all thumbnails together, about
_EDGES = (320, 240, 160)  # pixels of a thumbnail's longer side, the largest that fits the budget
_BYTES_PER_PIXEL = 0.35  # of a JPEG of quality 82, generously
_QUALITY = 82
RESULT, TO_TRUTH, TO_REFERENCE = "result", "truth", "reference"


@dataclass(frozen=True)
class Thumbnail:
    """One cell of the grid.

    Attributes:
        caption: what it shows.
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


class Part(NamedTuple):
    """What is cut out of pictures of ``size`` (rows, columns)."""

    size: tuple[int, ...]
    around: tuple[slice, slice]


@dataclass(frozen=True)
class Shown:
    """An input with its cells, all of which show the same part of the picture."""

    name: str
    note: str
    cells: list[Thumbnail]


def shown_inputs(results: Results, folder: Path) -> Iterator[Shown | str]:
    """Each input's pictures; last, where the budget ends before the inputs do, a sentence that says so."""
    cells = 3 + 2 * max(1, len([c for c in results["configurations"] if c["pictures"]]))
    sizes = [(edge, max(1, int(BUDGET_BYTES / (cells * edge * edge * _BYTES_PER_PIXEL)))) for edge in _EDGES]
    inputs = results["inputs"]
    edge, most = next((size for size in sizes if size[1] >= len(inputs)), sizes[-1])
    for entry in inputs[:most]:
        yield _shown(entry, results, folder, edge)
    if len(inputs) > most:
        yield f"The first {most} of {len(inputs)} inputs are shown; all pictures are in the folder pictures/."


def _shown(entry: dict[str, Any], results: Results, folder: Path, edge: int) -> Shown:
    name, stem = clean(entry["name"]), shown_stem(entry["name"])
    image, image_path, image_problem = _read(folder, f"pictures/inputs/{stem}.png")
    mask, mask_path, mask_problem = _read(folder, f"pictures/inputs/{stem}_mask.png")
    truth, truth_path, truth_problem = (
        _read(folder, f"pictures/truth/{stem}.png") if entry["truth"] else (None, None, None)
    )
    part = _part(mask)
    cells = [
        _cell("image", image, image_path, image_problem, part, edge),
        _cell("mask", mask, mask_path, mask_problem, part, edge),
    ]
    if entry["truth"]:
        cells.append(_cell("ground truth", truth, truth_path, truth_problem, part, edge))
    by_id = {c["id"]: c for c in results["configurations"]}
    references: dict[str, np.ndarray | None] = {}
    for configuration in results["configurations"]:
        if (path := configuration["pictures"].get(entry["name"])) is None:
            continue
        result, link, problem = _read(folder, path)
        cell = _cell(label(configuration), result, link, problem, part, edge, configuration)
        reference = reference_of(configuration)
        if reference and reference != configuration["id"] and reference in by_id:
            if reference not in references:
                other = by_id[reference]["pictures"].get(entry["name"])
                references[reference] = _read(folder, other)[0] if other else None
            _add_difference(cell, TO_REFERENCE, result, references[reference], part, edge)
        _add_difference(cell, TO_TRUTH, result, truth, part, edge)
        cells.append(cell)
    note = f"{entry['width']}x{entry['height']} pixels, {100 * entry['hole_share']:.1f} % hole"
    return Shown(name, note, cells)


def _read(folder: Path, path: str) -> tuple[np.ndarray | None, str | None, str | None]:
    """(H, W, 3) uint8, the path within the folder, and why there is none; a path that leaves the folder is refused."""
    try:
        picture = read_picture(safe_join(folder, path))
    except MoebiusError as error:
        return None, None, clean(str(error).replace(f"{folder}/", ""))
    except UnicodeError:
        return None, None, f"{clean(path)} is no name of a file"
    pixels = picture.pixels if picture.bits == 8 else (picture.pixels >> 8).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, path, None


def _part(mask: np.ndarray | None) -> Part | None:
    """The hole with as much again around it; None, everything, where there is no mask or it is empty."""
    if mask is None or (box := bounds(mask[..., 0] > 127)) is None:
        return None
    top, left, bottom, right = box
    rows, columns = (bottom - top) // 2 + 8, (right - left) // 2 + 8
    around = (slice(max(0, top - rows), bottom + rows), slice(max(0, left - columns), right + columns))
    return Part(mask.shape[:2], around)


def _cut(pixels: np.ndarray, part: Part | None) -> np.ndarray:
    """The part, or all of a picture of another size than the mask's."""
    return pixels[part.around] if part is not None and pixels.shape[:2] == part.size else pixels


def _cell(
    caption: str,
    pixels: np.ndarray | None,
    link: str | None,
    problem: str | None,
    part: Part | None,
    edge: int,
    configuration: Configuration | None = None,
) -> Thumbnail:
    views = {} if pixels is None else {RESULT: _data_uri(_cut(pixels, part), edge)}
    return Thumbnail(caption, configuration, views, link, problem)


def _add_difference(
    cell: Thumbnail,
    view: str,
    result: np.ndarray | None,
    other: np.ndarray | None,
    part: Part | None,
    edge: int,
) -> None:
    """The absolute difference, times ``AMPLIFICATION`` and clipped, taken before scaling down."""
    if result is None or other is None or result.shape != other.shape:
        return
    difference = cv2.absdiff(*(np.ascontiguousarray(_cut(pixels, part)) for pixels in (result, other)))
    cell.views[view] = _data_uri(cv2.convertScaleAbs(difference, alpha=AMPLIFICATION), edge)


def _data_uri(pixels: np.ndarray, edge: int) -> str:
    """A JPEG of at most ``edge`` pixels each way; a smaller picture keeps its size."""
    height, width = pixels.shape[:2]
    scale = min(1.0, edge / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise RuntimeError(f"OpenCV could not encode a thumbnail of {size[0]}x{size[1]}")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
