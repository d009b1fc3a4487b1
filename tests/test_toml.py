"""TOML files: what is none is one line, and so is a Python that cannot read any."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import MachineError, UsageError
from moebius_edge.toml import parse_toml, read_toml


def test_what_is_read_and_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('size = 512\nrange = [0, 1]\n[a]\nb = "c"\n')
    assert read_toml(tmp_path / "good.toml") == {"size": 512, "range": [0, 1], "a": {"b": "c"}}
    with pytest.raises(MachineError, match=r"no.toml cannot be read: No such file"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff = [")
    with pytest.raises(UsageError, match=r"bad.toml is no TOML"):
        read_toml(tmp_path / "bad.toml")


def test_a_python_without_a_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MachineError, match=r"Python 3\.\d+\.\d+ reads no TOML: run `pip install tomli`"):
        parse_toml("a = 1")
