"""``moebius-edge compare`` from the outside: two bundles, two runtimes, two denoisers, and every input it refuses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from commanding import Captured, as_json, printed, refused
from fake_gpu import FakeGpu
from PIL import Image
from toy import describe_again, make_toy_bundle

from moebius_edge.commands import compare as compare_command
from moebius_edge.metrics import trajectory


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A toy whose decoder adds a hundredth to red and nothing else."""
    folder = make_toy_bundle(tmp_path / "changed", name="changed")
    model = onnx.load(folder / "vae_decoder.onnx")
    (conv,) = (n for n in model.graph.node if n.op_type == "Conv")
    conv.input.append("bias")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.01, 0, 0], np.float32), "bias"))
    onnx.save(model, folder / "vae_decoder.onnx")
    return describe_again(folder)


def test_a_bundle_equals_itself(toy: Path, capsys: Captured) -> None:
    document = as_json(capsys, "compare", toy, toy, "--steps", "4", "--guidance", "1.5", "--seed", "3")
    figures = document["figures"]
    assert (figures["psnr_db"], figures["ssim"], figures["image_max_difference"]) == (200.0, 1.0, 0.0)
    assert figures["latent_drift"] == figures["latent_rms_drift"] == [0.0, 0.0, 0.0]
    settings = {"steps": 4, "guidance": 1.5, "seed": 3, "image": None, "mask": None}
    assert (document["settings"], document["notes"]) == (settings, [])
    assert document["a"]["bundle"] == "toy" and document["a"]["runtime"]["name"] == "onnxruntime"


def test_a_difference_is_measured_where_it_arises(toy: Path, changed: Path, capsys: Captured) -> None:
    document = as_json(capsys, "compare", toy, changed, "--steps", "4")
    figures = document["figures"]
    assert figures["latent_max_difference"] == 0.0, "the decoder alone was changed"
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(4 / (0.01**2 / 3)), abs=0.02)
    assert figures["worst_pixel"]["channel"] == 0 and figures["worst_pixel"]["difference"] == 0.01
    assert 0.9 < figures["ssim"] < 1
    assert (document["a"]["bundle"], document["b"]["bundle"]) == ("toy", "changed")
    swapped = as_json(capsys, "compare", changed, toy, "--steps", "4")["figures"]["worst_pixel"]
    assert swapped["reference"] - swapped["value"] == pytest.approx(0.01, abs=1e-3)

    lines = printed(capsys, "compare", toy, changed, "--steps", "3")
    assert lines[0].startswith("A toy (float32), onnxruntime 1.") and lines[0].endswith(" on cpu")
    assert lines[1].startswith("B changed (float32), ")
    assert lines[2] == "steps 3, guidance 2, seed 20"
    assert lines[6:8] == ["1 0 0", "2 0 0"]
    assert lines[-3] == "PSNR 50.79 dB" and lines[-2].startswith("SSIM 0.9999")
    assert re.fullmatch(r"worst pixel 1\.2[78] of 255 levels at x \d+, y \d+, red", lines[-1])


