"""A float32 bundle and pictures -> an INT8 bundle, on the bundled model with few steps and small pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
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
from moebius_edge.calibration import evaluate as evaluate_module
from moebius_edge.calibration import int8 as int8_module
from moebius_edge.calibration.blocks import Block, Recipe, blocks
from moebius_edge.calibration.evaluate import mean_hole_psnr_db
from moebius_edge.calibration.int8 import Int8Options, advice, block_table, quantise_bundle
from moebius_edge.calibration.quantise import MIN_MAC_SHARE, SLOW, Quantiser, quantised_nodes
from moebius_edge.calibration.record import RecordingRuntime
from moebius_edge.calibration.search import MARGIN_DB, Search
from moebius_edge.cli import main
from moebius_edge.errors import QualityError, UsageError
from moebius_edge.export.precision import read_model
from moebius_edge.progress import no_progress
from moebius_edge.runtimes import create_runtime

TINY = Bundle.load("tiny", verify=False)
FEED_FORWARD, ATTENTION = "down_blocks.0.attentions.0.ff", "down_blocks.0.attentions.0.attn1"
CONVOLUTION, TIME = "up_blocks.0.resnets.0.conv1", "time_embedding"
RECIPE = Recipe({FEED_FORWARD: True, ATTENTION: True, CONVOLUTION: True, "conv_in": False}, (ATTENTION,))
STEPS, CASES = 3, 2


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few cases and few calls: what they are for is tested where they live."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_module, "HELD_OUT_CASES", CASES)
        patch.setattr(int8_module, "SEARCH_CASES", 1)
        patch.setattr(evaluate_module, "ROUNDS", 1)
        patch.setattr(evaluate_module, "WARM_UPS", 0)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(5):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(small, (96, 80), interpolation=cv2.INTER_CUBIC))
    return folder


def quantise(where: Path, pictures: Path, recipe: Recipe | None, **changes: Any) -> tuple[Bundle, list[str]]:
    """``where`` gets ``out``, ``cache`` and the recipe's file."""
    file = None
    if recipe is not None:
        recipe.save(file := where / "given.json")
    reference, progress = changes.pop("reference", TINY), changes.pop("progress", no_progress)
    options = Int8Options(where / "cache", str(pictures), recipe=file, steps=STEPS)
    return quantise_bundle(reference, where / "out", dataclasses.replace(options, **changes), progress)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> SimpleNamespace:
    folder, stages = tmp_path_factory.mktemp("exported"), list[str]()
    bundle, notes = quantise(folder, pictures, RECIPE, progress=lambda *step: stages.append(step[0]))
    return SimpleNamespace(bundle=bundle, notes=notes, stages=stages, cache=folder / "cache")


