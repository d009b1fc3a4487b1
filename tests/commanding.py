"""What the tests of the commands share. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.cli import main

Captured = pytest.CaptureFixture[str]


def as_json(capsys: Captured, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """The document that a command prints with ``--json``, without its exit code, which must be ``code``."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document.pop("exit_code") == code
    return document


def printed(capsys: Captured, *arguments: str | Path, code: int = 0) -> list[str]:
    """The lines that a command prints on stdout, with single spaces."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: Captured, code: int, message: str, *arguments: str | Path) -> str:
    """Run a command that must fail with ``code`` and one line that holds ``message``, and nothing on stdout."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and message in errors[0] and "Traceback" not in err, err
    return errors[0]


def contents(folder: Path) -> set[str]:
    """Every name below a folder, hidden temporary files included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
