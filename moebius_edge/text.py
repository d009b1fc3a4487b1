"""Text that can always be written: file names that are not valid UTF-8 become readable escapes.

Python holds a byte of a file name that it cannot decode as a lone surrogate, which no encoding writes and which many
readers of JSON refuse. Wherever text leaves this program, such a byte is shown as ``\\xNN``. In JSON and reports the
backslashes of such a name are doubled, so that the name can be had back.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

ESCAPED = "moebius-edge"  # the name of the error handler, for ``open`` and ``str.encode``


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_escaped_character, error.object[error.start : error.end])), error.end


def _escaped_character(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(ESCAPED, _escape)


def printable(text: str) -> str:
    """``text`` itself where it is valid Unicode, else with escapes as this module's docstring says."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.replace("\\", "\\\\").encode("utf-8", ESCAPED).decode("utf-8")


def printable_values(document: Any) -> Any:
    """A JSON-ready document in which every string, keys included, is ``printable``."""
    if isinstance(document, dict):
        return {printable_values(key): printable_values(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [printable_values(value) for value in document]
    return printable(document) if isinstance(document, str) else document


def json_text(document: Any, **options: Any) -> str:
    """JSON that every reader takes, with a line break at its end; a NaN in ``document`` is a ``ValueError``."""
    return json.dumps(printable_values(document), allow_nan=False, **options) + "\n"


def counted(count: int, noun: str) -> str:
    """``count`` with its noun in the right number, such as "1 file" or "2 files"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