@pytest.fixture
def recorded(exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose cache holds the recording already; it is not recorded again."""

    def record(self: RecordingRuntime) -> None:
        raise AssertionError("recorded again")

    shutil.copytree(exported.cache, tmp_path / "cache")
    monkeypatch.setattr(RecordingRuntime, "activate", record)
    return tmp_path


def weight_types(bundle: Bundle, component: str) -> Counter[str]:
    """The number of constant values by type."""
    numbers: Counter[str] = Counter()
    for tensor in onnx.load(bundle.component_path(component)).graph.initializer:
        numbers[TensorProto.DataType.Name(tensor.data_type)] += math.prod(tensor.dims)
    return numbers


def nodes_of(names: Sequence[str]) -> list[str]:
    return sorted(n for b in blocks(read_model(TINY.component_path("denoiser"))) if b.name in names for n in b.nodes)


def test_the_bundle_says_how_it_was_quantised(exported: SimpleNamespace) -> None:
    bundle, expected = exported.bundle, nodes_of(sorted(RECIPE.chosen))
    assert Bundle.load(bundle.path) == bundle and (bundle.name, bundle.precision) == ("out", "int8")
    graphs = ["denoiser.onnx", "denoiser_shallow.onnx", "vae_decoder.onnx", "vae_encoder.onnx"]
    assert sorted(bundle.files) == sorted([*graphs, "recipe.json"])
    int8 = bundle.int8
    whole, part = (onnx.load(bundle.component_path(name)) for name in ("denoiser", "denoiser_shallow"))
    assert sorted(int8["nodes"]) == expected == sorted(quantised_nodes(whole))
    assert (int8["quantised_products"], int8["products"]) == (len(expected), 213)
    assert (int8["rest"], int8["ranges"]) == ("float16", "mse") and int8["calibration"]["steps"] == STEPS
    rows = {row["name"]: row for row in int8["blocks"]}
    assert {name for name, row in rows.items() if row["quantised"]} == RECIPE.chosen
    assert {name for name, row in rows.items() if row.get("smoothed")} == {ATTENTION}
    share = sum(row["share"] for row in rows.values() if row["quantised"])
    assert int8["share_of_multiplications"] == pytest.approx(share, abs=2e-4)
    assert Recipe.load(bundle.path / "recipe.json") == RECIPE == Recipe.load(exported.cache / "recipe.json")
    inherited = ("defaults", "scaling_factor", "resolution", "source", "licence", "model", "distilled_guidance")
    for field in (*inherited, "deep_channels"):
        assert getattr(bundle, field) == getattr(TINY, field), field
    # Of the recipe the shallow part has the blocks at the finest level, with the same integers and scales.
    assert sorted(int8["shallow_nodes"]) == nodes_of([FEED_FORWARD, ATTENTION]) == sorted(quantised_nodes(part))
    constants = {t.name: t.SerializeToString() for t in whole.graph.initializer}
    assert all(constants[t.name] == t.SerializeToString() for t in part.graph.initializer)
    assert 0 <= bundle.gate["shallow_difference"] <= 1e-2


def test_the_gate_is_the_worst_of_the_held_out_cases(exported: SimpleNamespace) -> None:
    gate, cases = exported.bundle.gate, exported.bundle.int8["cases"]
    assert [case["name"] for case in cases] == ["4.png", "4.png, hole 2"], "the picture that was not recorded"
    for key in ("hole_psnr_db", "hole_ssim", "psnr_db", "ssim"):
        assert gate[key] == min(case[key] for case in cases), key
    assert gate["hole_psnr_db"] >= gate["min_psnr_db"] == 30.0 and len(gate["latent_rms_drift"]) == STEPS - 1
    assert gate["mean_hole_psnr_db"] == mean_hole_psnr_db(cases) > gate["hole_psnr_db"]
    assert (gate["cases"], gate["steps"], gate["guidance"], gate["start"]) == (CASES, STEPS, 3.0, "image")
    assert gate["guidance"] == TINY.defaults["guidance"]
    assert exported.bundle.int8["calibration"]["pictures"].startswith("4:")


def test_the_rest_is_fp16(exported: SimpleNamespace) -> None:
    bundle = exported.bundle
    types = weight_types(bundle, "denoiser")
    assert types["INT8"] > 10_000 and types["FLOAT16"] > 20 * types["FLOAT"]
    encoder, decoder = (weight_types(bundle, name) for name in ("vae_encoder", "vae_decoder"))
    assert encoder["FLOAT16"] > 20 * encoder["FLOAT"] and decoder["FLOAT16"] > 20 * decoder["FLOAT"]
    assert {name: p["type"] for name, p in bundle.precisions.items()} == {
        **dict.fromkeys(("vae_encoder", "vae_decoder"), "float16"),
        **dict.fromkeys(("denoiser", "denoiser_shallow"), "int8"),
    }
    assert "LayerNormalization" in bundle.float32_islands["denoiser"]
    assert bundle.files["denoiser.onnx"]["bytes"] < 0.55 * read_model(TINY.component_path("denoiser")).ByteSize()
    (note,) = create_runtime("onnxruntime", bundle, "cpu").notes
    assert note.startswith("this bundle is INT8, for which onnxruntime has no kernels on cpu")


def test_a_user_is_told_what_matters(exported: SimpleNamespace) -> None:
    speed = exported.bundle.int8["speed"]
    assert exported.notes[:2] == [
        "5 calibration pictures are few: ranges may be too narrow for others, give 20",
        "5 of 5 calibration pictures have no mask: holes are drawn for them",
    ]
    assert speed["device"] == "cpu" and speed["other"] == "float32"
    assert ["does not pay" in note for note in exported.notes[2:]] == [True] * (speed["speedup"] <= 1)
    stages = list(dict.fromkeys(exported.stages))
    assert stages[0] == "record 0.png, 1 of 4" and stages[-1] == "speed beside INT8"
    assert "gate, held-out pictures: float32" in stages and "gate, held-out pictures" in stages


def test_a_missed_gate_saves_nothing_but_the_work(
    recorded: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, as a user would: the recording is there already and is used."""
    Recipe({CONVOLUTION: True, ATTENTION: False}).save(recorded / "mine.json")
    command = ["export", "tiny", "--precision", "int8", "-o", str(recorded / "out"), "--steps", str(STEPS)]
    command += ["--calibration-data", str(pictures), "--calibration-cache", str(recorded / "cache")]
    assert main([*command, "--int8-recipe", str(recorded / "mine.json"), "--min-psnr", "199.5"]) == 5
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert line.startswith("error: quality gate missed: in the hole of 4.png") and "199.5 dB is the floor" in line
    assert f"(mean of {CASES} held-out cases " in line and f"the blocks that cost most: {CONVOLUTION} (100% of" in line
    assert f"set them to false in {recorded}/cache/recipe.json and pass it with --int8-recipe" in line
    assert sorted(p.name for p in recorded.iterdir()) == ["cache", "mine.json"]
    measured = json.loads((recorded / "cache" / "sensitivity.json").read_text())["result"]
    assert measured.keys() == {CONVOLUTION}, "the recipe's blocks alone"


@pytest.mark.slow
def test_the_gate_and_the_speed_can_be_openvinos(
    recorded: Path, pictures: Path, exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which computes the very file, with the roundings of another type in its rest."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install moebius-edge[openvino]")
    monkeypatch.setenv("XDG_CACHE_HOME", str(recorded / "models"))
    bundle, _ = quantise(recorded, pictures, RECIPE, gate_runtime="openvino")
    assert bundle.files["denoiser.onnx"] == exported.bundle.files["denoiser.onnx"]
    assert (bundle.gate["runtime"], exported.bundle.gate["runtime"]) == ("openvino", "onnxruntime")
    assert bundle.gate["hole_psnr_db"] >= 30 and bundle.gate["hole_psnr_db"] != exported.bundle.gate["hole_psnr_db"]
    assert bundle.int8["speed"]["runtime"].startswith("openvino 20") and bundle.int8["speed"]["other"] == "float16"


def refused(where: Path, pictures: Path, match: str, recipe: Recipe | None = RECIPE, **changes: Any) -> None:
    """Before anything is recorded, and nothing is left."""
    with pytest.raises(UsageError, match=match):
        quantise(where, pictures, recipe, **changes)
    assert not (where / "cache").exists() and not list(where.glob(".moebius-*"))


def test_without_photographs_one_line_says_what_to_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "tiny", "--precision", "int8", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: INT8 is calibrated on photographs, 20 or more of the kind to fill, and none are named: name their "
        "folder, such as `moebius-edge export tiny --precision int8 --calibration-data photos -o tiny-int8`\n"
    )


