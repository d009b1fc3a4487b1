"""A float32 bundle and pictures -> an INT8 bundle, on the bundled model with few steps and small pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from trt_network import network_facts

from moebius_edge.bundle.bundle import ASSETS, Bundle
from moebius_edge.calibration import int8 as int8_module
from moebius_edge.calibration import search as search_module
from moebius_edge.calibration import speed as speed_module
from moebius_edge.calibration.blocks import Block, blocks
from moebius_edge.calibration.histogram import Histogram
from moebius_edge.calibration.int8 import Int8Options, default_folder, quantise_bundle
from moebius_edge.calibration.kernels import integer_kernels
from moebius_edge.calibration.quantise import activations, quantised_nodes
from moebius_edge.calibration.quantiser import SLOW, Quantiser
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.calibration.recorder import RecordingRuntime
from moebius_edge.calibration.statistics import Statistics
from moebius_edge.cli import main
from moebius_edge.data.photographs import HELD_OUT
from moebius_edge.errors import QualityError, UsageError
from moebius_edge.export import EngineOptions, build_engines
from moebius_edge.imaging.pictures import Picture
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.runtimes.ort import OrtRuntime

TINY = Bundle.load("tiny", verify=False)
FEED_FORWARD, ATTENTION = "down_blocks.0.attentions.0.ff", "down_blocks.0.attentions.0.attn1"
CONVOLUTION, TIME = "up_blocks.0.resnets.0.conv1", "time_embedding"
RECIPE = Recipe({FEED_FORWARD: True, ATTENTION: True, CONVOLUTION: True, "conv_in": False}, (ATTENTION,))
STEPS, CASES = 3, 2


def silent(stage: str, fraction: float | None) -> None:
    """The progress of a test that looks at none."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few cases and few calls: what they are for is tested where they live."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_module, "HELD_OUT_CASES", CASES)
        patch.setattr(int8_module, "SEARCH_CASES", 1)
        patch.setattr(int8_module, "SEARCH_STEPS", STEPS)
        patch.setattr(speed_module, "ROUNDS", 1)
        patch.setattr(speed_module, "WARM_UPS", 0)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(5):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(small, (96, 80), interpolation=cv2.INTER_CUBIC))
    return folder


def quantise(
    where: Path, pictures: Path, recipe: Recipe | None, notes: list[str] | None = None, **changes: Any
) -> Bundle:
    """``where`` gets ``out``, ``cache`` and the recipe's file."""
    file = None
    if recipe is not None:
        recipe.save(file := where / "given.json")
    options = Int8Options(where / "cache", str(pictures), recipe=file, steps=STEPS)
    options = dataclasses.replace(options, **{k: v for k, v in changes.items() if k not in ("reference", "progress")})
    return quantise_bundle(
        changes.get("reference", TINY),
        where / "out",
        options,
        name="out",
        progress=changes.get("progress", silent),
        note=[].append if notes is None else notes.append,
    )


def quantised(tmp_path_factory: pytest.TempPathFactory, pictures: Path, target: str) -> SimpleNamespace:
    folder, notes = tmp_path_factory.mktemp(target), list[str]()
    told: list[tuple[str, float | None]] = []
    bundle = quantise(folder, pictures, RECIPE, notes, target=target, progress=lambda *values: told.append(values))
    return SimpleNamespace(bundle=bundle, notes=notes, told=told, folder=folder, cache=folder / "cache")


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> SimpleNamespace:
    return quantised(tmp_path_factory, pictures, "tensorrt")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> SimpleNamespace:
    return quantised(tmp_path_factory, pictures, "cpu")