def test_two_devices_on_one_bundle(toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    document = as_json(capsys, "compare", toy, toy, "--device-a", "cpu", "--device-b", "auto", "--steps", "3")
    assert [document[side]["runtime"]["device"] for side in "ab"] == ["cpu", "cuda"]
    assert document["b"]["runtime"]["nodes"]["denoiser"], "asked while it was active"
    (note,) = document["notes"]
    assert note.startswith("B: onnxruntime on cuda is the fastest that works here")
    assert document["figures"]["psnr_db"] > 100


def test_guidance_is_by_default_that_of_the_first_bundle(toy: Path, capsys: Captured, tmp_path: Path) -> None:
    own = make_toy_bundle(tmp_path / "own")
    text = (own / "bundle.json").read_text()
    (own / "bundle.json").write_text(text.replace('"guidance": 2.0', '"guidance": 3.0'))
    assert as_json(capsys, "compare", own, toy, "--steps", "3")["settings"]["guidance"] == 3.0
    assert as_json(capsys, "compare", toy, own, "--steps", "3")["settings"]["guidance"] == 2.0


def test_distilled_guidance_is_compared_with_guiding(toy: Path, capsys: Captured, tmp_path: Path) -> None:
    distilled = make_toy_bundle(tmp_path / "distilled", name="distilled", distilled_guidance=1.5)
    document = as_json(capsys, "compare", toy, distilled, "--steps", "4")
    assert document["settings"]["guidance"] == 1.5, "the one that both can have"
    assert [document[side]["distilled_guidance"] for side in "ab"] == [None, 1.5]
    assert document["figures"]["psnr_db"] > 100
    lines = printed(capsys, "compare", toy, distilled, "--steps", "3", "--guidance", "1.5")
    assert lines[1].startswith("B distilled (float32, guidance distilled), ")
    message = "guidance is 2.0, and the model has guidance 1.5"
    refused(capsys, 2, message, "compare", toy, distilled, "--guidance", "2")
    other = make_toy_bundle(tmp_path / "other", distilled_guidance=3.0)
    message = f"{distilled} has guidance 1.5 distilled into it and {other} 3.0: compare bundles of one guidance"
    refused(capsys, 2, message, "compare", distilled, other)


def test_reuse_is_the_seconds_alone(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    deep = make_toy_bundle(tmp_path / "deep", deep=True)
    document = as_json(capsys, "compare", deep, deep, "--steps", "6", "--cache-interval", "3")
    assert [document[side]["cache_interval"] for side in "ab"] == [1, 3]
    first, *later = document["figures"]["latent_rms_drift"]
    assert first == 0.0 and later[0] > 1e-3, "the second call reuses what the first has made"
    assert document["figures"]["psnr_db"] < 200
    lines = printed(capsys, "compare", toy, deep, "--steps", "3", "--cache-interval", "2")
    assert lines[0].startswith("A toy (float32), ") and lines[1].startswith("B toy (float32, deep features every 2), ")
    message = f"cache interval is 5, and bundle {toy} was exported without"
    refused(capsys, 2, message, "compare", deep, toy, "--cache-interval", "5")
    refused(capsys, 2, "--cache-interval", "compare", deep, deep, "--cache-interval", "0")


def pictures(folder: Path, size: tuple[int, int] = (96, 80), holes: int = 1) -> tuple[str, ...]:
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    mask[30:46, 40:56] = 255 * min(holes, 1)
    mask[-20:-16, -20:-16] = 255 * (holes == 2)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)).save(folder / "photo.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return "--image", str(folder / "photo.png"), "--mask", str(folder / "mask.png")


def test_a_photograph_is_compared_where_its_largest_hole_is(
    toy: Path, changed: Path, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = []
    plain = trajectory.run_trajectory

    def recorded(runtime: Any, **options: Any) -> Any:
        scenes.append(options["scene"])
        return plain(runtime, **options)

    monkeypatch.setattr(trajectory, "run_trajectory", recorded)
    photograph = pictures(tmp_path, (400, 300), holes=2)
    document = as_json(capsys, "compare", toy, changed, *photograph, "--steps", "3")
    note = f"{photograph[3]} takes 2 windows of the picture: the one that fills most is compared"
    assert document["notes"] == [note] and document["settings"]["image"] == photograph[1]
    (pixels, hole), second = scenes
    assert second is scenes[0], "both sides see the same"
    assert pixels.shape == (1, 3, 64, 64) and pixels.dtype == np.float32 and hole.sum() == 16 * 16
    y, x = np.argwhere(hole)[0]
    original = np.asarray(Image.open(photograph[1]))[30, 40] / 127.5 - 1
    np.testing.assert_allclose(pixels[0, :, y, x], original, atol=1e-5)


def test_bad_input(toy: Path, capsys: Captured, tmp_path: Path) -> None:
    large = make_toy_bundle(tmp_path / "large", 128)
    photograph = pictures(tmp_path, holes=0)
    broken = make_toy_bundle(tmp_path / "nan", nan_in="denoiser")
    missing = ("--image", str(tmp_path / "none.png"), *photograph[2:])
    for code, message, *arguments in (
        (2, f"{toy} is for 64x64 pixels and {large} for 128x128: compare bundles of one", toy, large),
        (4, "there is no bundle folder", toy, tmp_path / "none"),
        (2, "--image and --mask go together", toy, toy, *photograph[:2]),
        (2, "--image and --mask go together", toy, toy, *photograph[2:]),
        (3, "none.png", toy, toy, *missing),
        (2, "is empty, nothing would be filled", toy, toy, *photograph),
        (4, "denoiser returned NaN", toy, broken, "--steps", "2"),
    ):
        refused(capsys, code, message, "compare", *arguments)


def test_the_default_seed_is_the_gates() -> None:
    assert compare_command.SEED == trajectory.SEED


def test_it_needs_no_pytorch(toy: Path) -> None:
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxscript', 'diffusers', 'skimage']))\n"
        f"from moebius_edge.cli import main\nsys.exit(main(['compare', {str(toy)!r}, {str(toy)!r}, '--steps', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Row:
    tensor: str
    shape: tuple[int, ...]
    relative_error: float
    psnr_db: float


def test_layers_are_shown_the_worst_first(
    toy: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself is tested where it lives; here it is replaced."""
    calls: list[tuple[Any, ...]] = []

    def compare_layers(
        a: Path, b: Path, feeds: Any = None, provider_a: str = "", provider_b: str = "", on_progress: Any = None
    ) -> list[Row]:
        on_progress("compare layers", 0, 1)
        calls.append((a, b, provider_a, provider_b))
        apart = [Row(f"t{number}", (1, 4, 8, 8), 1 / (number + 2), 40.0) for number in range(24)]
        return [*apart, Row("equal", (2,), 0.0, math.inf)]

    module = ModuleType("layers")
    module.compare_layers = compare_layers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moebius_edge.export.layers", module)
    file = tmp_path / "other.onnx"
    document = as_json(capsys, "compare", toy, file, "--layers", "--device-b", "cuda")
    assert calls == [(toy / "denoiser.onnx", file, "cpu", "cuda")]
    assert len(document["tensors"]) == 25 and document["tensors"][-1]["psnr_db"] is None
    lines = printed(capsys, "compare", toy, toy, "--layers")
    assert lines[0] == "tensor shape relative error psnr db" and len(lines) == 2 + 20
    assert lines[2] == "t0 1 x 4 x 8 x 8 0.5 40"
    refused(capsys, 4, "there is no bundle folder", "compare", toy, tmp_path / "none", "--layers")
