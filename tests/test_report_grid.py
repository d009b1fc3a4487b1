"""What a grid holds: every combination once, each with its own name, and those that cannot run with their reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import UsageError
from moebius_edge.pipeline.loop import check_cache_interval
from moebius_edge.pipeline.presets import preset_settings
from moebius_edge.report.grid import Choices, baseline_rows, grid, with_references
from moebius_edge.report.grid import Configuration as Row


def changed(folder: Path, **values: Any) -> Bundle:
    """A toy bundle whose ``bundle.json`` says something else."""
    path = make_toy_bundle(folder) / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return Bundle.load(folder, verify=False)


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def test_without_choices_a_bundle_runs_as_it_would(tmp_path: Path) -> None:
    own = {"steps": 6, "guidance": 1.0, "start": "prefill", "strength": 0.5}
    (row,) = grid([changed(tmp_path / "toy", defaults=own)], Choices(seed=3))
    assert row.id == "toy-float32_onnxruntime-cpu_ddim-6_g1_prefill"
    assert row.label == "toy float32, ONNX Runtime CPU, 6 steps DDIM, guidance 1, start prefill"
    absent = dict.fromkeys(("distilled_guidance", "guidance_interval", "preset"))
    assert row.settings == {**own, **absent, "steps_executed": 3, "scheduler": "ddim", "cache_interval": 1, "seed": 3}
    assert row.bundle is not None and row.bundle["resolution"] == 64 and row.problem is None


def test_every_combination_is_there_once(toy: Bundle) -> None:
    places = {"runtimes": ("onnxruntime", "auto"), "devices": ("cpu",), "starts": ("image", "noise")}
    rows = grid([toy], Choices(**places, steps=(4, 8), schedulers=("ddim", "dpm++2m"), guidances=(1.0, 1.5)))
    assert len(rows) == len({row.id for row in rows}) == 16
    assert rows[0].id == "toy-float32_onnxruntime-cpu_ddim-4_g1_image"
    assert rows[-1].id == "toy-float32_onnxruntime-cpu_dpm-2m-8_g1.5_noise"
    assert {row.settings["strength"] for row in rows if row.settings} == {0.99, 1.0}


def test_a_preset_stands_beside_the_grid(toy: Bundle) -> None:
    rows = grid([toy], Choices(steps=(20,), guidances=(1.5,), starts=("noise",), presets=("fast",)))
    plain, fast = rows
    fitting = preset_settings("fast", {"start": "noise", "guidance": 1.5}, toy)
    assert fitting["steps"] < 20 and fast.settings is not None and plain.settings is not None
    assert fast.settings.items() >= fitting.items() and plain.settings["scheduler"] == "ddim"
    assert fast.id.endswith("_g1.5_noise") and fast.label.endswith(", start noise, preset fast")
    assert [row.reference for row in with_references(rows, None)] == [plain.id, fast.id], "each its own settings"


@pytest.fixture
def deep(tmp_path: Path) -> Bundle:
    """One that can reuse deep features."""
    return Bundle.load(make_toy_bundle(tmp_path / "deep", name="deep", deep=True))


def test_reuse_of_deep_features_is_an_axis(toy: Bundle, deep: Bundle) -> None:
    plain, reusing, fast = grid([deep], Choices(steps=(8,), cache_intervals=(1, 5), presets=("fast",)))
    assert plain.id == "deep-float32_onnxruntime-cpu_ddim-8_g2_image" and "deep features" not in plain.label
    assert reusing.id == "deep-float32_onnxruntime-cpu_ddim-8-c5_g2_image"
    assert ", 8 steps DDIM, deep features every 5, guidance 2, start image" in reusing.label
    assert [row.settings and row.settings["cache_interval"] for row in (plain, reusing, fast)] == [1, 5, 2]
    assert "-c2_g2" in fast.id and "deep features every 2" in fast.label, "the preset's own"
    without = grid([toy], Choices(presets=("fast",)))[-1]
    assert without.settings is not None and without.settings["cache_interval"] == 1 and without.problem is None


def test_a_bundle_that_cannot_reuse_is_a_row_with_its_reason(toy: Bundle, deep: Bundle) -> None:
    rows = grid([toy, deep], Choices(cache_intervals=(1, 5)))
    assert [row.problem and row.problem[0] for row in rows] == [None, "gated", None, None]
    with pytest.raises(UsageError) as caught:
        check_cache_interval(5, toy)
    assert rows[1].problem is not None and rows[1].problem[1] == str(caught.value)
    assert rows[1].settings is not None and rows[1].settings["steps_executed"] == 19, "of its group with the others"
    with pytest.raises(UsageError, match=r"cache interval is 5, and bundle .*toy was exported without"):
        grid([toy], Choices(cache_intervals=(5,)))


def test_bundles_of_one_name_are_told_apart(toy: Bundle, tmp_path: Path) -> None:
    other = Bundle.load(make_toy_bundle(tmp_path / "other", 128))
    ids = [row.id for row in grid([toy, other], Choices())]
    digits = [b.files["denoiser.onnx"]["sha256"][:6] for b in (toy, other)]
    assert ids == [f"toy-float32-{d}_onnxruntime-cpu_ddim-20_g2_image" for d in digits]
    assert len(grid([toy, toy], Choices())) == 1


def test_what_a_model_cannot_take_is_a_row_with_its_reason(toy: Bundle, tmp_path: Path) -> None:
    distilled = Bundle.load(make_toy_bundle(tmp_path / "distilled", name="distilled", distilled_guidance=1.5))
    rows = grid([toy, distilled], Choices(guidances=(2.0,)))
    assert [row.problem and row.problem[0] for row in rows] == [None, "gated"]
    assert rows[1].problem is not None and "guidance 1.5 distilled" in rows[1].problem[1]
    assert "guidance 2 (distilled)" in rows[1].label
    with pytest.raises(UsageError, match=r"guidance is 2\.0, and the model has guidance 1\.5 distilled"):
        grid([distilled], Choices(guidances=(2.0,)))


def test_a_device_that_is_not_here_is_a_row_and_a_pair_that_does_not_exist_is_none(toy: Bundle) -> None:
    rows = grid([toy], Choices(runtimes=("onnxruntime", "tensorrt"), devices=("cpu", "cuda")))
    places = [(row.runtime["name"], row.runtime["device"]) for row in rows]
    assert places == [("onnxruntime", "cpu"), ("onnxruntime", "cuda"), ("tensorrt", "cuda")]
    here, absent = grid([toy], Choices(devices=("cpu", "cuda")))
    assert here.problem is None and absent.problem is not None and absent.problem[0] == "missing"
    assert absent.problem[1].startswith("nothing works here on cuda; ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runtimes": ("caffe",)}, "runtime caffe has no device auto: see `moebius-edge run --help`"),
        ({"runtimes": ("tensorrt",), "devices": ("cpu",)}, "runtime tensorrt has no device cpu"),
        ({"steps": (0,)}, "steps is 0"),
        ({"cache_intervals": (0,)}, "cache interval is 0"),
    ],
)
def test_choices_that_do_not_exist(toy: Bundle, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        grid([toy], Choices(**values))
    assert message in str(caught.value)


def references(rows: list[Row], reference: Bundle | None = None) -> list[str | None]:
    return [row.reference for row in with_references(rows, reference)]


def source(digit: str) -> dict[str, dict[str, str]]:
    return {"checkpoint": {"file": "student.safetensors", "sha256": digit * 64}}


def test_the_reference_is_float32_of_the_same_checkpoint_and_settings(toy: Bundle, tmp_path: Path) -> None:
    half = changed(tmp_path / "half", precision="float16")
    other = changed(tmp_path / "other", name="other", source=source("1"))
    other_half = changed(tmp_path / "other-half", name="other", source=source("1"), precision="float16")
    rows = grid([half, toy, other, other_half], Choices(steps=(4, 8)))
    full = [f"toy-float32_onnxruntime-cpu_ddim-{n}_g2_image" for n in (4, 8)]
    others = [name.replace("toy", "other") for name in full]
    assert references(rows) == full * 2 + others * 2
    assert references(rows, other) == others * 4
    alone = changed(tmp_path / "alone", name="alone", source=source("2"), precision="float16")
    assert references(grid([toy, alone], Choices(steps=(4,)))) == [full[0]] * 2, "the first float32 bundle"
    assert references(grid([half], Choices())) == [None]
    large = Bundle.load(make_toy_bundle(tmp_path / "large", 128, name="large"))
    assert references(grid([half, large], Choices(steps=(4,))))[0] is None, "another resolution crops elsewhere"


def test_reuse_is_measured_against_none(deep: Bundle, tmp_path: Path) -> None:
    half = changed(tmp_path / "half", precision="float16")
    rows = grid([deep, half], Choices(devices=("cuda", "cpu"), cache_intervals=(5, 1)))
    whole = "deep-float32_onnxruntime-cpu_ddim-20_g2_image"
    assert references(rows) == [whole] * 8, "of either precision, wherever it runs"
    reusing = [row for row in rows if "-c5" in row.id]
    assert references(reusing) == [whole.replace("-20", "-20-c5")] * 4, "where no other was measured"
    plain = [row for row in rows if "-c5" not in row.id and row.bundle and row.bundle["precision"] == "float16"]
    only_reusing = [row for row in reusing if row.bundle and row.bundle["precision"] == "float32"]
    assert references([*only_reusing, *plain])[-1] is None, "what reuses is no reference for what does not"


def test_baselines_by_name() -> None:
    rows = baseline_rows(["telea", "navier-stokes"])
    assert [(row.id, row.kind, row.settings) for row in rows] == [
        ("telea", "baseline", None),
        ("navier-stokes", "baseline", None),
    ]
    assert references(rows) == [None, None]
