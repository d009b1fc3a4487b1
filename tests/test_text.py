"""Names that are not valid UTF-8, in text and in JSON."""

from __future__ import annotations

import json
import os

import pytest

from moebius_edge.text import ESCAPED, json_text, printable

NAME = os.fsdecode(b"b\xe9\\a.png")  # a name in Latin-1, with a backslash


@pytest.mark.parametrize("text", ["plain", "ünïcode 東京 💀", "C:\\photos\\a.png", ""])
def test_valid_text_stays(text: str) -> None:
    assert printable(text) == text
    assert json.loads(json_text({text: [text]})) == {text: [text]}


def test_bytes_that_are_no_text_are_shown_and_can_be_had_back() -> None:
    shown = printable(NAME)
    assert shown == "b\\xe9\\\\a.png" and printable(shown) == shown
    assert shown.encode("latin-1").decode("unicode_escape").encode("latin-1") == os.fsencode(NAME)
    assert NAME.encode("ascii", ESCAPED) == b"b\\xe9\\a.png"
    assert "\ud83d \x80".encode("ascii", ESCAPED) == b"\\ud83d \\x80"


def test_json_has_no_lone_surrogates() -> None:
    text = json_text({NAME: (NAME, 1, None)}, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == {printable(NAME): [printable(NAME), 1, None]}
    assert "\\ud" not in json_text({"name": NAME})
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text({"value": float("nan")})
