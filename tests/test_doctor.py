"""``moebius-edge doctor``: the answer follows what is there, and every lack has its command."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from commanding import Captured, as_json, printed
from toy import flip_byte, make_toy_bundle

from moebius_edge.bundle import bundle as bundle_module
from moebius_edge.system import jetson, machine, nvml, packages


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model that is there, whatever the checkout holds."""
    monkeypatch.setattr(bundle_module, "ASSETS", tmp_path / "assets")
    return make_toy_bundle(tmp_path / "assets" / "tiny", name="tiny")


def checks(capsys: Captured, code: int) -> dict[str, dict[str, Any]]:
    """The checks of --json by name."""
    document = as_json(capsys, "doctor", code=code)
    assert document["can_run"] == (code == 0) and document["machine"]["cpu"]["cores_available"] >= 1
    return {check["name"]: check for check in document["checks"]}


def without(monkeypatch: pytest.MonkeyPatch, error: ImportError, *packages: str) -> None:
    """Let the import of each of ``packages`` raise ``error``."""
    plain, plain_module = builtins.__import__, importlib.import_module

    def blocked(name: str, *given: Any, **more: Any) -> Any:
        if name.split(".")[0] in packages:
            raise error
        return plain(name, *given, **more)

    def blocked_module(name: str, *given: Any) -> Any:
        return blocked(name) if name in packages else plain_module(name, *given)

    monkeypatch.setattr(importlib, "import_module", blocked_module)
    monkeypatch.setattr(builtins, "__import__", blocked)


def test_where_run_works(capsys: Captured) -> None:
    rows = checks(capsys, 0)
    assert rows["onnxruntime"]["state"] == "ok" and "runs on CPU" in rows["onnxruntime"]["detail"]
    assert rows["model tiny"]["detail"].endswith("hashes verified")
    assert {"tensorrt", "tensorrt_rtx", "torch", "huggingface_hub"} <= set(rows)
    assert all(check["remedy"] for check in rows.values() if check["state"] != "ok")
    lines = printed(capsys, "doctor")
    assert lines[-1] == "`moebius-edge run` works here: moebius-edge run IMAGE MASK"
    assert any(line.startswith("CPU model") for line in lines) and any(line.startswith("memory ") for line in lines)


def test_a_damaged_model(tiny: Path, capsys: Captured) -> None:
    flip_byte(tiny / "denoiser.onnx")
    check = checks(capsys, 3)["model tiny"]
    assert check["state"] == "broken" and "denoiser.onnx was altered" in check["detail"]
    assert check["remedy"] == "pip install --force-reinstall --no-deps moebius-edge"
    assert "cannot work here yet: model tiny is broken" in printed(capsys, "doctor", code=3)[-1]


@pytest.mark.parametrize(
    ("packages", "error", "expected"),
    [
        (("onnxruntime",), ModuleNotFoundError("No module", name="onnxruntime"), {"onnxruntime": "missing"}),
        (("onnxruntime",), ImportError("libfoo.so.1: cannot open"), {"onnxruntime": "broken"}),
        (("cv2", "PIL"), ImportError("blocked"), {"opencv": "broken", "pillow": "broken"}),
    ],
)
def test_no_package_is_taken_for_granted(
    packages: tuple[str, ...],
    error: ImportError,
    expected: dict[str, str],
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, error, *packages)
    rows = checks(capsys, 3)
    assert {name: rows[name]["state"] for name in expected} == expected
    assert all(rows[name]["detail"] == str(error) and "pip install" in rows[name]["remedy"] for name in expected)


def test_a_gpu_and_the_builds_of_onnxruntime(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [nvml.Gpu("H100", "580", "9.0", 80 << 30)])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(packages, "needs_cuda_12", lambda: False)
    assert checks(capsys, 0)["onnxruntime"]["remedy"].endswith('pip install "moebius-edge[gpu]"')
    (line,) = (line for line in printed(capsys, "doctor") if line.startswith("GPU 0"))
    assert "name H100" in line and "memory 85.9 GB" in line and "compute capability 9.0" in line
    monkeypatch.setattr(machine, "package_version", lambda *names: (names[0], "1.0"))
    assert "two builds overwrite each other" in checks(capsys, 0)["onnxruntime"]["detail"]


def test_versions_are_looked_up_without_importing() -> None:
    code = (
        "import sys; from moebius_edge.cli import main; main(['doctor'])\n"
        "print([m for m in ('torch', 'huggingface_hub', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_jetson_is_described(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jetson, "ROOT", Path(__file__).parent / "data" / "jetson" / "orin-nano-8gb")
    rows = checks(capsys, 0)
    assert rows["JetPack"]["state"] == "ok" and rows["JetPack"]["detail"].startswith("L4T 36.4.3, JetPack 6.2, Ten")
    assert (rows["clocks"]["state"], rows["clocks"]["remedy"]) == ("warning", "sudo jetson_clocks")
    assert rows["memory"]["state"] == "warning" and not rows["memory"]["required"], "warnings are no failure"
    lines = printed(capsys, "doctor")
    assert any(line.startswith("board NVIDIA Jetson Orin Nano") for line in lines)
    assert any(line.startswith("temperatures c cpu") for line in lines) and "clocks sudo jetson_clocks" in lines
    board = as_json(capsys, "doctor")["jetson"]
    assert board["power_modes"]["2"] == "MAXN_SUPER"
    clock = {"name": "GPU 17000000.gpu", "minimum_mhz": 306.0, "maximum_mhz": 918.0, "current_mhz": 306.0}
    assert board["clocks"][0] == clock
    monkeypatch.setattr(jetson, "ROOT", tmp_path)
    assert {"JetPack", "clocks", "memory"}.isdisjoint(checks(capsys, 0))
    assert as_json(capsys, "doctor")["jetson"] is None
