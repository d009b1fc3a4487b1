"""The grid of pictures: for each input its image, mask and truth, then every result, or its difference."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from .figures import Results, full_label
from .thumbnails import AMPLIFICATION, RESULT, TO_REFERENCE, TO_TRUTH, Thumbnail, shown_inputs

_NAMES = {
    RESULT: "result",
    TO_TRUTH: f"difference to the ground truth, times {AMPLIFICATION}",
    TO_REFERENCE: f"difference to the float32 reference, times {AMPLIFICATION}",
}
_NO_VIEW = {
    TO_TRUTH: "no ground truth of this size",
    TO_REFERENCE: "no reference picture of these settings",
}


def gallery(results: Results, folder: Path, numbers: Mapping[str, int]) -> str:
    """The section's content; nothing where there are no pictures."""
    if not any(c["pictures"] for c in results["configurations"]):
        return ""
    parts, views = [], {RESULT}
    for shown in shown_inputs(results, folder):
        if isinstance(shown, str):
            parts.append(f'<p class="note">{escape(shown)}</p>')
            continue
        for cell in shown.cells:
            views |= cell.views.keys()
        cells = "".join(_cell(cell, shown.name, results, numbers) for cell in shown.cells)
        parts.append(
            f'<h3>{escape(shown.name)}</h3><p class="note">{escape(shown.note)}</p><div class="pictures">{cells}</div>'
        )
    choices = "".join(
        f'<label><input type="radio" name="view" value="{view}"{" checked" if view == RESULT else ""}> {name}</label>'
        for view, name in _NAMES.items()
        if view in views
    )
    controls = f'<div class="controls" hidden><fieldset><legend>Show</legend>{choices}</fieldset></div>'
    intro = (
        '<p class="note">The hole and its surroundings, scaled down; a click opens the whole picture where the folder '
        "pictures/ lies beside this file.</p>"
    )
    return f'{intro}{controls}<div id="grid" data-view="{RESULT}">{"".join(parts)}</div>'


def _cell(cell: Thumbnail, name: str, results: Results, numbers: Mapping[str, int]) -> str:
    configuration = cell.configuration
    if configuration is None:  # the input's own pictures stay in every view
        images = "".join(_image(uri, "", f"{cell.caption} of {name}") for uri in cell.views.values())
        caption = escape(cell.caption)
    else:
        images = "".join(
            _image(cell.views[view], f"view {view}", f"{cell.caption}, {name}: {what}")
            if view in cell.views
            else f'<span class="view {view} absent">{_NO_VIEW[view]}</span>'
            for view, what in _NAMES.items()
            if cell.views
        )
        caption = f"{numbers[configuration['id']]}: {escape(full_label(results, configuration))}"
    if cell.problem:
        images = f'<span class="absent">{escape(cell.problem)}</span>'
    if cell.link:
        images = f'<a href="{escape(quote(cell.link))}">{images}</a>'
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def _image(uri: str, class_: str, text: str) -> str:
    return f'<img class="{class_}" src="{uri}" alt="{escape(text)}" decoding="async">'
