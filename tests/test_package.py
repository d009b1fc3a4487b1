"""What is installed: the wheel's contents, its metadata, and the pinned versions.

The wheel is built here from a copy of the sources, without the network. It does not test `make demo`
or a real installation from a registry; the continuous integration does both.
"""

from __future__ import annotations

import email.message
import email.parser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("export", "runtimes", "calibration")  # top-level folders that are sub-packages of moebius_edge
WHEEL_LIMIT_BYTES = 40_000_000  # the bundled model is nearly all of it


def sources() -> Iterator[tuple[Path, str]]:
    """Every file the package is made of, with the name it must have in the wheel."""
    for folder in ("moebius_edge", *MAPPED):
        prefix = "" if folder == "moebius_edge" else "moebius_edge/"
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT)
            is_data = not {"assets", "page"}.isdisjoint(inside.parts) or path.name == "presets.toml"
            is_content = path.suffix == ".py" or path.name == "py.typed" or is_data
            if path.is_file() and is_content and "__pycache__" not in inside.parts:
                yield path, prefix + inside.as_posix()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no stale build/ folder can leak into it or be left behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ("moebius_edge", *MAPPED):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(out), str(tree)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (n for n in names if n.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).split() == [b"moebius_edge"]
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moebius_edge"}
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < WHEEL_LIMIT_BYTES


def test_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {name for _, name in sources()}
    assert "moebius_edge/py.typed" in expected
    assert expected - found == set(), "missing: list it in pyproject.toml, tool.setuptools.packages"
    assert found - expected == set(), "unexpected files in the wheel"


def test_every_package_folder_has_an_init() -> None:
    folders = {path.parent for path, name in sources() if path.suffix == ".py" and "/assets/" not in name}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_wheel_is_importable_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The mapped folders resolve inside moebius_edge, next to the rest, from an unrelated folder."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib, sys\n"
        "for name in ('', '.calibration', '.export', '.runtimes'):\n"
        "    print(importlib.import_module('moebius_edge' + name).__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = site / "moebius_edge"
    expected = [package / "__init__.py", *(package / f / "__init__.py" for f in ("calibration", "export", "runtimes"))]
    assert done.stdout.splitlines() == [str(path) for path in expected]


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(metadata.get_all("Provides-Extra") or [])
    on_cuda = {f"{name}{suffix}" for name in ("gpu", "tensorrt", "rtx") for suffix in ("", "-cu12")}
    assert extras == {"cpu", "openvino", *on_cuda, "download", "export", "report", "serve", "train", "docs", "dev"}


def test_the_device_installs_no_framework(metadata: email.message.Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    base = {canonicalize_name(r.name) for r in requirements if r.marker is None}
    assert base == {"numpy", "opencv-python-headless", "pillow", "pydantic", "rich", "typer", "typing-extensions"}
    on_cpu = {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": "cpu"})}
    assert on_cpu == {"onnxruntime"}
    on_gpu = {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": "gpu"})}
    assert on_gpu == {"nvidia-ml-py", "onnxruntime-gpu"}, "onnxruntime and onnxruntime-gpu overwrite each other's files"
    for extra in ("export", "train", "report", "tensorrt", "rtx"):  # none of them may bring the other build
        names = {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})}
        assert names.isdisjoint({"onnxruntime", "onnxruntime-gpu"}), extra


def pinned() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_one_public_version_each() -> None:
    for python in ("3.10", "3.11", "3.12"):
        here = [r for r in pinned() if r.marker is None or r.marker.evaluate({"python_version": python})]
        names = [canonicalize_name(r.name) for r in here]
        assert len(names) == len(set(names)), f"a package is pinned twice for Python {python}"
    for requirement in pinned():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", str(requirement)
        assert "+" not in specifier.version and "*" not in specifier.version, str(requirement)
        assert requirement.url is None, str(requirement)


def test_constraints_pin_all_that_the_extras_name(metadata: email.message.Message) -> None:
    # They follow the machine's CUDA and JetPack.
    untested = {"onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-rtx-cu12"}
    names = {canonicalize_name(Requirement(line).name) for line in metadata.get_all("Requires-Dist") or []}
    assert names - {canonicalize_name(r.name) for r in pinned()} - untested == {"moebius-edge"}


def test_the_installed_versions_are_the_pinned_ones() -> None:
    wrong = {}
    for requirement in pinned():
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every extra is installed everywhere
        if not requirement.specifier.contains(installed.split("+")[0]):
            wrong[str(requirement)] = installed
    assert wrong == {}, "tests ran with other versions than constraints.txt names: run `make test`"
