"""``moebius-edge export`` as a command: options reach ``export_bundle``, its news and errors reach the user.

The export itself is tested where it lives; here it is replaced.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import INT8, call_int8, make_toy_bundle

from moebius_edge import export as export_package
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration import int8
from moebius_edge.calibration.int8 import Int8Options
from moebius_edge.calibration.quantise import TARGETS
from moebius_edge.calibration.ranges import METHODS
from moebius_edge.cli import main
from moebius_edge.commands import export as command_module
from moebius_edge.errors import QualityError
from moebius_edge.export import engine_target, engines, export_bundle
from moebius_edge.export import exporter as exporter_module
from moebius_edge.export.engine_target import EngineOptions, Target
from moebius_edge.export.engines import Built
from moebius_edge.progress import Progress
from moebius_edge.runtimes.engine_files import Engine, EngineKey

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict[str, Any]]]:
    """Replaces ``export_bundle`` by one that writes a toy; holds its calls."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def export_bundle(*paths: Any, **options: Any) -> Bundle:
        calls.append((paths, options))
        options["progress"]("load weights", None)
        options["progress"]("gate, PyTorch", 0.5)
        return Bundle.load(make_toy_bundle(Path(paths[2])))

    monkeypatch.setattr(export_package, "export_bundle", export_bundle)
    return calls


