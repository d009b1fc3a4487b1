"""``moebius-edge export`` as a command: options reach the three functions that work, their news reach the user.

What they do is tested where it lives; here they are replaced.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commanding import Captured, as_json, printed, refused
from toy import INT8, call_int8, make_toy_bundle

from moebius_edge import export as export_package
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration import int8
from moebius_edge.calibration.int8 import Int8Options
from moebius_edge.cli import main
from moebius_edge.errors import QualityError
from moebius_edge.export import BundleOptions, EngineOptions, engines
from moebius_edge.export import exporter as exporter_module
from moebius_edge.export.engines import Built
from moebius_edge.progress import Progress
from moebius_edge.runtimes.engine_files import Engine, EngineKey


class Work:
    """Replaces the functions that work, each by one that writes a toy; holds what reached them."""

    key = EngineKey("float32", "tensorrt", "10.3.0", "Orin", ("8.7",))

    def __init__(self) -> None:
        self.exported: list[tuple[str, Path, BundleOptions]] = []
        self.quantised: list[tuple[Bundle, Path, Int8Options]] = []
        self.options: list[EngineOptions] = []
        self.built: list[tuple[Bundle, bool]] = []
        self.error: BaseException | None = None
        self.fresh = True

    def export_bundle(self, source: str, output: Path, options: BundleOptions, progress: Progress) -> Bundle:
        self.exported.append((source, output, options))
        progress("load weights", 0, 0)
        progress("gate, PyTorch", 50, 100)
        if self.error is not None:
            raise self.error
        return Bundle.load(make_toy_bundle(output, distilled_guidance=options.distilled_guidance))

    def quantise_bundle(
        self, reference: Bundle, output: Path, options: Int8Options, progress: Progress
    ) -> tuple[Bundle, list[str]]:
        progress("record 0.png, 1 of 4", 25, 100)
        self.quantised.append((reference, output, options))
        if self.error is not None:
            raise self.error
        return Bundle.load(call_int8(make_toy_bundle(output))), ["a note on the pictures"]

    def find_engine_key(self, options: EngineOptions, precision: str) -> EngineKey:
        self.options.append(options)
        return self.key

    def build_engines(self, bundle: Bundle, options: EngineOptions, progress: Progress) -> Built:
        assert options == self.options[-1]
        self.built.append((bundle, options.force))
        progress("build denoiser (2 of 3)", 50, 100)
        if self.error is not None:
            raise self.error
        plans: Any = {"denoiser": {"bytes": 2_500_000, "build_seconds": 1.25}}
        settings: Any = {}
        engine = Engine(bundle.path / "engines" / self.key.folder, 1, self.key, {}, plans, settings, {}, {})
        return Built(engine, self.fresh, ("a note",))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    made = Work()
    monkeypatch.setattr(export_package, "export_bundle", made.export_bundle)
    monkeypatch.setattr(exporter_module, "export_bundle", made.export_bundle)
    monkeypatch.setattr(int8, "quantise_bundle", made.quantise_bundle)
    monkeypatch.setattr(engines, "find_engine_key", made.find_engine_key)
    monkeypatch.setattr(export_package, "build_engines", made.build_engines)
    return made


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


# --- a bundle --------------------------------------------------------------------------------------------


def test_options_reach_the_exporter(work: Work, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "bundle"
    options = "--config c.json --steps 4 --guidance 0 --force --precision fp16 --min-psnr 50 --distilled-guidance 3"
    assert main(["export", "w.bin", "--vae", "vae", "--output", str(out), *options.split()]) == 0
    expected = BundleOptions(Path("vae"), Path("c.json"), 4, 0.0, 3.0, "float16", 50.0, force=True)
    assert work.exported == [("w.bin", out, expected)]
    stdout, stderr = capsys.readouterr()
    saved, distilled, gate, following = stdout.splitlines()
    assert saved.startswith(f"saved {out} (64x64, float32, ")
    assert distilled.split() == ["distilled", "guidance", "3"] and gate.split() == ["gate", "psnr", "db", "99"]
    assert following == f"next: moebius-edge run IMAGE MASK --bundle {out}"
    assert stderr.splitlines() == ["load weights", "gate, PyTorch: 50 of 100"]


def test_weights_in_fp16_are_an_option_of_float32(work: Work, tmp_path: Path, capsys: Captured) -> None:
    command = ["export", "tiny", "-o", str(tmp_path / "b"), "--weights", "fp16"]
    assert main(command) == 0 and work.exported == [("tiny", tmp_path / "b", BundleOptions(weights="float16"))]
    refused(capsys, 2, "--weights: not for fp16, which stores what it computes in", *command, "--precision", "fp16")


def test_defaults_are_the_exporters(work: Work, tmp_path: Path, capsys: Captured) -> None:
    document = as_json(capsys, "export", "tiny", "-o", tmp_path / "b")
    assert work.exported == [("tiny", tmp_path / "b", BundleOptions())]
    expected = {"output": str(tmp_path / "b"), "distilled_guidance": None, "gate": {"psnr_db": 99.0}, "notes": []}
    assert document == expected


def test_a_missed_gate_exits_5_and_ctrl_c_130(work: Work, tmp_path: Path, capsys: Captured) -> None:
    command = ["export", "tiny", "-o", str(tmp_path / "b")]
    work.error = QualityError("the decoded images agree to 41.2 dB, below the floor of 60 dB: nothing was saved")
    refused(capsys, 5, "the decoded images agree to 41.2 dB", *command)
    work.error = KeyboardInterrupt()
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted, nothing written"


def test_bad_paths_are_told_without_pytorch(tmp_path: Path, toy: Path, capsys: Captured) -> None:
    missing = ("export", tmp_path / "none.bin", "--vae", tmp_path, "-o", tmp_path / "b")
    refused(capsys, 3, "there is no checkpoint", *missing)
    refused(capsys, 2, "Missing option '--output' / '-o': name the bundle's folder", "export", "tiny")
    message = f"{toy} is a bundle already: add --engine tensorrt"
    refused(capsys, 2, message, "export", toy, "-o", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((f"--{name} 2", f"--{name}: options of engines: add --engine") for name in ("max-batch", "workspace")),
        ("--opt-level 0", "--opt-level: options of engines: add --engine"),
        ("--timing-cache t", "--timing-cache: options of engines: add --engine"),
        ("--compute-capability 8.6", "--compute-capability: options of engines: add --engine"),
        ("--ranges mse", "--ranges: options of INT8: add --precision int8"),
        ("--calibration-data x", "--calibration-data: options of INT8: add --precision int8"),
        ("--calibration-masks x", "--calibration-masks: options of INT8: add --precision int8"),
        ("--int8-recipe x --calibration-cache x", "--int8-recipe, --calibration-cache: options of INT8: add"),
    ],
)
def test_options_of_what_is_not_made_are_refused(
    work: Work, tmp_path: Path, capsys: Captured, options: str, message: str
) -> None:
    refused(capsys, 2, message, "export", "tiny", "-o", tmp_path / "b", *options.split())
    assert work.exported == [] and work.quantised == [] and work.built == []


# --- engines ---------------------------------------------------------------------------------------------


def test_engine_options_reach_the_builder(work: Work, toy: Path, capsys: Captured) -> None:
    command = ["export", str(toy), "--engine", "tensorrt", "--force"]
    command += "--max-batch 3 --workspace 512 --opt-level 0 --timing-cache t".split()  # noqa: SIM905
    assert main([*command, "--compute-capability", "8.6", "--compute-capability", "8.9"]) == 0
    assert work.options == [EngineOptions("tensorrt", 3, 512_000_000, 0, Path("t"), ("8.6", "8.9"), force=True)]
    assert [(bundle.path, force) for bundle, force in work.built] == [(toy, True)]
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [
        f"saved {toy}/engines/float32-tensorrt-10.3.0-orin-sm87 (1 plan, 2.5 MB)",
        "  denoiser 2.5 MB, built in 1.2 s",
        f"next: moebius-edge run IMAGE MASK --bundle {toy} --runtime tensorrt",
    ]
    assert stderr.splitlines() == ["build denoiser (2 of 3): 50 of 100", "note: a note"]
    document = as_json(capsys, *command)
    assert document["built"] is True and document["output"] == str(toy) and document["notes"] == ["a note"]
    work.fresh = False
    lines = printed(capsys, "export", toy, "--engine", "tensorrt")
    assert lines[0].startswith("nothing to do: ") and lines[1] == "--force builds it again"
    work.error = KeyboardInterrupt()
    assert main(command) == 130
    message = f"interrupted, no engine written; the bundle is {toy}"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_checkpoint_is_exported_before_its_engines(work: Work, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "bundle"
    lines = printed(capsys, "export", "w.bin", "--vae", "vae", "-o", out, "--engine", "tensorrt")
    assert len(work.exported) == 1 and [(bundle.path, force) for bundle, force in work.built] == [(out, False)]
    assert len(work.options) == 1, "the machine is checked once, and before the export"
    assert lines[0].startswith(f"saved {out} (64x64, float32, ") and lines[1] == "gate psnr db 99"
    assert lines[2].startswith(f"saved {out}/engines/")
    assert [line for line in lines if line.startswith("next: ")] == [lines[-1]]


def test_the_name_tiny_means_its_bundle_when_engines_are_built(work: Work, tmp_path: Path) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--engine", "tensorrt-rtx"]) == 0
    assert work.exported == [] and work.options[0].variant == "tensorrt-rtx"
    (bundle, _) = work.built[0]
    assert bundle.path == tmp_path / "b" and bundle.files == Bundle.load("tiny").files
    other = ["-o", str(tmp_path / "c"), "--engine", "tensorrt", "--precision", "fp16"]
    assert main(["export", "tiny", *other]) == 0
    assert len(work.exported) == 1, "in another precision it is another bundle"


@pytest.mark.parametrize("option", ["--vae x", "--config x", "--precision fp16", "--weights fp16"])
def test_a_bundle_is_complete(work: Work, toy: Path, capsys: Captured, option: str) -> None:
    message = f"{option.split()[0]}: not for {toy}, which is a bundle, complete as it is: leave out"
    refused(capsys, 2, message, "export", toy, "--engine", "tensorrt", *option.split())
    assert work.built == []


# --- INT8 ------------------------------------------------------------------------------------------------


def test_int8_options_reach_the_quantiser(work: Work, toy: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    options = "--calibration-data photos --calibration-masks masks --gate-runtime openvino --ranges entropy "
    options += "--int8-recipe r.json --calibration-cache kept --min-psnr 33 --force --steps 6 --guidance 0"
    assert main(["export", str(toy), "--precision", "int8", "-o", str(out), *options.split()]) == 0
    ((reference, output, given),) = work.quantised
    assert reference.path == toy and output == out
    expected = Int8Options(Path("kept"), "photos", "masks", Path("r.json"), "entropy", 33.0, 6, 0.0, force=True)
    assert given == dataclasses.replace(expected, gate_runtime="openvino")
    stdout, stderr = capsys.readouterr()
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert lines[0].startswith(f"saved {out} (64x64, int8, ") and lines[1] == "gate psnr db 99"
    assert lines[2].startswith("int8 rest float16, ") and "speed.speedup 0.75" in lines[2]
    assert lines[-1] == f"next: moebius-edge run IMAGE MASK --bundle {out}"
    assert stderr.splitlines() == ["record 0.png, 1 of 4: 25 of 100", "note: a note on the pictures"]


def test_int8_defaults_and_json(work: Work, tmp_path: Path, capsys: Captured) -> None:
    out, data = tmp_path / "out", ("--calibration-data", "photos")
    document = as_json(capsys, "export", "tiny", "--precision", "int8", "-o", out, *data)
    ((reference, _, given),) = work.quantised
    assert reference.files == Bundle.load("tiny", verify=False).files, "the name means the bundled bundle"
    assert given == Int8Options(tmp_path / "out.calibration", "photos", steps=20)
    assert (given.min_psnr_db, given.gate_runtime, given.ranges) == (30.0, "onnxruntime", "mse")
    assert document["int8"] == INT8 and document["output"] == str(out)
    assert document["notes"] == ["a note on the pictures"]


def test_a_checkpoint_is_exported_in_float32_first(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights, out = tmp_path / "weights" / "w.bin", tmp_path / "out"
    source = SimpleNamespace(checkpoint=weights, vae=tmp_path / "vae", config=None)
    monkeypatch.setattr(exporter_module, "find_source", lambda *paths: source)
    command = f"export {weights} --vae vae --precision int8 --steps 5 --min-psnr 33 --distilled-guidance 3".split()
    command += ["--calibration-data", "photos"]
    assert main([*command, "-o", str(out)]) == 0
    ((given, folder, options),) = work.exported
    assert given == str(weights) and folder.name == "out" and folder != out
    assert options == BundleOptions(Path("vae"), steps=5, distilled_guidance=3.0), "it has its own floor"
    assert work.quantised[0][0].path == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "the float32 bundle is gone"
    work.exported.clear()
    assert main([*command, "-o", str(out)]) == 2, "it is there already"
    assert main([*command, "-o", str(tmp_path / "missing" / "out")]) == 3
    source.checkpoint = out / "w.bin"
    assert main([*command, "-o", str(out), "--force"]) == 2, "it holds what is exported"
    assert work.exported == []


def test_int8_and_engines_of_one_bundle(
    work: Work, toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    command = ("export", toy, "--precision", "int8", "-o", out, "--calibration-data", "photos")
    document = as_json(capsys, *command, "--engine", "tensorrt")
    assert [(bundle.path, bundle.precision) for bundle, _ in work.built] == [(out, "int8")]
    assert document["int8"] == INT8 and document["engine"].startswith(f"{out}/engines/")
    assert document["notes"] == ["a note on the pictures", "a note"]
    refused(capsys, 2, "toy is a bundle, complete as it is", *command, "--vae", "x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "moebius_edge.calibration.int8")
    refused(capsys, 3, "INT8 needs onnxruntime", *command)


def test_ctrl_c_says_where_the_work_is(work: Work, tmp_path: Path, capsys: Captured) -> None:
    work.error = KeyboardInterrupt()
    out = tmp_path / "out"
    command = ["export", "tiny", "--precision", "int8", "-o", str(out), "--calibration-data", "photos", "--json"]
    for kept in ("", f" but {out}.calibration: the same command goes on with it"):
        assert main(command) == 130
        assert json.loads(capsys.readouterr().out)["error"] == f"interrupted, nothing written{kept}"
        (tmp_path / "out.calibration").mkdir(exist_ok=True)
