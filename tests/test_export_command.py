"""``moebius-edge export`` as a command: options reach ``export_bundle``, its news and errors reach the user.

The export itself is tested where it lives; here it is replaced.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge import export as export_package
from moebius_edge.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.errors import QualityError
from moebius_edge.export import export_bundle

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict[str, Any]]]:
    """Replaces ``export_bundle`` by one that writes a toy; holds its calls."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def export_bundle(*paths: Any, **options: Any) -> Bundle:
        calls.append((paths, options))
        options["progress"]("load weights", None)
        options["progress"]("gate, PyTorch", 0.5)
        return Bundle.load(make_toy_bundle(Path(paths[2])))

    monkeypatch.setattr(export_package, "export_bundle", export_bundle)
    return calls


def test_options_reach_the_exporter(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "bundle"
    options = ["--config", "c.json", "--steps", "4", "--guidance", "0", "--force"]
    options += ["--precision", "fp16", "--min-psnr", "50"]
    assert main(["export", "w.bin", "--vae", "vae", "--output", str(out), *options]) == 0
    ((source, vae, output), given) = exporter[0]
    assert (source, Path(vae), Path(output)) == ("w.bin", Path("vae"), out)
    given.pop("progress")
    assert given == {
        "config": Path("c.json"),
        "steps": 4,
        "guidance": 0.0,
        "precision": "float16",
        "min_psnr_db": 50.0,
        "force": True,
    }
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines()[0].startswith(f"saved {out} (64x64, float32, ")
    assert "psnr_db 99" in stdout
    assert stdout.splitlines()[-1] == f"next: moebius-edge run IMAGE MASK --bundle {out}"
    assert stderr.splitlines() == ["load weights", "gate, PyTorch: 50 of 100"]


def test_defaults_are_the_exporters(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    parameters = inspect.signature(export_bundle).parameters
    exporter_defaults = {name: parameters[name].default for name in ("steps", "guidance", "precision", "min_psnr_db")}
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--json"]) == 0
    ((_, vae, _), given) = exporter[0]
    assert vae is None and given["config"] is None and given["force"] is False
    assert {name: given[name] for name in exporter_defaults} == exporter_defaults
    document = json.loads(capsys.readouterr().out)
    assert document == {"output": str(tmp_path / "b"), "gate": {"psnr_db": 99.0}, "exit_code": 0}


def test_an_unknown_precision_is_a_usage_error(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--precision", "fp8"]) == 2
    assert capsys.readouterr().err == "error: there is no precision 'fp8': choose one of fp32, fp16\n"
    assert exporter == []


def test_a_missed_gate_exits_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def missed(*paths: Any, **options: Any) -> Bundle:
        raise QualityError("the decoded images agree to 41.2 dB, below the floor of 60 dB: nothing was saved")

    monkeypatch.setattr(export_package, "export_bundle", missed)
    assert main(["export", "tiny", "-o", str(tmp_path / "b")]) == 5
    assert "error: the decoded images agree to 41.2 dB" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def interrupted(*paths: Any, **options: Any) -> Bundle:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_package, "export_bundle", interrupted)
    assert main(["export", "tiny", "-o", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "interrupted, nothing written\n"


def test_bad_paths_are_told_without_pytorch(tmp_path: Path, capsys: Captured) -> None:
    assert (
        main(["export", str(tmp_path / "none.bin"), "--vae", str(tmp_path), "-o", str(tmp_path / "b")]) == 3
    )
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main(["export", "tiny"]) == 2
    assert "Missing option '--output'" in capsys.readouterr().err