def test_options_reach_the_exporter(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "bundle"
    options = ["--config", "c.json", "--steps", "4", "--guidance", "0", "--force"]
    options += ["--precision", "fp16", "--min-psnr", "50", "--distilled-guidance", "3"]
    assert main(["export", "w.bin", "--vae", "vae", "--output", str(out), *options]) == 0
    ((source, vae, output), given) = exporter[0]
    assert (source, Path(vae), Path(output)) == ("w.bin", Path("vae"), out)
    given.pop("progress")
    assert given == {
        "config": Path("c.json"),
        "steps": 4,
        "guidance": 0.0,
        "distilled_guidance": 3.0,
        "precision": "float16",
        "min_psnr_db": 50.0,
        "force": True,
    }
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines()[0].startswith(f"saved {out} (64x64, float32, ")
    assert "psnr_db 99" in stdout
    assert stdout.splitlines()[-1] == f"next: moebius-edge run IMAGE MASK --bundle {out}"
    assert stderr.splitlines() == ["load weights", "gate, PyTorch: 50 of 100"]


NAMES = ("steps", "guidance", "distilled_guidance", "precision", "min_psnr_db")


def test_defaults_are_the_exporters(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    parameters = inspect.signature(export_bundle).parameters
    exporter_defaults = {name: parameters[name].default for name in NAMES}
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--json"]) == 0
    ((_, vae, _), given) = exporter[0]
    assert vae is None and given["config"] is None and given["force"] is False
    assert {name: given[name] for name in exporter_defaults} == exporter_defaults
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "output": str(tmp_path / "b"),
        "distilled_guidance": None,
        "gate": {"psnr_db": 99.0},
        "exit_code": 0,
    }


def test_distilled_guidance_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def exported(*paths: Any, **options: Any) -> Bundle:
        return Bundle.load(make_toy_bundle(Path(paths[2]), distilled_guidance=options["distilled_guidance"]))

    monkeypatch.setattr(export_package, "export_bundle", exported)
    command = ["export", "w.bin", "--vae", "vae", "-o", str(tmp_path / "b"), "--distilled-guidance", "2.5"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  guidance 2.5 distilled, one call a step"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distilled_guidance"] == 2.5


def test_an_unknown_precision_is_a_usage_error(exporter: list, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--precision", "fp8"]) == 2
    assert capsys.readouterr().err == "error: there is no precision 'fp8': choose one of fp32, fp16, int8\n"
    assert exporter == []


def test_a_missed_gate_exits_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def missed(*paths: Any, **options: Any) -> Bundle:
        raise QualityError("the decoded images agree to 41.2 dB, below the floor of 60 dB: nothing was saved")

    monkeypatch.setattr(export_package, "export_bundle", missed)
    assert main(["export", "tiny", "-o", str(tmp_path / "b")]) == 5
    assert "error: the decoded images agree to 41.2 dB" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def interrupted(*paths: Any, **options: Any) -> Bundle:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_package, "export_bundle", interrupted)
    assert main(["export", "tiny", "-o", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "interrupted, nothing written\n"


class EngineBuilder:
    """Replaces the parts of ``export.engines`` that need TensorRT; holds what reached them."""

    target = Target("tensorrt", "10.3.0", "Orin", ("8.7",))
    fresh = True

    def __init__(self) -> None:
        self.options: list[EngineOptions] = []
        self.builds: list[tuple[Bundle, bool]] = []

    def find_target(self, options: EngineOptions) -> Target:
        self.options.append(options)
        return self.target

    def build_engines(
        self, bundle: Bundle, options: EngineOptions, target: Target, progress: Any, force: bool
    ) -> Built:
        assert options == self.options[-1] and target == self.target
        self.builds.append((bundle, force))
        progress("build denoiser (2 of 3)", 0.5)
        key = EngineKey("float32", "tensorrt", "10.3.0", "Orin", ("8.7",))
        plans = {"denoiser": {"bytes": 2_500_000, "build_seconds": 1.25}}
        engine = Engine(bundle.path / "engines" / key.folder, 1, key, {}, plans, {}, {}, {})
        return Built(engine, self.fresh, ("a note",))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> EngineBuilder:
    made = EngineBuilder()
    monkeypatch.setattr(engine_target, "find_target", made.find_target)
    monkeypatch.setattr(engines, "build_engines", made.build_engines)
    return made


def test_engine_options_reach_the_builder(builder: EngineBuilder, tmp_path: Path, capsys: Captured) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    options = ["--max-batch", "3", "--workspace", "512", "--opt-level", "0", "--timing-cache", "t", "--force"]
    command = ["export", str(toy), "--engine", "tensorrt", *options]
    assert main([*command, "--compute-capability", "8.6", "--compute-capability", "8.9"]) == 0
    assert builder.options == [EngineOptions("tensorrt", 3, 512_000_000, 0, Path("t"), ("8.6", "8.9"))]
    assert [(bundle.path, force) for bundle, force in builder.builds] == [(toy, True)]
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [
        f"saved {toy}/engines/float32-tensorrt-10.3.0-orin-sm87 (1 plan, 2.5 MB)",
        "  denoiser 2.5 MB, built in 1.2 s",
        f"next: moebius-edge run IMAGE MASK --bundle {toy} --runtime tensorrt",
    ]
    assert stderr.splitlines() == ["build denoiser (2 of 3): 50 of 100", "note: a note"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["built"] is True and document["output"] == str(toy) and document["notes"] == ["a note"]


def test_a_checkpoint_is_exported_before_its_engines(
    builder: EngineBuilder, exporter: list, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", "w.bin", "--vae", "vae", "-o", str(out), "--engine", "tensorrt"]) == 0
    assert len(exporter) == 1 and [(b.path, force) for b, force in builder.builds] == [(out, False)]
    assert len(builder.options) == 1, "the machine is checked once, and before the export"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"saved {out} (64x64, float32, ") and lines[1] == "  psnr_db 99"
    assert lines[2].startswith(f"saved {out}/engines/")
    assert [line for line in lines if line.startswith("next: ")] == [lines[-1]]


def test_the_name_tiny_means_its_bundle_when_engines_are_built(
    builder: EngineBuilder, exporter: list, tmp_path: Path
) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), "--engine", "tensorrt-rtx"]) == 0
    assert exporter == [] and builder.options[0].flavour == "tensorrt-rtx"
    (bundle, _) = builder.builds[0]
    assert bundle.path == tmp_path / "b" and bundle.files == Bundle.load("tiny").files


@pytest.mark.parametrize(
    "option", [("--vae", "x"), ("--config", "x"), ("--precision", "fp16"), ("--distilled-guidance", "2")]
)
def test_a_bundle_is_complete(
    builder: EngineBuilder, tmp_path: Path, capsys: Captured, option: tuple[str, str]
) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    assert main(["export", str(toy), "--engine", "tensorrt", *option]) == 2
    expected = "is a bundle, complete as it is: leave --vae, --config, --precision and --distilled-guidance out"
    assert expected in capsys.readouterr().err
    assert builder.builds == []


@pytest.mark.parametrize(
    "option",
    [
        ["--max-batch", "2"],
        ["--workspace", "1"],
        ["--opt-level", "0"],
        ["--timing-cache", "t"],
        ["--compute-capability", "8.6"],
    ],
)
def test_engine_options_without_an_engine_are_refused(
    exporter: list, tmp_path: Path, capsys: Captured, option: list[str]
) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), *option]) == 2
    assert "are for engines: add --engine" in capsys.readouterr().err
    assert exporter == []


