"""The README's Python runs, the paths and links it names exist, and the documentation builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_five_lines_of_python_inpaint_the_example(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in program.splitlines() if line]) == 5
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    photograph = Image.open(ROOT / "examples/coffee.png")
    result = Image.open(tmp_path / "result.png")
    assert result.size == photograph.size and result.tobytes() != photograph.convert(result.mode).tobytes()


def test_every_path_in_the_readmes_tree_exists() -> None:
    (tree,) = re.findall(r"```\n(moebius_edge/.*?)```", README, re.DOTALL)
    folder = ""
    for line in tree.splitlines():
        names, _, phrase = line.strip().partition("  ")
        folder = "moebius_edge" if line.startswith(" ") else ""
        for name in names.split():
            assert (ROOT / folder / name).is_dir(), name
            for file in re.findall(r"\w+\.py", phrase):
                assert any((ROOT / folder / part / file).is_file() for part in names.split()), f"{name} {file}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    for name in ("Inpainter", "Bundle", "export_bundle", "quantise_bundle", "build_engines", "OutOfMemory"):
        assert re.search(rf'id="moebius_edge[\w.]*\.{name}"', page), name
