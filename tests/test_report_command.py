"""``moebius-edge report`` from the outside: real processes on toy bundles, and every input it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commanding import Captured, as_json, refused
from report_sample import configuration, draw_pictures, report_of
from reporting import write_inputs
from toy import flip_byte, make_toy_bundle

from moebius_edge.cli import main
from moebius_edge.report.results import load, save

ID = "toy-float32_onnxruntime-cpu_ddim-{}_g2_image"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def arguments(folder: Path, *more: str | Path, output: str = "out") -> list[str]:
    """A short report on two photographs below ``folder``."""
    if not (folder / "images").exists():
        write_inputs(folder)
    places = ["--images", folder / "images", "--masks", folder / "masks", "--output", folder / output]
    return ["report", *map(str, [*more, *places, "--runs", "1", "--warmup", "0"])]


def test_a_report_from_bundles_to_results(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    damaged = make_toy_bundle(tmp_path / "damaged", name="damaged")
    flip_byte(damaged / "vae_decoder.onnx")
    asked = arguments(tmp_path, toy, damaged, "--steps", "3,4,3", "--baseline", "telea", "--truth", "images")
    assert main([*asked, "--max-memory", "2GB"]) == 6
    out, err = capsys.readouterr()
    results = load(tmp_path / "out")
    by_id = {row["id"]: row for row in results["configurations"]}
    statuses = [row["status"] for row in by_id.values()]
    assert list(by_id)[:2] == [ID.format(3), ID.format(4)] and statuses == ["ok", "ok", "gated", "gated", "ok"]
    assert by_id[ID.format(3)]["latency"]["stages"]["denoise"]["count"] == 4
    assert by_id[ID.format(4)]["accuracy"]["against_reference"]["hole_psnr_db"] == 200.0
    assert by_id["telea"]["accuracy"]["against_truth"]["images"] == 2
    assert by_id["telea"]["memory"]["peak_host_bytes"] < by_id[ID.format(3)]["memory"]["peak_host_bytes"]
    assert results["limits"] == {"max_latency_ms": None, "min_psnr_db": None, "max_memory_bytes": 2_000_000_000}
    for row in by_id.values():
        for path in row["pictures"].values():
            assert (tmp_path / "out" / path).is_file()
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["configuration", "status", "median", "ms"]
    assert lines[2].startswith(ID.format(3)) and " 200 " in lines[2] and "gated" in lines[4]
    assert any(line.startswith("  Take toy float32, ONNX Runtime CPU, ") for line in lines)
    assert lines[-1] == f"saved {tmp_path / 'out' / 'results.json'}"
    assert "was altered" in err and err.splitlines()[-1] == "error: 2 of 5 configurations were not measured"
    assert f"[1/5] {ID.format(3)}: loading" in err.splitlines()


def test_a_report_needs_no_pytorch_is_resumed_and_takes_an_explicit_reference(
    toy: Path, tmp_path: Path, capsys: Captured
) -> None:
    """First where PyTorch cannot be imported, neither by the command nor by the process that measures."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "onnx", "diffusers", "skimage"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    asked = arguments(tmp_path, toy, "--steps", "3", "--truth", "images")
    command = [sys.executable, "-m", "moebius_edge", *asked]
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert as_json(capsys, *asked) == load(tmp_path / "out")
    assert main(asked) == 0
    assert capsys.readouterr().err == "", "nothing was measured"
    other = make_toy_bundle(tmp_path / "other", name="other", distilled_guidance=2.0)
    assert main([*asked, "--force", "--reference", str(other)]) == 0
    assert f"[2/2] {ID.format(3)}: loading" in capsys.readouterr().err
    rows = load(tmp_path / "out")["configurations"]
    assert [row["bundle"]["name"] for row in rows] == ["toy", "other"]
    assert {row["accuracy"]["against_reference"]["reference"] for row in rows} == {rows[1]["id"]}
    assert rows[0]["accuracy"]["against_reference"]["hole_psnr_db"] > 100, "the same fill, guided and distilled"


def test_ctrl_c_keeps_what_is_finished(toy: Path, tmp_path: Path) -> None:
    asked = arguments(tmp_path, toy, "--steps", "3,1000")
    command = [sys.executable, "-m", "moebius_edge", *asked[:-4], "--runs", "500", "--warmup", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/2]") and "run 1 of" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    expected = f"interrupted; what was measured is kept in {tmp_path / 'out'}: run the same command to go on"
    assert err.splitlines()[-1] == expected
    assert not (tmp_path / "out" / "results.json").exists()


