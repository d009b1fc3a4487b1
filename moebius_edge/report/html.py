"""``report.html``: one file that needs no network and no server, made from the results document alone.

Everything in the document is hostile until escaped: Jinja2 escapes names and reasons, the JSON cannot close its
element, and the Content-Security-Policy lets in this page's own script and style, by hash, and nothing else.
It takes the packages of the extra ``report``, which a device need not have. The folder's pictures are read one input at
a time, so memory stays that of one input; what cannot be read becomes a sentence in its place.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import MoebiusError
from ..imaging.masks import bounds
from ..imaging.pictures import read_picture
from ..system.files import atomic_write, safe_join
from . import charts, figures, recommend, tables
from .figures import AGAINST, Configuration, Group, Results, at, latency_ms
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
_PARTS = Path(__file__).parent / "page"


def how_to_render(folder: Path) -> str:
    """What is missing here for a page, and how it is made elsewhere; empty where nothing is."""
    absent = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return (
        f"no report.html, for {absent[0]} is not installed: on a workstation run `pip install 'moebius-edge[report]'` "
        f"and, with a copy of {folder}, `moebius-edge report merge {folder} --output DIR`"
    )


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.html`` with the pictures below ``folder``, scaled down, in it."""
    path = folder / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(render(results, folder), encoding="utf-8", newline="\n")
    return path


def render(results: Results, folder: Path) -> str:
    """The page as text; pure but for the pictures, which are read from ``folder``."""
    import jinja2

    style, script, template = (
        (_PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "report.html.j2")
    )
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {"table": tables.table, "column": tables.Column, "at": at}
    parts = {"policy": policy, "style": style, "script": script, "results_json": script_json(results)}
    return environment.from_string(template).render(**parts, **_content(figures.clean(results), folder))


def script_json(document: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element or start another."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))  # in ASCII, so that no surrogate is left
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _content(results: Results, folder: Path) -> dict[str, Any]:
    """What the template shows, all of it but the page's own parts."""
    numbers, rows = figures.row_numbers(results), tables.in_order(results)
    labels = {c["id"]: figures.full_label(results, c) for c in rows}
    by_group = figures.groups(results, figures.against_of(results))
    numbered = {f"{numbers[c['id']]}: {labels[c['id']]}": c for c in rows}
    return {
        "title": tables.TITLE,
        "results": results,
        "summary": tables.summary(results),
        "conditions": tables.conditions(results),
        "basis": recommend.basis(results),
        "note": recommend.ranking_note(results),
        "recommendations": recommend.recommend(results),
        "rows": rows,
        "numbers": numbers,
        "labels": labels,
        "settings": list(tables.SETTINGS),
        "comparison": tables.COMPARISON,
        "group_titles": [figures.group_title(results, group) for group in by_group],
        "absences": tables.absences(results, numbers),
        "frontiers": _frontiers(results, numbers),
        "stages": _stages(numbered),
        "resources": _resources(numbered),
        "inputs": list(shown_inputs(results, folder)) if any(c["pictures"] for c in rows) else [],
        "views": VIEWS,
    }


def _labels(configurations: list[Configuration], numbers: Mapping[str, int]) -> list[str]:
    """A label for each with its row's number, without the comma-separated parts that all of them share."""
    parts = [c["label"].split(", ") for c in configurations]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    texts = [", ".join(p for p in own if p not in shared) for own in parts]
    return [f"{numbers[c['id']]}: {text or c['label']}" for c, text in zip(configurations, texts, strict=True)]


def _frontiers(results: Results, numbers: Mapping[str, int]) -> list[charts.Chart]:
    """A plot for each group of at least two; baselines stand beside what samples on their machine."""
    against = figures.against_of(results)
    if against is None:
        return []
    by_group, drawn = figures.groups(results, against), []
    chosen = {each.chosen["id"] for each in recommend.recommend(results) if each.chosen}
    for group, members in by_group.items():
        ranked, beside = (
            [c for c in some if c["id"] not in figures.unranked(some, against)]
            for some in (members, by_group.get(Group(group.machine), []))
        )
        if group.start is None or not ranked or len(ranked) + len(beside) < 2:
            continue
        kinds = dict.fromkeys((c["id"] for c in ranked), "dominated")
        kinds |= dict.fromkeys(recommend.frontier_ids(ranked, against), "frontier")
        labels = _labels(ranked, numbers) + [f"{numbers[c['id']]}: {c['label']}" for c in beside]
        points = [
            charts.Point(
                latency_ms(c) or 0.0,
                figures.hole_psnr_db(c, against) or 0.0,
                label,
                kinds.get(c["id"], "baseline"),
                c["id"] in chosen,
            )
            for c, label in zip(ranked + beside, labels, strict=True)
        ]
        y_title = f"hole PSNR against the {AGAINST[against]} (dB)"
        drawn.append(charts.scatter(figures.group_title(results, group), points, y_title))
    return drawn


def _stages(numbered: Mapping[str, Configuration]) -> list[charts.Chart]:
    parts = {label: c["derived"]["stage_ms"] for label, c in numbered.items() if c["derived"]["stage_ms"]}
    return [charts.bars("Mean time of one picture by stage", parts, "ms")] if parts else []


def _resources(numbered: Mapping[str, Configuration]) -> list[charts.Chart]:
    """Memory and energy as bars."""
    memory, energy = {}, {}
    for label, c in numbered.items():
        sizes = {place: at(c, f"memory.peak_{place}_bytes") for place in ("host", "device")}
        memory[label] = {place: size / 1e6 for place, size in sizes.items() if size is not None}
        energy[label] = {"energy": at(c, "energy.joules_per_image") or 0.0}
    drawn = (("Peak memory", memory, "MB"), ("Energy of one picture", energy, "J"))
    shown = [(title, {k: v for k, v in parts.items() if any(v.values())}, unit) for title, parts, unit in drawn]
    return [charts.bars(title, parts, unit) for title, parts, unit in shown if parts]


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
