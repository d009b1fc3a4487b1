"""What the device path needs exists as binary wheels for a Jetson: nothing is compiled on a board.

pip resolves for another machine and installs nothing. Once freely, which is what a user gets, and once with the
versions of constraints.txt, which is what the container recipes take.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moebius_edge.toml import read_toml

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"3.10": 35, "3.12": 39}  # Python of JetPack 6 and 7 -> minor version of Ubuntu's glibc
EXTRAS = ("cpu", "openvino")
FORBIDDEN = {"torch", "onnx", "onnxscript", "diffusers", "tensorrt"}  # the first four are a workstation's


def requirements() -> list[str]:
    project = read_toml(ROOT / "pyproject.toml")["project"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]


def constraints_for(python: str, file: Path) -> Path:
    """constraints.txt as it reads on ``python``: pip evaluates markers for the Python it runs on."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    kept = [r for r in pinned if r.marker is None or r.marker.evaluate(environment)]
    file.write_text("".join(f"{r.name}{r.specifier}\n" for r in kept))
    return file


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--disable-pip-version-check", "--no-input", "--dry-run", "--ignore-installed", "--quiet"]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no package index answers, asked for a package that is sure to be in any."""
    done = pip("--no-deps", "--only-binary=:all:", "--retries", "1", "rich")
    if done.returncode != 0:
        pytest.skip(f"pip reaches no package index: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def aarch64(python: str) -> list[str]:
    """pip's options for wheels of a Jetson with that Python."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, TARGETS[python] + 1)]
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    return [*target, "--platform=manylinux2014_aarch64"]


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
@pytest.mark.parametrize("python", TARGETS)
def test_every_dependency_is_a_wheel(index: None, python: str, pinned: bool, tmp_path: Path) -> None:
    chosen = ["--constraint", str(constraints_for(python, tmp_path / "constraints.txt"))] if pinned else []
    target = [*aarch64(python), f"--target={tmp_path / 'unused'}"]
    done = pip(*target, f"--report={tmp_path / 'report.json'}", *chosen, *requirements())
    assert done.returncode == 0, done.stderr
    installs = json.loads((tmp_path / "report.json").read_text())["install"]
    files = {canonicalize_name(i["metadata"]["name"]): i["download_info"]["url"].split("/")[-1] for i in installs}
    assert files.keys().isdisjoint(FORBIDDEN)
    assert [f for f in files.values() if not f.endswith(("-any.whl", "_aarch64.whl"))] == []
    compiled = {name for name, file in files.items() if file.endswith("_aarch64.whl")}
    assert {"numpy", "opencv-python-headless", "pillow", "onnxruntime", "openvino"} <= compiled, (
        "the target was not asked for"
    )
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_what_goes_with_a_jetsons_build_of_onnxruntime(index: None, tmp_path: Path) -> None:
    """Which is compiled against numpy 1, for JetPack 6; and PyPI has none for its Python."""
    page = (ROOT / "docs" / "jetson.md").read_text()
    pins = re.findall(r'"((?:numpy|opencv-python-headless)==[\d.]+)"', page)
    assert [pin.partition("==")[0] for pin in pins] == ["numpy", "opencv-python-headless"]
    base = read_toml(ROOT / "pyproject.toml")["project"]["dependencies"]
    target = [*aarch64("3.10"), f"--target={tmp_path / 'unused'}"]
    assert pip(*target, *base, *pins).returncode == 0
    assert pip(*target, *base, pins[0], "opencv-python-headless>=5").returncode != 0, "which needs numpy 2"
    done = pip(*target, "--no-deps", "onnxruntime-gpu")
    assert done.returncode != 0 and "No matching distribution" in done.stderr