def test_what_cannot_be_quantised_is_refused_first(pictures: Path, tmp_path: Path) -> None:
    half = dataclasses.replace(TINY, precision="float16")
    refused(tmp_path, pictures, "is in float16: INT8 is made of a float32 bundle", reference=half)
    refused(tmp_path, pictures, "does not have: attic: remove them", Recipe({"attic": True}))
    refused(tmp_path, pictures, "given.json quantises nothing: set a block to true", Recipe({FEED_FORWARD: False}))
    few = shutil.copytree(pictures, tmp_path / "few")
    (few / "4.png").unlink()
    refused(tmp_path, few, "too few calibration pictures, 4: give at least 5")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(tmp_path, pictures, "out exists and is not empty: remove it or name another")


def test_what_is_read_or_kept_is_not_replaced(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = Bundle.load(shutil.copytree(ASSETS / "tiny", out), verify=False)
    refused(tmp_path, pictures, "out holds .*out, which is used or kept: name another output", reference=reference)
    refused(tmp_path, pictures, "out holds .*cache, which is used", folder=out / "cache")
    refused(tmp_path, out / "pictures", "out holds .*pictures, which is used")
    refused(tmp_path, pictures, "out holds .*masks, which is used", masks=str(out / "masks"))
    assert Bundle.load(out).files == TINY.files


def test_the_table_says_of_each_block_what_it_costs_and_brings() -> None:
    """A recipe may name a block that has no product, or smooth one that is not quantised."""
    every = [Block(n, (f"{n}/1", f"{n}/2"), frozenset(), macs) for n, macs in (("a", 75), ("b", 20), ("e", 5))]
    quantiser: Any = SimpleNamespace(blocks=every, share=lambda block: block.macs / 100)
    sensitivity = {"a": {"psnr_db": 45.0}, "b": {"psnr_db": 30.0, "smoothed_psnr_db": 41.0}}
    recipe = Recipe({"a": True, "b": True, "e": True}, ("b", "e"))
    assert block_table(quantiser, recipe, ["a/2", "b/1"], sensitivity) == [
        {"name": "a", "psnr_db": 45.0, "share": 0.75, "quantised": True},
        {"name": "b", "psnr_db": 30.0, "share": 0.2, "smoothed_psnr_db": 41.0, "quantised": True, "smoothed": True},
        {"name": "e", "psnr_db": None, "share": 0.05, "quantised": False},
    ]


def test_advice_where_int8_does_not_pay() -> None:
    def said(speedup: float, device: str, runtime: str, other: str = "float16") -> str:
        times = {"speedup": speedup, "int8_ms": 20.5, "other_ms": 20.5 * speedup, "runtime": f"{runtime} 1.2"}
        return "".join(advice({**times, "device": device, "other": other}))

    assert said(1.01, "cpu", "openvino") == said(2.0, "cuda", "onnxruntime") == ""
    slow = "INT8 does not pay in {} on this machine's {}: 20.5 ms a call, float16 16.4 ms; use --precision fp16 here"
    assert said(0.8, "cpu", "openvino") == slow.format("openvino", "cpu")
    elsewhere = ", or measure it in what computes INT8: engines, or on a CPU OpenVINO, with --gate-runtime openvino"
    assert said(0.8, "cuda", "onnxruntime") == slow.format("onnxruntime", "cuda") + elsewhere
    assert "float32 16.4 ms; use --precision fp32 here, or" in said(0.8, "cpu", "onnxruntime", "float32")


@pytest.mark.slow
def test_without_a_recipe_one_is_found(recorded: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (FEED_FORWARD, ATTENTION, CONVOLUTION, "conv_in")

    class Small(Quantiser):
        """Some blocks of the model alone."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.blocks = [b for b in self.blocks if b.name in few]
            self.candidates = [b for b in self.candidates if b.name in few[:3]]
            self.smoothable = self.smoothable & {ATTENTION}

    monkeypatch.setattr(int8_module, "Quantiser", Small)
    bundle, _ = quantise(recorded, pictures, None)
    recipe = Recipe.load(bundle.path / "recipe.json")
    assert recipe.quantised == dict.fromkeys(few[:3], True) | {"conv_in": False}
    rows = {row["name"]: row for row in bundle.int8["blocks"]}
    measured = json.loads((recorded / "cache" / "sensitivity.json").read_text())["result"]
    assert rows.keys() == set(few) and measured.keys() == set(few[:3]), "the candidates alone are measured"
    alone = {name: 10 ** (-rows[name]["psnr_db"] / 10) for name in measured}
    ratios = [alone[name] / row["plain"] for name, row in measured.items()]
    assert max(ratios) / min(ratios) < 1.01, "decibels follow from the errors in the noise"
    assert "smoothed_psnr_db" in rows[ATTENTION] and bundle.int8["quantised_products"] == len(nodes_of(few[:3]))


def test_after_a_missed_gate_the_search_goes_on_for_what_was_missing(
    recorded: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The searched pictures reach 60 dB and the held-out ones less than the floor: so much more is asked of those."""
    floors: list[float] = []

    def find_recipe(self: Search, floor: float) -> Recipe:
        floors.append(floor)
        self.reached_db = 60.0
        return RECIPE

    monkeypatch.setattr(Search, "find_recipe", find_recipe)
    with pytest.raises(QualityError, match=r"INT8 is (\d+\.\d+) dB from float32, 100 dB is the floor") as caught:
        quantise(recorded, pictures, None, min_psnr_db=100.0)
    worst = float(str(caught.value).partition("INT8 is ")[2].split()[0])
    raised = pytest.approx(60 + (100 - worst) - MARGIN_DB, abs=0.01)
    assert floors == [100.0, raised, raised]


@pytest.mark.slow
def test_every_candidate_of_the_bundled_model_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX builds what was saved. It is below the usual floor of 30 dB: a search would leave blocks out."""
    photographs = ("motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "coffee.png")
    (tmp_path / "photographs").mkdir()
    for i, name in enumerate(photographs):
        (tmp_path / "photographs" / f"{i:02}-{name}").write_bytes((files("skimage.data") / name).read_bytes())
    monkeypatch.setattr(int8_module, "HELD_OUT_CASES", 4)
    every = blocks(read_model(TINY.component_path("denoiser")))
    total = sum(block.macs for block in every)
    standard = [b for b in every if not b.name.endswith(SLOW) and b.macs >= MIN_MAC_SHARE * total]
    Recipe({block.name: block in standard for block in every}).save(tmp_path / "standard.json")
    data, recipe = str(tmp_path / "photographs"), tmp_path / "standard.json"
    options = Int8Options(tmp_path / "cache", data, recipe=recipe, steps=10, min_psnr_db=23.0)
    bundle, _ = quantise_bundle(TINY, tmp_path / "out", options)
    assert {case["name"].split(",")[0] for case in bundle.int8["cases"]} == {"04-coffee.png"}
    assert len(bundle.int8["cases"]) == bundle.gate["cases"] == 4
    assert bundle.gate["hole_psnr_db"] == min(case["hole_psnr_db"] for case in bundle.int8["cases"]) < 30
    assert bundle.int8["share_of_multiplications"] >= 0.6
    assert sorted(bundle.int8["nodes"]) == sorted(node for block in standard for node in block.nodes)

    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    facts = network_facts(bundle.component_path("denoiser"))
    assert sorted(facts["quantised"]) == sorted(bundle.int8["nodes"])
    assert main(["export", str(bundle.path), "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]) == 0
    (engine,) = bundle.path.glob("engines/*/engine.json")
    plans = json.loads(engine.read_text())["plans"]
    assert plans["denoiser"]["bytes"] > 0