@pytest.fixture
def recorded(tensorrt: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder whose cache holds the recording already."""
    shutil.copytree(tensorrt.cache / "recorded", tmp_path / "cache" / "recorded")
    return tmp_path


@pytest.fixture
def no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: RecordingRuntime) -> None:
        raise AssertionError("recorded again")

    monkeypatch.setattr(RecordingRuntime, "activate", record)


def weight_types(bundle: Bundle, component: str) -> Counter[str]:
    """Values of the constants by type."""
    found: Counter[str] = Counter()
    for tensor in onnx.load(bundle.component_path(component)).graph.initializer:
        found[TensorProto.DataType.Name(tensor.data_type)] += math.prod(tensor.dims)
    return found


def products_of(names: Sequence[str]) -> list[str]:
    return sorted(n for b in blocks(onnx.load(TINY.component_path("denoiser"))) if b.name in names for n in b.nodes)


def inpaint(bundle: Bundle) -> np.ndarray:
    pixels = np.full((256, 256, 3), 90, np.uint8)
    hole = np.zeros((256, 256), bool)
    hole[100:140, 90:150] = True
    with Inpainter(bundle, OrtRuntime(bundle)) as inpainter:
        return inpainter.inpaint(Picture(pixels), hole, steps=2).picture.pixels


# --- the bundle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_the_bundle_says_how_it_was_quantised(request: pytest.FixtureRequest, target: str) -> None:
    made = request.getfixturevalue(target)
    bundle, wanted = made.bundle, products_of(sorted(RECIPE.chosen))
    assert Bundle.load(bundle.path) == bundle and (bundle.name, bundle.precision) == ("out", "int8")
    graphs = ["denoiser.onnx", "denoiser_shallow.onnx", "vae_decoder.onnx", "vae_encoder.onnx"]
    assert sorted(bundle.files) == sorted([*graphs, "recipe.json"])
    int8 = bundle.int8
    assert int8 is not None
    assert sorted(int8["nodes"]) == wanted == sorted(quantised_nodes(onnx.load(bundle.component_path("denoiser"))))
    assert (int8["quantised_products"], int8["products"]) == (len(wanted), 213)
    assert (int8["target"], int8["rest"]) == (target, {"tensorrt": "float16", "cpu": "float32"}[target])
    assert int8["ranges"] == "mse" and int8["calibration"]["steps"] == STEPS
    rows = {row["name"]: row for row in int8["blocks"]}
    assert {name for name, row in rows.items() if row["quantised"]} == RECIPE.chosen
    assert {name for name, row in rows.items() if row.get("smoothed")} == {ATTENTION}
    share = sum(row["share"] for row in rows.values() if row["quantised"])
    assert int8["share_of_multiplications"] == pytest.approx(share, abs=2e-4)
    assert Recipe.load(bundle.path / "recipe.json") == RECIPE == Recipe.load(made.cache / "recipe.json")
    kept = ("defaults", "scaling_factor", "resolution", "source", "licence", "model", "distilled_guidance")
    for field in (*kept, "deep_channels"):
        assert getattr(bundle, field) == getattr(TINY, field), field


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_the_shallow_part_is_the_quantised_denoisers_own(request: pytest.FixtureRequest, target: str) -> None:
    """Of the recipe it has the blocks at the finest level, with the same integers and scales."""
    bundle = request.getfixturevalue(target).bundle
    whole, part = (onnx.load(bundle.component_path(name)) for name in ("denoiser", "denoiser_shallow"))
    wanted = sorted(set(products_of([FEED_FORWARD, ATTENTION])))
    assert sorted(bundle.int8["shallow_nodes"]) == wanted == sorted(quantised_nodes(part))
    constants = {t.name: t.SerializeToString() for t in whole.graph.initializer}
    assert all(constants[t.name] == t.SerializeToString() for t in part.graph.initializer)
    assert 0 <= bundle.gate["shallow_difference"] <= 1e-2


def test_the_gate_is_the_worst_of_the_held_out_cases(tensorrt: SimpleNamespace) -> None:
    gate, cases = tensorrt.bundle.gate, tensorrt.bundle.int8["cases"]
    assert [case["name"] for case in cases] == ["4.png", "4.png, hole 2"], "the picture that was not recorded"
    assert gate["hole_psnr_db"] == min(case["hole_psnr_db"] for case in cases) >= gate["min_psnr_db"] == 30.0
    assert (gate["cases"], gate["steps"], gate["guidance"], gate["start"]) == (CASES, STEPS, 2.0, "image")
    statistics = Statistics.load(tensorrt.cache / "recorded")
    assert statistics is not None and statistics.done == 4


def test_for_tensorrt_the_rest_is_fp16(tensorrt: SimpleNamespace) -> None:
    bundle = tensorrt.bundle
    types = weight_types(bundle, "denoiser")
    assert types["INT8"] > 10_000 and types["FLOAT16"] > 20 * types["FLOAT"]
    encoder, decoder = (weight_types(bundle, name) for name in ("vae_encoder", "vae_decoder"))
    assert encoder["FLOAT16"] > 20 * encoder["FLOAT"] and decoder["FLOAT16"] == 0
    assert bundle.float32_islands["vae_decoder"] == "all"
    assert "LayerNormalization" in bundle.float32_islands["denoiser"]
    assert bundle.files["denoiser.onnx"]["bytes"] < 0.55 * TINY.files["denoiser.onnx"]["bytes"]
    (note,) = OrtRuntime(bundle).notes
    assert note.startswith("this bundle is INT8 for tensorrt: on cpu it gives the same pictures slowly")


def test_for_a_cpu_the_rest_is_float32_and_the_kernels_are_integer(cpu: SimpleNamespace) -> None:
    bundle = cpu.bundle
    types = weight_types(bundle, "denoiser")
    assert types["INT8"] > 10_000 and types["FLOAT16"] == 0
    assert sum(integer_kernels(bundle.component_path("denoiser")).values()) >= len(bundle.int8["nodes"])
    for name in ("vae_encoder.onnx", "vae_decoder.onnx"):
        assert bundle.files[name] == TINY.files[name]
    assert bundle.float32_islands == {} and OrtRuntime(bundle).notes == []


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_it_inpaints_what_float32_does(request: pytest.FixtureRequest, target: str) -> None:
    made, wanted = (inpaint(b).astype(int) for b in (request.getfixturevalue(target).bundle, TINY))
    assert 0 < np.abs(made - wanted).max() <= 24 and np.abs(made - wanted).mean() < 1


def test_a_user_is_told_what_matters(tensorrt: SimpleNamespace, cpu: SimpleNamespace) -> None:
    for made in (tensorrt, cpu):
        speed = made.bundle.int8["speed"]
        assert made.notes[:2] == [
            "5 calibration pictures are few: ranges may be too narrow for others, 16 are better",
            "5 of 5 calibration pictures have no mask: holes are drawn for them",
        ]
        assert speed["device"] == "cpu" and speed["other"] == "float32"
        assert ["does not pay" in note for note in made.notes[2:]] == [True] * (speed["speedup"] <= 1)
    stages = list(dict.fromkeys(stage for stage, _ in tensorrt.told))
    assert stages[0] == "record 0.png, 1 of 4" and stages[-1] == "write bundle.json"
    assert "gate, held-out pictures: float32" in stages and "gate, held-out pictures" in stages
    assert all(fraction is None or 0 <= fraction <= 1 for _, fraction in tensorrt.told)


# --- what is kept, and what is not ------------------------------------------------------------------------


def test_a_missed_gate_saves_nothing_but_the_work(
    recorded: Path, pictures: Path, no_recording: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, as a user would: the recording is there already and is used."""
    RECIPE.save(recorded / "mine.json")
    command = ["export", "tiny", "--precision", "int8", "-o", str(recorded / "out"), "--steps", str(STEPS)]
    command += ["--calibration-data", str(pictures), "--calibration-cache", str(recorded / "cache")]
    assert main([*command, "--int8-recipe", str(recorded / "mine.json"), "--min-psnr", "99.5"]) == 5
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert line.startswith("error: quality gate missed: in the hole of 4.png") and "99.5 dB is the floor" in line
    for name in RECIPE.chosen:
        assert f"{name} (" in line
    assert f"set them to false in {recorded}/cache/recipe.json and pass it with --int8-recipe" in line
    assert sorted(p.name for p in recorded.iterdir()) == ["cache", "mine.json"]
    assert sorted(p.name for p in (recorded / "cache").iterdir()) == ["recipe.json", "recorded", "sensitivity.json"]
    measured = json.loads((recorded / "cache" / "sensitivity.json").read_text())
    assert measured["plain_psnr_db"].keys() == RECIPE.chosen, "of the recipe's blocks alone"


def test_an_interrupted_export_goes_on(pictures: Path, tmp_path: Path, tensorrt: SimpleNamespace) -> None:
    def stop(stage: str, fraction: float | None) -> None:
        if stage.startswith("record 2.png"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path, pictures, RECIPE, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "given.json"], "neither output nor half of one"
    statistics = Statistics.load(tmp_path / "cache" / "recorded")
    assert statistics is not None and statistics.done == 2
    told: list[str] = []
    bundle = quantise(tmp_path, pictures, RECIPE, progress=lambda stage, fraction: told.append(stage))
    assert not any(stage.startswith(("record 0.png", "record 1.png")) for stage in told)
    assert bundle.files["denoiser.onnx"] == tensorrt.bundle.files["denoiser.onnx"], "it ends in the same file"


# --- what is refused --------------------------------------------------------------------------------------


def refused(where: Path, pictures: Path, match: str, recipe: Recipe | None = RECIPE, **changes: Any) -> None:
    """Told before anything is recorded, and nothing is left."""
    with pytest.raises(UsageError, match=match):
        quantise(where, pictures, recipe, **changes)
    assert not (where / "cache").exists() and not list(where.glob(".moebius-*"))


def test_only_float32_is_quantised(pictures: Path, tmp_path: Path) -> None:
    half = dataclasses.replace(TINY, precision="float16")
    refused(tmp_path, pictures, "is in float16: INT8 is made of a float32 bundle", reference=half)


def test_options_are_checked_first(pictures: Path, tmp_path: Path) -> None:
    refused(tmp_path, pictures, "there is no target 'gpu' for INT8: choose one of tensorrt, cpu", target="gpu")
    refused(tmp_path, pictures, "unknown range method 'widest': choose one of minmax", ranges="widest")
    refused(tmp_path, pictures, "does not have: attic: remove them", Recipe({"attic": True}))
    refused(tmp_path, pictures, "given.json quantises nothing: set a block to true", Recipe({FEED_FORWARD: False}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(tmp_path, pictures, "out exists and is not empty: remove it or name another")


def test_too_few_pictures(pictures: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    (few / "4.png").unlink()
    refused(tmp_path, few, "too few calibration pictures, 4: give at least 5")


def test_what_is_read_or_kept_is_not_replaced(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copied = shutil.copytree(ASSETS / "tiny", out)
    reference = Bundle.load(copied, verify=False)
    refused(tmp_path, pictures, "out holds .*out, which is used or kept: name another output", reference=reference)
    refused(tmp_path, pictures, "out holds .*cache, which is used", folder=out / "cache")
    refused(tmp_path, out / "pictures", "out holds .*pictures, which is used")
    refused(tmp_path, pictures, "out holds .*masks, which is used", masks=str(out / "masks"))
    assert Bundle.load(out).files == TINY.files


@pytest.mark.parametrize(("largest", "shown"), [(0.0, "is 0, which has no scale"), (np.inf, "is inf, not finite")])
def test_a_range_that_is_zero_or_not_finite_names_its_tensor(
    recorded: Path, pictures: Path, largest: float, shown: str
) -> None:
    statistics = Statistics.load(recorded / "cache" / "recorded")
    assert statistics is not None
    recipe = Recipe({FEED_FORWARD: True})
    name = activations(onnx.load(TINY.component_path("denoiser")), recipe)[0]
    tensor = statistics.tensors[name]
    tensor.maximum = largest
    if not largest:
        tensor.histogram, tensor.minimum = Histogram(), 0.0
    statistics.save(recorded / "cache" / "recorded")
    with pytest.raises(UsageError, match=f"the range of activation {name} {shown}"):
        quantise(recorded, pictures, recipe, ranges="minmax")
    assert not (recorded / "out").exists()


def test_a_recipe_of_nothing_that_the_target_computes(cpu: SimpleNamespace, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(cpu.cache / "recorded", tmp_path / "cache" / "recorded")
    with pytest.raises(UsageError, match="the recipe leaves nothing in INT8 for cpu: set a block to true that"):
        quantise(tmp_path, pictures, Recipe({TIME: True}), target="cpu")
    assert not (tmp_path / "out").exists()


# --- with a search ----------------------------------------------------------------------------------------

FEW = (FEED_FORWARD, ATTENTION, CONVOLUTION, "conv_in")


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search sees some blocks of the model alone."""

    class Small(Quantiser):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.blocks: list[Block] = [b for b in self.blocks if b.name in FEW]
            self.candidates = [b for b in self.candidates if b.name in FEW[:3]]
            self.smoothable = self.smoothable & {ATTENTION}

    monkeypatch.setattr(int8_module, "Quantiser", Small)


@pytest.mark.slow
def test_without_a_recipe_one_is_found(
    recorded: Path, pictures: Path, no_recording: None, few_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantise(recorded, pictures, None)
    recipe = Recipe.load(bundle.path / "recipe.json")
    assert recipe.quantised == dict.fromkeys(FEW[:3], True) | {"conv_in": False}
    assert bundle.int8 is not None
    rows = {row["name"]: row for row in bundle.int8["blocks"]}
    known = json.loads((recorded / "cache" / "sensitivity.json").read_text())
    assert {name: row["psnr_db"] for name, row in rows.items()} == known["plain_psnr_db"]
    assert rows[ATTENTION]["smoothed_psnr_db"] == known["smoothed_psnr_db"][ATTENTION]
    assert bundle.int8["quantised_products"] == len(products_of(FEW[:3]))

    shutil.rmtree(bundle.path)
    worst = min(FEW[:3], key=known["plain_psnr_db"].__getitem__)
    monkeypatch.setattr(search_module, "MARGIN_DB", 4.0)
    floor = known["plain_psnr_db"][worst] - 3  # with the margin, the worst block alone is below it
    told: list[str] = []
    again = quantise(recorded, pictures, None, min_psnr_db=floor, progress=lambda s, f: told.append(s))
    assert not any(stage.startswith("sensitivity") for stage in told), "another floor measures no block again"
    assert any(stage.startswith("recipe 1, ") for stage in told)
    assert worst not in Recipe.load(again.path / "recipe.json").chosen


def test_where_no_block_passes_nothing_is_saved(recorded: Path, pictures: Path, few_blocks: None) -> None:
    with pytest.raises(QualityError, match="no block can be quantised: 151 dB in the hole are wanted"):
        quantise(recorded, pictures, None, min_psnr_db=150.0)
    assert not (recorded / "out").exists() and (recorded / "cache" / "sensitivity.json").is_file()


def test_the_cache_lies_beside_the_output() -> None:
    assert default_folder(Path("a/b")) == Path("a/b.calibration")


# --- as a user has it -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_standard_recipe_passes_on_the_bundled_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of the bundled model in INT8 at its usual steps, and TensorRT for RTX builds what was saved."""
    monkeypatch.setattr(int8_module, "HELD_OUT_CASES", 16)
    monkeypatch.setattr(speed_module, "ROUNDS", 5)
    every = blocks(onnx.load(TINY.component_path("denoiser")))
    total = sum(block.multiplications for block in every)
    standard = [b for b in every if not b.name.endswith(SLOW) and b.multiplications >= 0.002 * total]
    recipe = Recipe({block.name: block in standard for block in every})
    recipe.save(tmp_path / "standard.json")
    options = Int8Options(tmp_path / "cache", recipe=tmp_path / "standard.json", steps=20)
    notes: list[str] = []
    bundle = quantise_bundle(TINY, tmp_path / "out", options, progress=silent, note=notes.append)
    assert "calibrating on 12 photographs that come with packages" in notes[0] and bundle.int8 is not None
    assert {case["name"].split(",")[0] for case in bundle.int8["cases"]} == set(HELD_OUT)
    assert len(bundle.int8["cases"]) == bundle.gate["cases"] == 16
    assert bundle.gate["hole_psnr_db"] == min(case["hole_psnr_db"] for case in bundle.int8["cases"]) >= 30
    assert bundle.int8["share_of_multiplications"] >= 0.6
    assert sorted(bundle.int8["nodes"]) == sorted(node for block in standard for node in block.nodes)

    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    facts = network_facts(bundle.component_path("denoiser"))
    assert sorted(facts["quantised"]) == sorted(bundle.int8["nodes"])
    wanted = EngineOptions("tensorrt-rtx", compute_capabilities=("8.6",))
    engine = build_engines(bundle, wanted).engine
    assert engine.plans["denoiser"]["bytes"] > 0
