"""``moebius-edge doctor``: the verdict follows what is there, and every lack has its command."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import flip_byte, make_toy_bundle

from moebius_edge.bundle import bundle as bundle_module
from moebius_edge.cli import main
from moebius_edge.system import machine
from moebius_edge.system.nvml import Gpu

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model that is there, whatever the checkout holds."""
    monkeypatch.setattr(bundle_module, "ASSETS", tmp_path / "assets")
    return make_toy_bundle(tmp_path / "assets" / "tiny", name="tiny")


def checks(capsys: Captured, code: int) -> dict[str, dict[str, Any]]:
    """The checks of --json by name."""
    assert main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["exit_code"], document["can_run"]) == (code, code == 0)
    assert document["machine"]["cpu"]["cores_available"] >= 1
    return {check["name"]: check for check in document["checks"]}


def test_where_run_works(tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = checks(capsys, 0)
    assert found["onnxruntime"]["state"] == "ok" and "runs on CPU" in found["onnxruntime"]["detail"]
    assert found["model tiny"]["detail"].endswith("hashes verified")
    assert {"tensorrt", "tensorrt_rtx", "torch", "huggingface_hub", "this folder", "download cache"} <= set(
        found
    )
    assert all(check["remedy"] for check in found.values() if check["state"] != "ok")

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "`moebius-edge run` works here: moebius-edge run IMAGE MASK"
    assert "instructions" in out and "memory" in out
    commands = [line for line in out.splitlines() if "pip install" in line]
    assert all(line.count('"') in (0, 2) for line in commands), "a command cut in two cannot be copied"


def test_a_damaged_model(tiny: Path, capsys: Captured) -> None:
    flip_byte(tiny / "denoiser.onnx")
    found = checks(capsys, 3)
    assert found["model tiny"]["state"] == "broken"
    assert "denoiser.onnx was altered" in found["model tiny"]["detail"]
    assert found["model tiny"]["remedy"] == "pip install --force-reinstall moebius-edge"
    assert main(["doctor"]) == 3
    assert "cannot work here yet: model tiny is broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "error", "state"),
    [
        ("onnxruntime", ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "missing"),
        ("onnxruntime", ImportError("libfoo.so.1: cannot open shared object file"), "broken"),
    ],
)
def test_a_missing_runtime_and_a_broken_one(
    package: str,
    error: ImportError,
    state: str,
    tiny: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == package:
            raise error
        return real(name, *args)

    monkeypatch.setattr("moebius_edge.commands.doctor.importlib.import_module", without)
    found = checks(capsys, 3)
    assert found[package]["state"] == state
    assert found[package]["detail"] == str(error)
    assert found[package]["remedy"] == 'pip install "moebius-edge[cpu]"'


def test_a_gpu_without_its_runtime_gets_the_command(
    tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="H100", driver="570", compute_capability="9.0", memory_bytes=80 << 30)
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    found = checks(capsys, 0)
    assert found["onnxruntime"]["remedy"].endswith('pip install "moebius-edge[gpu]"')
    assert main(["doctor"]) == 0
    assert "H100, 85.9 GB, compute capability 9.0, driver 570" in capsys.readouterr().out


def test_two_builds_of_onnxruntime_are_named(
    tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "package_version", lambda *names: (names[0], "1.0"))
    assert "two builds overwrite each other" in checks(capsys, 0)["onnxruntime"]["detail"]


def test_places_that_cannot_be_used(
    tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert checks(capsys, 0)["download cache"]["state"] == "ok", "it is made when needed"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = checks(capsys, 0)
    assert found["this folder"]["state"] == "broken" and "not writable" in found["this folder"]["detail"]


def test_versions_are_looked_up_without_importing(tiny: Path) -> None:
    import subprocess

    code = (
        "import sys; from moebius_edge.cli import main; main(['doctor'])\n"
        "print([m for m in ('torch', 'huggingface_hub', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_package_of_the_device_path_is_taken_for_granted(
    tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("cv2", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
        return real(name, *args, **kwargs)

    import importlib

    plain = importlib.import_module

    def no_module(name: str, *args: Any) -> Any:
        return without(name) if name in ("cv2", "PIL") else plain(name, *args)

    monkeypatch.setattr("moebius_edge.commands.doctor.importlib.import_module", no_module)
    monkeypatch.setattr(builtins, "__import__", without)
    found = checks(capsys, 3)
    assert (found["opencv"]["state"], found["pillow"]["state"]) == ("missing", "missing")


def test_a_jetson_is_described(tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius_edge.system import jetson

    monkeypatch.setattr(jetson, "ROOT", Path(__file__).parent / "data" / "jetson" / "orin-nano-8gb")
    found = checks(capsys, 0)
    assert found["JetPack"]["state"] == "ok" and found["JetPack"]["detail"].startswith("L4T 36.4.3, JetPack 6.2, Ten")
    assert (found["clocks"]["state"], found["clocks"]["remedy"]) == ("warning", "sudo jetson_clocks")
    assert found["memory"]["state"] == "warning" and not found["memory"]["required"]
    assert main(["doctor"]) == 0, "warnings are no failure"
    out = capsys.readouterr().out
    assert "board         NVIDIA Jetson Orin Nano" in out and "temperature   cpu 50 °C, gpu 48 °C" in out
    assert "  clocks           sudo jetson_clocks" in out
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["jetson"]["power_modes"]["2"] == "MAXN_SUPER"
    assert document["jetson"]["clocks"][0] == {
        "name": "GPU 17000000.gpu",
        "minimum_mhz": 306.0,
        "maximum_mhz": 918.0,
        "current_mhz": 306.0,
    }


def test_other_machines_have_no_jetson(
    tiny: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moebius_edge.system import jetson

    monkeypatch.setattr(jetson, "ROOT", tmp_path)
    assert {"JetPack", "clocks", "memory"}.isdisjoint(checks(capsys, 0))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jetson"] is None
