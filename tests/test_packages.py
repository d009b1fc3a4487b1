"""What brings a missing package: on a desktop with an old and a new driver, an Arm server, a Jetson, in a container."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from commanding import Captured, as_json
from toy import make_toy_bundle

from moebius_edge.bundle import bundle as bundle_module
from moebius_edge.commands import console
from moebius_edge.errors import MachineError
from moebius_edge.runtimes import cuda, providers
from moebius_edge.runtimes.engine_files import VARIANTS, load_package
from moebius_edge.system import jetson, machine, nvml, packages
from moebius_edge.system.packages import driver_version, install, mend_onnxruntime

BOARDS = Path(__file__).parent / "data" / "jetson"
# What /proc/driver/nvidia/version begins with, by the kind of module.
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jan 16 05:54:56 UTC 2025\nGCC version: gcc 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for {}  {}  Release Build  (dvs-builder@U22-I3)  Tue\n"


@dataclass
class Sample:
    """A machine: its architecture, board, driver's file, and Python; NVML names ``gpus``."""

    architecture: str
    driver: str = ""
    board: str = ""
    python: tuple[int, int] = (3, 12)
    gpus: tuple[str, ...] = ()


SAMPLES = {
    "plain": Sample("x86_64"),
    "desktop 570": Sample("x86_64", PROPRIETARY.format("570.86.15"), gpus=("NVIDIA GeForce RTX 4090",)),
    "desktop 580": Sample("x86_64", OPEN.format("x86_64", "580.95.05")),
    "arm server": Sample("aarch64", OPEN.format("aarch64", "580.95.05"), gpus=("NVIDIA GH200 480GB",)),
    "arm server 570": Sample("aarch64", OPEN.format("aarch64", "570.124.06")),
    "orin": Sample("aarch64", OPEN.format("aarch64", "540.4.0"), "orin-nano-8gb", (3, 10), ("Orin (nvgpu)",)),
    "thor": Sample("aarch64", OPEN.format("aarch64", "580.00"), "agx-thor-128gb", gpus=("NVIDIA Thor",)),
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """``on(name, installed...)``: a machine of ``SAMPLES`` with these distributions of GPU packages installed."""

    def become(name: str, *installed: str) -> None:
        sample = SAMPLES[name]
        (tmp_path / "version").unlink(missing_ok=True)
        if sample.driver:
            (tmp_path / "version").write_text(sample.driver)
        board = BOARDS / sample.board if sample.board else tmp_path / "nowhere"
        found = [nvml.Gpu(gpu, (driver_version() or ""), "8.7", None) for gpu in sample.gpus]
        for module in (machine, packages):
            monkeypatch.setattr(module, "gpus", lambda: found)

        def version(*names: str) -> tuple[str, str] | None:
            return next(((name, "1.0") for name in names if name in installed), None)

        for module in (machine, packages, providers):
            monkeypatch.setattr(module, "package_version", version)
        monkeypatch.setattr(packages, "cuda_version", lambda: None)
        monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(machine, "_board", lambda: sample.board.replace("-", " ") and f"Jetson {sample.board}")
        monkeypatch.setattr(jetson, "ROOT", board)
        monkeypatch.setattr("platform.machine", lambda: sample.architecture)
        monkeypatch.setattr(sys, "version_info", (*sample.python, 0, "final", 0))

    yield become


def test_the_drivers_version(on: Any) -> None:
    expected = {"plain": None, "desktop 570": "570.86.15", "desktop 580": "580.95.05", "orin": "540.4.0"}
    for name, version in expected.items():
        on(name)
        assert driver_version() == version, name


@pytest.mark.parametrize(
    ("where", "extra", "expected"),
    [
        ("plain", "cpu", 'run `pip install "moebius-edge[cpu]"`'),
        ("plain", "rtx", 'run `pip install "moebius-edge[rtx]"`'),
        ("desktop 570", "gpu", 'run `pip install "moebius-edge[gpu-cu12]"`'),
        ("desktop 570", "tensorrt", 'run `pip install "moebius-edge[tensorrt-cu12]"`'),
        ("desktop 570", "rtx", 'run `pip install "moebius-edge[rtx-cu12]"`'),
        ("desktop 580", "gpu", 'run `pip install "moebius-edge[gpu]"`'),
        ("desktop 580", "tensorrt", 'run `pip install "moebius-edge[tensorrt]"`'),
        ("desktop 580", "train", 'run `pip install "moebius-edge[cpu,train]"`'),
        ("arm server", "gpu", 'run `pip install "moebius-edge[gpu]"`'),
        ("arm server", "tensorrt", "no package of it fits aarch64, Python"),
        ("arm server 570", "gpu", "no package of it fits aarch64, Python"),
        ("orin", "gpu", "docs/jetson.md says which build of onnxruntime-gpu fits a Jetson"),
        ("orin", "tensorrt", "run `sudo apt install python3-libnvinfer`, and make the environment with --system-site"),
        ("orin", "rtx", "TensorRT for RTX has no build for a Jetson"),
        ("thor", "gpu", "docs/jetson.md says which build"),
        ("thor", "export", "a Jetson needs no PyTorch, export on a workstation"),
        ("thor", "cpu", 'run `pip install "moebius-edge[cpu]"`'),
    ],
)
def test_an_extra_is_one_that_has_packages_here(on: Any, where: str, extra: str, expected: str) -> None:
    on(where)
    assert str(install(extra)).startswith(expected)
    with pytest.raises(MachineError) as caught, console.needs("the work", extra):
        raise ModuleNotFoundError("No module", name="torch")
    assert caught.value.remedy == str(install(extra))


def test_a_build_of_onnxruntime_is_never_overwritten_by_another(on: Any) -> None:
    on("desktop 580", "onnxruntime")
    assert str(mend_onnxruntime("-U")) == "run `pip install -U onnxruntime`"
    assert install("gpu").command == 'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu]"'
    on("desktop 580", "onnxruntime", "onnxruntime-gpu")
    assert install("gpu").command.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install ")
    on("desktop 570", "onnxruntime-gpu")
    assert mend_onnxruntime("-U").command == 'pip install -U "onnxruntime-gpu[cuda,cudnn]<1.27"'
    assert install("export").command == 'pip install "moebius-edge[export]"'
    on("orin", "onnxruntime-gpu")
    assert mend_onnxruntime("-U") == (
        "",
        "docs/jetson.md has versions of onnxruntime-gpu, numpy and OpenCV that go together",
    )


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_build_for_a_newer_cuda_than_the_drivers(on: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Which TensorRT itself tells as error 35, when it is started."""
    variant = VARIANTS[name]
    version = ".".join(map(str, variant.least))
    monkeypatch.setitem(sys.modules, variant.module, type(sys)(variant.module))
    monkeypatch.setattr(sys.modules[variant.module], "__version__", f"{version}.0", raising=False)
    parts = [name, f"{name}-cu13", f"{name}-cu13-libs", f"{name}-cu13-bindings"]
    on("desktop 570", *parts)
    with pytest.raises(MachineError) as caught:
        load_package(variant)
    assert caught.value.problem == f"{name}-cu13 is for CUDA 13, and NVIDIA's driver (570.86.15) knows CUDA 12"
    command = f'pip uninstall -y {" ".join(parts)} && pip install "moebius-edge[{variant.extra}-cu12]"'
    assert caught.value.remedy == f"run `{command}`, or update the driver to 580 or newer"
    for where, installed in (("desktop 580", parts), ("desktop 570", [f"{name}-cu12"]), ("plain", parts)):
        on(where, *installed)
        load_package(variant)


@pytest.mark.parametrize(("known", "old"), [(12080, True), (13000, False), (0, True)])
def test_the_drivers_library_counts_before_the_kernels_part(
    on: Any, monkeypatch: pytest.MonkeyPatch, known: int, old: bool
) -> None:
    """A container may bring a newer one, for compatibility. 0: it does not say."""
    plain = packages.cuda_version
    on("desktop 570")

    class Library:
        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = known
            return 0 if known else 1

    monkeypatch.setattr(packages, "cuda_version", plain)
    monkeypatch.setattr(packages.ctypes, "CDLL", lambda name: Library())
    assert packages.needs_cuda_12() is old


# --- doctor ----------------------------------------------------------------------------------------------


def remedies(capsys: Captured) -> dict[str, str]:
    """doctor's checks by name: state, detail and remedy in one text."""
    document = as_json(capsys, "doctor")
    return {c["name"]: f"{c['state']}: {c['detail']}: {c['remedy']}" for c in document["checks"]}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "ASSETS", tmp_path / "assets")
    make_toy_bundle(tmp_path / "assets" / "tiny", name="tiny")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.parametrize("where", ["orin", "thor"])
@pytest.mark.parametrize("installed", [(), ("onnxruntime",), ("onnxruntime-gpu",)])
def test_doctor_never_replaces_what_a_jetson_has(
    on: Any, tiny: None, capsys: Captured, monkeypatch: pytest.MonkeyPatch, where: str, installed: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cuda, "require_gpu", lambda: cuda.Gpu("Orin", (8, 7), 8 << 30, True, "12.6"))
    on(where, *installed)
    rows = remedies(capsys)
    for name, text in rows.items():
        assert not re.search(r"pip (un)?install[^:]*(onnxruntime|\[(gpu|tensorrt|rtx|export|train))", text), (
            name,
            text,
        )
    assert rows["CUDA"] == "ok: Orin, compute capability 8.7, driver for CUDA 12.6: "
    assert "--system-site-packages" in rows["tensorrt"] and "no build for a Jetson" in rows["tensorrt_rtx"]
    assert rows["polygraphy"].endswith(": pip install polygraphy")


@pytest.mark.parametrize(("where", "suffix"), [("desktop 570", "-cu12"), ("desktop 580", "")])
def test_doctor_names_the_packages_of_the_drivers_cuda(
    on: Any, tiny: None, capsys: Captured, monkeypatch: pytest.MonkeyPatch, where: str, suffix: str
) -> None:
    monkeypatch.setattr(cuda, "require_gpu", lambda: cuda.Gpu("RTX", (8, 9), 8 << 30, False, "12.8"))
    on(where, "onnxruntime")
    rows = remedies(capsys)
    assert rows["onnxruntime"].endswith(f'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu{suffix}]"')
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")):
        assert rows[name].endswith(f': pip install "moebius-edge[{extra}{suffix}]"')
    on(where, "onnxruntime", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13")
    rows = remedies(capsys)
    state = "broken" if suffix else "ok"
    assert rows["tensorrt"].startswith(state) and rows["tensorrt_rtx"].startswith(state)
    assert not suffix or 'pip uninstall -y tensorrt tensorrt-cu13 && pip install "moebius-edge[t' in rows["tensorrt"]


def test_doctor_in_a_container_that_was_given_no_gpu(
    on: Any, tiny: None, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's driver shows in /proc, and libcuda is not there."""
    on("desktop 580", "onnxruntime")

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", absent)
    monkeypatch.setattr(cuda, "in_container", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    row = remedies(capsys)["CUDA"]
    assert row.startswith("broken: no NVIDIA driver (libcuda.so.1: ") and "start the container with `--gpus all`" in row
    on("plain", "onnxruntime")
    assert "CUDA" not in remedies(capsys)