def test_bad_input(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    asked = arguments(tmp_path, toy)
    images, output = str(tmp_path / "images"), tmp_path / "out"
    (tmp_path / "true").mkdir()
    unpaired = f"a.png has no mask: put a_mask.png into {images}, or name the masks' folder with --masks"
    plain = ("report", str(toy), "--output", str(output))
    refused(capsys, 2, "--images DIR is missing: name a folder of photographs", *plain)
    refused(capsys, 2, unpaired, *plain, "--images", images)
    refused(capsys, 2, "--output", "report", str(toy), "--images", images)
    refused(capsys, 4, "there is no bundle folder", *asked[:1], "none", *asked[1:])
    for message, *options in (
        ("is no folder: name one that holds photographs", "--images", f"{images}/a.png"),
        ("a.png has no true picture: put a.png into", "--truth", str(tmp_path / "true")),
        ("--truth none is no folder", "--truth", "none"),
        ("4,x is no list of whole numbers such as 4,8", "--steps", "4,x"),
        ("x is no list of whole numbers", "--cache-interval", "x"),
        ("cache interval is 0", "--cache-interval", "0"),
        ("'middle' is not one of image, prefill, noise", "--start", "middle"),
        ("'lama' is not one of telea, navier-stokes", "--baseline", "telea,lama"),
        ("1000 is no size such as 2GB or 500MB", "--max-memory", "1000"),
        ("much is no size such as 2GB", "--max-memory", "much"),
    ):
        refused(capsys, 2, message, *asked, *options)
    assert not output.exists()


def written(folder: Path, machine: str, **conditions: int) -> Path:
    """The results of one configuration as ``machine`` would have written them, and for ``here`` its pictures."""
    row = configuration("a", truth=20.0, machine=machine)
    row["pictures"] = {"beach.jpg": "pictures/a/beach.png"}
    results = report_of([row])
    results["machines"][machine]["info"]["memory_bytes"] = len(machine)
    results["conditions"] |= {"reference": None, **conditions}
    (folder / machine).mkdir()
    if machine == "here":
        draw_pictures(results, folder / machine)
    return save(results, folder / machine)


def test_two_machines_are_merged(tmp_path: Path, capsys: Captured) -> None:
    first, second, other = written(tmp_path, "here"), written(tmp_path, "board"), written(tmp_path, "other", runs=9)
    both = str(tmp_path / "both")
    assert main(["report", "merge", str(first), str(second), "--output", both, "--max-latency-ms", "9"]) == 0
    out, err = capsys.readouterr()
    merged = load(both)
    assert [row["id"] for row in merged["configurations"]] == ["a", "a_board"]
    assert merged["limits"]["max_latency_ms"] == 9 and len(merged["machines"]) == 2
    assert [len(row["pictures"]) for row in merged["configurations"]] == [1, 0]
    assert (tmp_path / "both" / "pictures" / "inputs" / "beach_mask.png").is_file()
    assert (tmp_path / "both" / "report.md").is_file()
    assert (tmp_path / "both" / "report.html").is_file(), "the page of what other machines measured"
    assert "1 picture not found beside" in err and out.splitlines()[-1] == f"saved {both}/results.json"
    merge = ("report", "merge", "--output", both)
    refused(capsys, 2, "runs is 5 there, 9 here", *merge, first, other)
    refused(capsys, 2, "merge needs a results.json or more", *merge)
    message = f"the output {first.parent} is one of the reports"
    refused(capsys, 2, message, *merge[:3], first.parent, first, second)
    refused(capsys, 3, "cannot read none", *merge, "none", first)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_names_that_are_not_utf8(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    """Of the bundle, the photographs and the report: every file of it is valid, and the page has its pictures."""
    name = os.fsdecode(b"b\xe9")
    folder = tmp_path / name
    toy.rename(tmp_path / f"{name}.bundle")
    asked = arguments(folder, tmp_path / f"{name}.bundle", "--steps", "3", output=name)
    for kind in ("images", "masks"):
        first = min((folder / kind).iterdir())
        first.rename(first.with_name(f"{name}{first.suffix}"))
    assert main(asked) == 0
    assert f"saved {tmp_path}/b\\xe9/b\\xe9/report.html" in capsys.readouterr().out
    results = load(folder / name)
    inputs = {entry["name"] for entry in results["inputs"]}
    (row,) = results["configurations"]
    assert row["bundle"]["path"] == f"{tmp_path}/b\\xe9.bundle"
    assert set(row["pictures"]) == inputs and any(entry.startswith("b\\xe9.") for entry in inputs)
    assert all((folder / name / path).is_file() for path in row["pictures"].values())
    page = (folder / name / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg") == 3 * len(inputs)