def test_nothing_to_do(builder: EngineBuilder, tmp_path: Path, capsys: Captured) -> None:
    builder.fresh = False
    toy = make_toy_bundle(tmp_path / "toy")
    assert main(["export", str(toy), "--engine", "tensorrt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nothing to do: ") and lines[1] == "  --force builds it again"


def test_a_bundle_without_engine_is_no_checkpoint(tmp_path: Path, capsys: Captured) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    assert main(["export", str(toy), "-o", str(tmp_path / "b")]) == 2
    assert f"{toy} is a bundle already: add --engine tensorrt" in capsys.readouterr().err


def test_bad_paths_are_told_without_pytorch(tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(tmp_path / "none.bin"), "--vae", str(tmp_path), "-o", str(tmp_path / "b")]) == 3
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main(["export", "tiny"]) == 2
    assert "Missing option '--output'" in capsys.readouterr().err


# --- INT8 ------------------------------------------------------------------------------------------------


class Quantiser:
    """Replaces ``quantise_bundle`` by one that writes a toy that says it is INT8; holds its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Bundle, Path, Int8Options]] = []

    def quantise_bundle(
        self, reference: Bundle, output: Path, options: Int8Options, progress: Progress
    ) -> tuple[Bundle, list[str]]:
        progress("record 0.png, 1 of 4", 25, 100)
        self.calls.append((reference, output, options))
        return Bundle.load(call_int8(make_toy_bundle(output))), ["a note on the pictures"]


@pytest.fixture
def quantiser(monkeypatch: pytest.MonkeyPatch) -> Quantiser:
    made = Quantiser()
    monkeypatch.setattr(int8, "quantise_bundle", made.quantise_bundle)
    return made


def test_int8_options_reach_the_quantiser(quantiser: Quantiser, tmp_path: Path, capsys: Captured) -> None:
    toy, out = make_toy_bundle(tmp_path / "toy"), tmp_path / "out"
    command = ["export", str(toy), "--precision", "int8", "-o", str(out), "--target", "cpu", "--ranges", "entropy"]
    command += ["--calibration-data", "photos", "--calibration-masks", "masks", "--calibration-cache", "kept"]
    command += ["--int8-recipe", "r.json", "--min-psnr", "33", "--steps", "6", "--guidance", "0", "--force"]
    assert main(command) == 0
    ((reference, output, options),) = quantiser.calls
    assert reference.path == toy and output == out
    expected = Int8Options(Path("kept"), "photos", "masks", "cpu", Path("r.json"), "entropy", 33.0, 6, 0.0, force=True)
    assert options == expected
    stdout, stderr = capsys.readouterr()
    lines = stdout.splitlines()
    assert lines[0].startswith(f"saved {out} (64x64, int8, ")
    assert lines[1:6] == [
        "  for tensorrt, 3 of 5 products, 75.0% of the multiplications, the rest float16, ranges mse",
        "  costs most: b, 33.5 dB alone, 25.00% of the multiplications",
        "  costs most: a, 45.0 dB alone, 50.00% of the multiplications",
        "  a call on cpu (onnxruntime 1.23.0): INT8 20 ms, float32 15 ms, 0.75 times as fast",
        "  psnr_db 99",
    ]
    assert lines[-1] == f"next: moebius-edge run IMAGE MASK --bundle {out}"
    assert stderr.splitlines() == ["record 0.png, 1 of 4: 25 of 100", "note: a note on the pictures"]


def test_int8_defaults_and_json(quantiser: Quantiser, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["export", "tiny", "--precision", "int8", "--calibration-data", "x", "-o", str(out), "--json"]) == 0
    ((reference, _, found),) = quantiser.calls
    assert reference.files == Bundle.load("tiny", verify=False).files, "the name means the bundled bundle"
    assert found == Int8Options(tmp_path / "out.calibration", "x", steps=20, force=False)
    assert (found.min_psnr_db, found.target, found.ranges) == (30.0, "tensorrt", "mse")
    document = json.loads(capsys.readouterr().out)
    assert document["int8"] == INT8 and document["output"] == str(out) and document["exit_code"] == 0


def test_a_checkpoint_is_exported_in_float32_first(
    quantiser: Quantiser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def exported(*paths: Any, **options: Any) -> Bundle:
        calls.append((paths, options))
        return Bundle.load(make_toy_bundle(Path(paths[2])))

    weights = tmp_path / "weights" / "w.bin"
    source = SimpleNamespace(checkpoint=weights, vae=tmp_path / "vae", config=None)
    monkeypatch.setattr(exporter_module, "find_source", lambda *paths: source)
    monkeypatch.setattr(exporter_module, "export_bundle", exported)
    out = tmp_path / "out"
    command = ["export", str(weights), "--vae", "vae", "--precision", "int8", "--steps", "5", "--min-psnr", "33"]
    command += ["--calibration-data", "x"]
    assert main([*command, "-o", str(out), "--distilled-guidance", "3"]) == 0
    (((given, vae, folder), options),) = calls
    assert (given, vae) == (str(weights), Path("vae")) and folder.name == "out" and folder != out
    options.pop("progress")
    assert options == {"config": None, "steps": 5, "guidance": None, "distilled_guidance": 3.0}, "its own floor"
    assert quantiser.calls[0][0].path == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "the float32 bundle is gone"

    calls.clear()
    assert main([*command, "-o", str(out)]) == 2, "it is there already"
    assert main([*command, "-o", str(tmp_path / "missing" / "out")]) == 3
    source.checkpoint = out / "w.bin"
    assert main([*command, "-o", str(out), "--force"]) == 2, "it holds what is exported"
    assert calls == []


@pytest.mark.parametrize(
    "option",
    [
        ["--calibration-data", "x"],
        ["--calibration-masks", "x"],
        ["--target", "cpu"],
        ["--int8-recipe", "x"],
        ["--ranges", "mse"],
        ["--calibration-cache", "x"],
    ],
)
@pytest.mark.parametrize("precision", [[], ["--precision", "fp16"]])
def test_int8_options_in_another_precision_are_refused(
    exporter: list, tmp_path: Path, capsys: Captured, option: list[str], precision: list[str]
) -> None:
    assert main(["export", "tiny", "-o", str(tmp_path / "b"), *precision, *option]) == 2
    assert "--ranges and --calibration-cache are for INT8: add --precision int8" in capsys.readouterr().err
    assert exporter == []


def test_int8_refuses_what_it_cannot_use(
    quantiser: Quantiser, builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    command = ["export", "tiny", "--precision", "int8", "--calibration-data", "x"]
    out = ["-o", str(tmp_path / "out")]

    def refused(*arguments: str, code: int = 2) -> str:
        assert main([*command, *arguments]) == code
        return capsys.readouterr().err

    assert "Missing option '--output'" in refused()
    assert "--target cpu is for ONNX Runtime on a CPU, TensorRT cannot build it: leave --engine out" in refused(
        *out, "--target", "cpu", "--engine", "tensorrt"
    )
    for option in (["--vae", "x"], ["--config", "x"], ["--distilled-guidance", "2"]):
        assert "tiny is a bundle, complete as it is: leave --vae, --config and --distilled-g" in refused(*out, *option)
    command[1] = str(toy)
    assert "toy is a bundle, complete as it is" in refused(*out, "--vae", "x")
    assert "'gpu' is not one of" in refused(*out, "--target", "gpu")
    monkeypatch.setitem(sys.modules, "moebius_edge.calibration.int8", None)
    assert "INT8 needs the package moebius_edge.calibration.int8" in refused(*out, code=3)
    assert quantiser.calls == [] and builder.builds == []


def test_engines_of_an_int8_bundle_are_built_from_it(
    quantiser: Quantiser, builder: EngineBuilder, tmp_path: Path, capsys: Captured
) -> None:
    toy, out = make_toy_bundle(tmp_path / "toy"), tmp_path / "out"
    command = ["export", str(toy), "--precision", "int8", "--calibration-data", "x", "-o", str(out)]
    assert main([*command, "--engine", "tensorrt"]) == 0
    assert quantiser.calls[0][0].path == toy
    assert [(bundle.path, bundle.precision) for bundle, _ in builder.builds] == [(out, "int8")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"saved {out} (64x64, int8, ") and lines[-1].endswith("--runtime tensorrt")


def test_ctrl_c_says_where_the_work_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def interrupted(*paths: Any, **options: Any) -> Bundle:
        raise KeyboardInterrupt

    monkeypatch.setattr(int8, "quantise_bundle", interrupted)
    command = ["export", "tiny", "--precision", "int8", "--calibration-data", "x", "-o", str(tmp_path / "out")]
    assert main(command) == 130
    assert capsys.readouterr().err == "interrupted, nothing written\n"
    (tmp_path / "out.calibration").mkdir()
    assert main(command) == 130
    kept = f"interrupted, nothing written but {tmp_path}/out.calibration: the same command goes on with it\n"
    assert capsys.readouterr().err == kept


def test_the_choices_of_the_command_are_those_of_the_quantiser() -> None:
    assert [t.value for t in command_module.Target] == list(TARGETS)
    assert [r.value for r in command_module.Ranges] == list(METHODS)
