"""``report.html``: one file that needs no network and no server, made from the results document alone.

Everything in the document is hostile until escaped: names and reasons are text nodes or attributes, the JSON cannot
close its element, and the Content-Security-Policy lets in this page's own script and style, by hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..system.files import atomic_write
from . import sections
from .figures import Results, clean

PAGE_FILE = "report.html"
TITLE = "Accuracy against latency, memory and energy"
_PARTS = Path(__file__).parent / "page"


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.html`` with the pictures below ``folder``, scaled down, in it."""
    path = Path(folder) / PAGE_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(render(results, Path(folder)), encoding="utf-8", newline="\n")
    return path


def render(results: Results, folder: Path) -> str:
    """The page as text; pure but for the pictures, which are read from ``folder``."""
    style, script = _part("page.css"), _part("page.js")
    made = sections.all_of(results, folder)
    fields = {
        "policy": escape(_policy([style], [script])),
        "title": TITLE,
        "version": escape(clean(results["version"])),
        "style": style,
        "script": script,
        "summary": escape(sections.summary(results)),
        "navigation": " ".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in made),
        "sections": "\n".join(
            f'<section id="{s.name}"><h2>{escape(s.title)}</h2>\n{s.content}\n</section>' for s in made
        ),
        "results": script_json(results),
    }
    # One pass, so that nothing inserted is looked through for further fields.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _part("page.html"))


def script_json(document: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element or start another."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))  # in ASCII, so that no surrogate is left
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    def sources(texts: Sequence[str]) -> str:
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{h}'" for h in hashes)

    return (
        f"default-src 'none'; img-src data:; style-src {sources(styles)}; script-src {sources(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8").replace("\r\n", "\n")
