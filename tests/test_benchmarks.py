"""The benchmark scripts run at a small size and print what they promise; how fast anything is, is not tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import save_student, save_vae

pytestmark = [pytest.mark.slow, pytest.mark.benchmark]
ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--channels", "32", "64", "--latent-size", "16", "--threads", "1", "--rounds", "1")


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{script.removesuffix('.py')}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_whole_step_four_ways(tmp_path: Path) -> None:
    out = run("denoiser.py", *SMALL, "--json", str(tmp_path / "f.json"))
    difference = re.search(r"largest difference (\S+)", out)
    assert difference is not None and float(difference[1]) < 1e-4
    figures = json.loads((tmp_path / "f.json").read_text())["results"]
    kinds = {f"{kind}, {runtime}" for kind in ("plain", "exported") for runtime in ("PyTorch", "ONNX Runtime")}
    assert set(figures["seconds"]) == kinds and all(len(v) == 1 and v[0] > 0 for v in figures["seconds"].values())
    assert 0 < figures["multiply_adds"]["exported"] < figures["multiply_adds"]["plain"]
    assert sum(figures["operator_seconds"].values()) > 0 and figures["peak_flops"] > 1e9
    assert "convolutions" in out and "of the peak" in out


def test_every_rewrite_beside_its_twin(tmp_path: Path) -> None:
    run("denoiser.py", *SMALL, "--rewrites", "--json", str(tmp_path / "f.json"))
    rows = json.loads((tmp_path / "f.json").read_text())["results"]
    names = [(row["rewrite"], row["channels"]) for row in rows]
    assert len(set(names)) == len(names) == 9  # four at either level, and upsampling at the coarser
    up = next(row for row in rows if row["rewrite"] == "upsampling")["multiply_adds"]
    assert up["plain"] / up["rewritten"] == pytest.approx(36 / 16)
    assert all(row["bytes"]["rewritten"] > 0 for row in rows)


def test_fewer_steps_are_compared_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    only = ("--per-photograph", "1", "--regimes", "defaults", "--only", "DDIM, 4", "20, deep features every 2")
    chosen = (*only, "--results", str(results))
    first = run("few_steps.py", "tiny", *chosen, "--json", str(tmp_path / "f.json"))
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| D")]
    assert [tuple(row[:4]) for row in rows] == [
        ("| DDIM, 20", "14", "14", "28"),
        ("| DDIM, 4", "2", "2", "4"),
        ("| DDIM, 20, deep features every 2", "14", "7", "28"),
    ]
    figures = json.loads((tmp_path / "f.json").read_text())["defaults"]
    assert figures["DDIM, 20"]["within"] and figures["DDIM, 20"]["hole_psnr_gain_db"] == 0
    assert figures["DDIM, 4"]["time_of_reference"] < figures["DDIM, 20, deep features every 2"]["time_of_reference"] < 1
    lines = results.read_text().split("\n")[1:-1]
    assert len(lines) == 3 * 4
    results.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # killed while it wrote
    again = run("few_steps.py", "tiny", *chosen)
    quality = [[column for number, column in enumerate(row) if number != 4] for row in rows]
    assert quality == [
        [column for number, column in enumerate(line.split(" | ")) if number != 4]
        for line in again.splitlines()
        if line.startswith("| D")
    ]
    whole = [line for line in results.read_text().splitlines() if line.endswith("}")]
    assert whole[:-1] == lines[:-1] and json.loads(whole[-1])["key"] == json.loads(lines[-1])["key"]


def test_the_islands_of_fp16() -> None:
    """The decoder, which is not exported in FP16, may leave its range; nothing else does."""
    lines = run("precision.py", "tiny", "--steps", "2").splitlines()
    assert len(lines) == 11
    for line in lines[1:]:
        measured = re.search(r"\d\d\.\d\d  +[01]\.\d{5}", line)
        assert measured or (line.startswith("decoder") and "vae_decoder returned NaN" in line), line


def test_thin_masks_on_a_photograph(tmp_path: Path) -> None:
    out = run("windows.py", str(ROOT / "examples" / "coffee.png"), "--picture", str(tmp_path / "windows.jpg"))
    rows = [line.split("|") for line in out.splitlines() if " x |" in line]
    assert len(rows) == 8 and all(float(row[5].replace("x", "")) <= 3 for row in rows)
    assert (tmp_path / "windows.jpg").stat().st_size > 1000


def test_a_whole_picture_upstreams_way_and_ours(tmp_path: Path) -> None:
    save_student(tmp_path / "student.pt")
    save_vae(tmp_path / "vae")
    run("picture.py", str(tmp_path), "prepare")
    for name in ("plain", "ort", "fast"):
        table = run("picture.py", str(tmp_path), name, "--steps", "15")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[1] for row in rows] == ["14", "14", "14"] and [row[-1] == "" for row in rows] == [True, False, False]
    assert float(rows[1][-1]) > 60, "the same arithmetic"
    figures = json.loads((tmp_path / "fast.json").read_text())
    assert figures["cpu_s"] >= figures["stages_s"]["denoise"][1] > 0 and figures["settings"]["cache_interval"] == 2
    assert (
        "no "
        in subprocess.run(
            [sys.executable, "-m", "benchmarks.picture", str(tmp_path), "int8"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stderr
    )
