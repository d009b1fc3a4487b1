"""Names that are not valid UTF-8 in text and in JSON, and TOML files that are none."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import MachineError, UsageError
from moebius_edge.text import ESCAPED, json_text, printable
from moebius_edge.toml import parse_toml, read_toml

NAME = os.fsdecode(b"b\xe9\\a.png")  # a name in Latin-1, with a backslash


def test_bytes_that_are_no_text_are_shown_and_can_be_had_back() -> None:
    for valid in ("plain", "ünïcode 東京 💀", "C:\\photos\\a.png", ""):
        assert printable(valid) == valid and json.loads(json_text({valid: [valid]})) == {valid: [valid]}
    shown = printable(NAME)
    assert shown == "b\\xe9\\\\a.png" and printable(shown) == shown
    assert shown.encode("latin-1").decode("unicode_escape").encode("latin-1") == os.fsencode(NAME)
    assert f"{NAME} \ud83d \x80".encode("ascii", ESCAPED) == b"b\\xe9\\a.png \\ud83d \\x80"
    text = json_text({NAME: (NAME, 1, None)}, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == {shown: [shown, 1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text({"value": float("nan")})


def test_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.toml").write_text('size = 512\nrange = [0, 1]\n[a]\nb = "c"\n')
    assert read_toml(tmp_path / "good.toml") == {"size": 512, "range": [0, 1], "a": {"b": "c"}}
    with pytest.raises(MachineError, match=r"no.toml cannot be read: No such file"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff = [")
    with pytest.raises(UsageError, match=r"bad.toml is no TOML"):
        read_toml(tmp_path / "bad.toml")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MachineError, match=r"Python 3\.\d+\.\d+ reads no TOML: run `pip install tomli`"):
        parse_toml("a = 1")
