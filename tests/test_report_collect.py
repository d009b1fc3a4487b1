"""What is measured, what is kept, and what is measured again; the measuring itself is put aside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reporting import rows, write_inputs
from toy import make_toy_bundle

from moebius_edge.errors import UsageError
from moebius_edge.report import collect as module
from moebius_edge.report.collect import Plan, check_output_dir, collect
from moebius_edge.report.grid import baseline_rows
from moebius_edge.report.results import load, save

STAGE = dict.fromkeys(("first_ms", "median_ms", "p95_ms", "p99_ms", "iqr_ms", "total_ms"), 1.0) | {"count": 1}
FIDELITY: dict[str, Any] = {"hole_psnr_db": 30.0, "psnr_db": 40.0, "hole_ssim": 0.9, "ssim": 0.9, "images": 2}


class Process:
    """Stands for ``supervise``: answers with fixed figures, writes what a real one would, and says what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.fails: dict[str, dict[str, str]] = {}
        self.interrupt_at = ""
        monkeypatch.setattr(module, "supervise", self)

    def __call__(self, spec: dict[str, Any], progress: Any) -> dict[str, Any]:
        spec = json.loads(json.dumps(spec))
        name = spec["configuration"]["id"]
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append(name)
        progress("run 1 of 1", 0, 2)
        if name in self.fails:
            return self.fails[name]
        pictures = {Path(i).name: f"pictures/{name}/{Path(i).name}" for i, *_ in spec["inputs"]}
        for path in pictures.values():
            (Path(spec["folder"]) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(spec["folder"]) / path).touch()
        if spec["record"]:
            Path(spec["record"]).mkdir(exist_ok=True)
            for number in range(len(spec["inputs"])):
                (Path(spec["record"]) / f"{number:04d}.npy").touch()
        reference = spec["reference"]
        if reference:
            assert (Path(reference["folder"]) / "0000.npy").is_file(), "the reference's traces are there in time"
        against = reference and {**FIDELITY, "reference": reference["id"]}
        return {
            "status": "ok",
            "reason": None,
            "runtime": {"name": "onnxruntime", "version": "1", "device": "cpu"},
            "latency": {"load_ms": 1.0, "warmup": 0, "runs": 1, "stages": {"total": STAGE}},
            "memory": {"peak_host_bytes": 1, "peak_device_bytes": None, "reason": "cpu"},
            "accuracy": {"against_reference": against, "against_truth": None},
            "pictures": pictures,
        }


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(monkeypatch)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two bundles of one checkpoint, the lower precision first, at two step counts; then Telea."""
    half = make_toy_bundle(tmp_path / "half", name="half")
    path = half / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "float16"}))
    full = make_toy_bundle(tmp_path / "full", name="full")
    made = rows(half, full, steps=(3, 5), runtimes=("onnxruntime",))
    return Plan([*made, *baseline_rows(["telea"])], write_inputs(tmp_path), runs=1, warmup=0)


def names(*parts: str) -> list[str]:
    return [p if p == "telea" else f"{p[:-1]}_onnxruntime-cpu_ddim-{p[-1]}_g2_image" for p in parts]


REFERENCES, OTHERS = names("full-float323", "full-float325"), names("half-float163", "half-float165", "telea")


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    check_output_dir(folder)
    return collect(plan, folder, lambda label: lambda *step: None)


def asked_for(process: Process, plan: Plan, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The results of one more run, and what was measured for it."""
    process.asked.clear()
    return run(plan, folder), list(process.asked)


