"""The bundled model: what ships is whole, small enough, and fills holes better than a flat colour does."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from moebius_edge.bundle import ASSETS, Bundle
from moebius_edge.cli import main
from moebius_edge.pipeline import Inpainter
from moebius_edge.quality import hole_psnr_db
from moebius_edge.training.evaluate import border_mean, held_out_cases

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_bundle_is_whole_and_within_its_size() -> None:
    bundle = Bundle.load("tiny")
    assert bundle.resolution == 256
    assert bundle.gate["psnr_db"] >= 60
    assert sum(f["bytes"] for f in bundle.files.values()) <= 25e6


def test_the_bundle_was_exported_from_the_checkpoint_beside_it() -> None:
    from moebius_edge.files import sha256_file

    source = Bundle.load("tiny").source
    checkpoint = ASSETS / "tiny" / "checkpoint"
    assert source["checkpoint"]["sha256"] == sha256_file(checkpoint / "student.safetensors")
    assert source["vae"]["sha256"] == sha256_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")


def test_the_demo_removes_the_spoon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's command: the spoon's pixels change, and nothing does beyond the seam."""
    output = tmp_path / "out.png"
    code = main(["run", str(EXAMPLES / "coffee.png"), str(EXAMPLES / "coffee_mask.png"), "-o", str(output), "--json"])
    assert code == 0
    settings = json.loads(capsys.readouterr().out)["results"][0]["settings"]
    before = cv2.imread(str(EXAMPLES / "coffee.png"))
    mask = cv2.imread(str(EXAMPLES / "coffee_mask.png"), cv2.IMREAD_GRAYSCALE) > 127
    after = cv2.imread(str(output))
    reach = int(np.ceil(max(settings["feather_px"]))) + 1
    seam = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5) <= reach
    np.testing.assert_array_equal(after[~seam], before[~seam])
    assert np.abs(after[mask].astype(int) - before[mask]).mean() > 20  # a chrome spoon against a red saucer


@pytest.mark.slow
def test_holes_of_photographs_never_trained_on_beat_the_border_mean_by_2_db() -> None:
    cases = held_out_cases()  # those of docs/tiny-model.md: 2.12 dB there, and none of them chose the defaults
    flat = np.mean([hole_psnr_db(border_mean(c.image, c.mask), c.image, c.mask) for c in cases])
    bundle = Bundle.load("tiny")
    with Inpainter(bundle) as inpainter:
        filled = [inpainter.inpaint(c.image, c.mask, **bundle.defaults).image for c in cases]
    ours = np.mean([hole_psnr_db(f, c.image, c.mask) for f, c in zip(filled, cases, strict=True)])
    assert ours >= flat + 2


@pytest.mark.slow
def test_the_bundled_checkpoint_exports_again(tmp_path: Path) -> None:
    from moebius_edge.export import export_bundle

    assert export_bundle("tiny", None, tmp_path / "again").gate["psnr_db"] >= 60


def test_int8_starts_from_the_bundled_student_unless_one_is_named() -> None:
    from moebius_edge.training.recipe import Inputs
    from moebius_edge.training.tiny import stage_recipe, with_bundled

    checkpoint = ASSETS / "tiny" / "checkpoint"
    found = with_bundled(Inputs(images="photos"))
    assert found == Inputs("photos", student=checkpoint / "student.safetensors", vae=checkpoint / "vae")
    assert found.student is not None and found.student.is_file()
    own = Inputs(student=Path("other.safetensors"))
    assert with_bundled(own) == own  # an autoencoder that is not its own would be wrong
    assert stage_recipe("int8").optimiser.batch_norm == "running"
