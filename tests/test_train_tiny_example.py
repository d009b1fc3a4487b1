"""The example that trains the demonstration model: its data, its metrics, and that a training resumes exactly."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from examples.train_tiny import autoencoder, data, denoiser, metrics, objects, sharpen, training
from moebius_edge.errors import UsageError

SMALL = ["--set", "block_out_channels=[8,8,8,8]", "--set", "validation=1", "--pixels", "8192", "--sides", "64", "32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn photographs, one more in a folder of its own."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "aside").mkdir()
    for name in ("a.png", "b.png", "c.jpg", "aside/d.png"):
        noise = cv2.GaussianBlur(rng.uniform(0, 255, (96, 120, 3)), (0, 0), 3)
        cv2.imwrite(str(folder / name), cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8))
    return folder


def textured(side: int = 256) -> np.ndarray:
    grey = cv2.GaussianBlur(np.random.default_rng(1).uniform(0, 255, (side, side)), (0, 0), 1)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)


def test_photographs_are_listed_without_the_excluded_folder(photos: Path) -> None:
    assert data.list_photographs(photos) == ["a.png", "aside/d.png", "b.png", "c.jpg"]
    assert data.list_photographs(photos, ["aside"]) == ["a.png", "b.png", "c.jpg"]
    with pytest.raises(UsageError, match="holds no picture"):
        data.list_photographs(photos / "aside", ["aside"]) and data.list_photographs(Path(__file__).parent / "data")


def test_validation_photographs_do_not_depend_on_the_others() -> None:
    names = [f"{i}.png" for i in range(20)]
    train, aside = data.split_validation(names, 5)
    assert sorted(train + aside) == sorted(names) and len(aside) == 5
    fewer = [name for name in names if name in aside or name in train[:8]]
    assert data.split_validation(fewer, 5)[1] == aside


def test_the_cache_returns_the_decoded_photographs(photos: Path, tmp_path: Path) -> None:
    names = data.list_photographs(photos, ["aside"])
    for cache in (data.open_cache(tmp_path / "photos.bin", photos, names) for _ in range(2)):  # made, then found
        expected = cv2.imread(str(photos / "b.png"))[..., ::-1]
        assert len(cache) == 3 and (cache[1] == expected).all()


def test_a_damaged_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"bad\.png cannot be decoded"):
        data.open_cache(tmp_path / "photos.bin", tmp_path, ["bad.png"])


def test_every_training_picture_depends_on_its_number_alone(photos: Path, tmp_path: Path) -> None:
    mixture = data.PictureMixture(data.open_cache(tmp_path / "photos.bin", photos, ["a.png", "b.png"]), seed=3)
    pictures = [mixture(number, 48) for number in range(60)]
    assert all(picture.shape == (48, 48, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert all((mixture(number, 48) == pictures[number]).all() for number in (59, 7, 30))
    assert len({picture.tobytes() for picture in pictures}) == 60


def test_metrics_of_a_perfect_autoencoder() -> None:
    figures = metrics.evaluate(lambda picture: picture, [textured()], (0, 255))
    assert figures["psnr_db"] > 100 and figures["flat_error_max"] == 0
    assert all(figures[name] == pytest.approx(1) for name in ("texture_ratio", "mesh_ratio", "mesh_excess"))


def test_metrics_see_blur_and_do_not_take_it_for_a_mesh() -> None:
    figures = metrics.evaluate(lambda picture: cv2.GaussianBlur(picture, (0, 0), 1), [textured()], (0,))
    assert figures["texture_ratio"] < 0.3 and figures["mesh_ratio"] < 0.6
    assert figures["mesh_excess"] == pytest.approx(1, abs=0.15)


def test_metrics_see_a_mesh_and_wrong_flat_colours() -> None:
    mesh = np.tile(np.kron(np.eye(2), np.ones((4, 4))) * 12, (32, 32))[..., None]

    def meshed(picture: np.ndarray) -> np.ndarray:
        return np.clip(picture + mesh, 0, 255).astype(np.uint8)

    figures = metrics.evaluate(meshed, [textured()], (0, 100))
    assert figures["mesh_ratio"] > 1.1 and figures["mesh_excess"] > 1.2
    assert figures["flat_error_max"] == figures["flat_error_99"] == 12


@pytest.mark.parametrize(
    ("setting", "message"), [("width=3", "has no width"), ("warmup=much", "write the value as JSON")]
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training.changed(autoencoder.Recipe(), [setting])


@pytest.mark.slow
def test_an_interrupted_training_continues_exactly(photos: Path, tmp_path: Path) -> None:
    common = ["--photos", str(photos), "--exclude", "aside", "--cache", str(tmp_path / "photos.bin"), *SMALL]

    def run(output: str, *more: str) -> bytes:
        autoencoder.main([*common, "--output", str(tmp_path / output), *more])
        return (tmp_path / output / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = run("whole", "--decay-over", "4")
    run("parts", "--decay-over", "4", "--steps", "2")
    assert run("parts") == whole

    vae = str(tmp_path / "whole" / "vae")
    sharpen_options = [option for option in common if not option.startswith("block_out")]
    sharpen_options.remove("--set")
    sharpen.main([*sharpen_options, "--vae", vae, "--output", str(tmp_path / "sharpened"), "--steps", "2"])
    assert (tmp_path / "sharpened" / "sheet-000002.png").exists()


def test_only_holes_of_the_foreground_branch_hold_an_object(photos: Path, tmp_path: Path) -> None:
    mixture = data.PictureMixture(data.open_cache(tmp_path / "photos.bin", photos, ["a.png", "b.png"]), seed=0)
    samples = objects.BranchSamples(mixture, side=64)
    drawn = [samples(number) for number in range(40)]
    assert {branch for _, _, branch in drawn} == {objects.BACKGROUND, objects.FOREGROUND}
    assert all(mask.any() and not mask.all() and picture.shape == (64, 64, 3) for picture, mask, _ in drawn)
    again = samples(11)
    assert all(np.array_equal(a, b) for a, b in zip(again, drawn[11], strict=True))

    rng = np.random.default_rng(0)
    outline = objects.draw_outline(rng, 64)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    changed = objects.paste_object(rng, black, white, outline).any(-1)
    assert 0.01 < changed.mean() < 0.5 and not (changed & ~objects.covering_mask(rng, outline)).any()


@pytest.mark.slow
@pytest.mark.slow
def test_an_interrupted_denoiser_continues_exactly(photos: Path, tmp_path: Path) -> None:
    vae = autoencoder.build_autoencoder(autoencoder.Recipe(block_out_channels=(8, 8, 8, 8)))
    vae.save_pretrained(tmp_path / "vae")
    common = ["--vae", str(tmp_path / "vae"), "--photos", str(photos), "--device", "cpu", "--batch", "3"]

    def run(output: str, save_every: int) -> bytes:
        folder = tmp_path / output
        denoiser.main([*common, "--output", str(folder), "--steps", "2", "--save-every", str(save_every)])
        return (folder / "student.safetensors").read_bytes()

    whole = run("whole", 1)
    checkpoints = tmp_path / "parts" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000000001.pt").write_bytes(
        (tmp_path / "whole" / "checkpoints" / "step-000000001.pt").read_bytes()
    )
    assert run("parts", 2) == whole