def test_references_go_first_and_rows_stay_in_order(plan: Plan, process: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(plan, out)
    assert process.asked == REFERENCES + OTHERS
    assert [row["id"] for row in results["configurations"]] == OTHERS[:2] + REFERENCES + ["telea"]
    load(save(results, out))
    assert results["conditions"] == {"seed": 0, "warmup": 0, "runs": 1, "reference": REFERENCES[0]}
    first = results["configurations"][0]
    assert first["accuracy"]["against_reference"]["reference"] == REFERENCES[0]
    assert first["accuracy"]["truth_reason"] == "no true pictures were given: --truth"
    assert results["configurations"][-1]["accuracy"]["reference_reason"] == "a baseline has no reference"
    assert [i["name"] for i in results["inputs"]] == ["a.png", "b.png"]
    assert {(i["width"], i["height"], i["truth"]) for i in results["inputs"]} == {(96, 80, True)}
    assert results["inputs"][0]["hole_share"] == pytest.approx(256 / (96 * 80), abs=1e-4)
    for name in ("inputs/a.png", "inputs/b_mask.png", "truth/a.png"):
        with Image.open(out / "pictures" / name) as picture:
            assert picture.size == (96, 80)
    assert not list((out / "measured").glob("*.traces")), "they are dropped once all were compared"


def test_an_interrupted_report_goes_on(plan: Plan, process: Process, tmp_path: Path) -> None:
    process.interrupt_at = OTHERS[1]
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out")
    assert process.asked == REFERENCES + OTHERS[:1]
    process.interrupt_at = ""
    assert asked_for(process, plan, tmp_path / "out")[1] == OTHERS[1:], "the references' traces were still there"


def test_what_failed_is_tried_again(plan: Plan, process: Process, tmp_path: Path) -> None:
    process.fails[OTHERS[0]] = {"status": "gated", "reason": "denoiser returned NaN"}
    results = run(plan, tmp_path / "out")
    row = results["configurations"][0]
    assert (row["status"], row["reason"], row["latency"]) == ("gated", "denoiser returned NaN", None)
    assert row["accuracy"]["reference_reason"] == "it was not measured" and row["pictures"] == {}
    save(results, tmp_path / "out")
    process.fails.clear()
    results, asked = asked_for(process, plan, tmp_path / "out")
    assert results["configurations"][0]["status"] == "ok"
    assert asked == OTHERS[:1], "not its reference, whose traces were kept for it"


def test_a_reference_that_fails_leaves_its_reason_and_is_made_up_for(
    plan: Plan, process: Process, tmp_path: Path
) -> None:
    process.fails[REFERENCES[0]] = {"status": "failed", "reason": "the process crashed with SIGSEGV"}
    results = run(plan, tmp_path / "out")
    first = results["configurations"][0]
    assert first["status"] == "ok" and first["accuracy"]["against_reference"] is None
    assert first["accuracy"]["reference_reason"] == (
        f"its reference {REFERENCES[0]} was not measured: the process crashed with SIGSEGV"
    )
    process.fails.clear()
    results, asked = asked_for(process, plan, tmp_path / "out")
    assert results["configurations"][0]["accuracy"]["against_reference"] and asked == [REFERENCES[0], OTHERS[0]]


def test_what_the_figures_depend_on_is_measured_again(plan: Plan, process: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewer = replace(plan, configurations=[c for c in plan.configurations if c.id != OTHERS[0]])
    run(fewer, out)
    first, asked = asked_for(process, plan, out)
    assert asked == [REFERENCES[0], OTHERS[0]], "a new configuration needs its reference once more"
    again, asked = asked_for(process, plan, out)
    assert asked == [] and again["configurations"] == first["configurations"] and again["inputs"] == first["inputs"]
    more = replace(plan, runs=2)
    assert len(asked_for(process, more, out)[1]) == 5
    next((out / "pictures" / OTHERS[1]).iterdir()).unlink()
    assert asked_for(process, more, out)[1] == [REFERENCES[1], OTHERS[1]], "a picture was gone"
    (out / "measured" / "telea.json").write_text("{")
    assert asked_for(process, more, out)[1] == ["telea"]
    changed = {"denoiser.onnx": "0" * 64}
    altered = [replace(c, files=changed) if c.id == OTHERS[1] else c for c in plan.configurations]
    assert asked_for(process, replace(more, configurations=altered), out)[1] == [REFERENCES[1], OTHERS[1]]


def test_a_report_on_other_pictures_is_not_written_over(plan: Plan, process: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(run(plan, out), out)
    other = replace(plan, inputs=write_inputs(tmp_path / "more", "c"))
    with pytest.raises(UsageError, match=r"out holds a report on other pictures \(a.png, b.png\): name another"):
        run(other, out)
    check_output_dir(out, force=True)
    assert [i["name"] for i in run(other, out)["inputs"]] == ["c.png"]


def test_other_folders_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for force in (False, True):
        with pytest.raises(UsageError, match="holds something else than a report: name another"):
            check_output_dir(tmp_path, force)
    with pytest.raises(UsageError, match=r"mine.txt is a file: name a folder"):
        check_output_dir(tmp_path / "mine.txt")
    check_output_dir(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
