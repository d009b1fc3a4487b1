"""Training pictures: masks within their range, scenes and crops that repeat, photographs kept apart."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from moebius_edge.data import photographs
from moebius_edge.data.masks import PRESETS, draw_mask, sample_mask
from moebius_edge.data.photographs import HELD_OUT, TRAINING, load_photograph, random_crop
from moebius_edge.errors import MachineError
from moebius_edge.training.data import CropSource, MaskedSource, PictureSource, to_network
from moebius_edge.training.scenes import draw_scene, power_law_noise, random_colour, stripes, textured


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_mask_is_bool_and_repeats_with_its_seed(preset: str) -> None:
    masks = [draw_mask(rng(3), 64, preset) for _ in range(2)]
    assert masks[0].shape == (64, 64) and masks[0].dtype == bool
    assert np.array_equal(*masks)
    assert len({draw_mask(rng(i), 64, preset).tobytes() for i in range(8)}) == 8


def test_wider_presets_cover_more() -> None:
    thin, medium, thick = (
        np.mean([draw_mask(rng(i), 64, preset).mean() for i in range(60)]) for preset in ("thin", "medium", "thick")
    )
    assert 0 < thin < 0.6 * medium < 0.6 * thick


def test_boxes_are_upright_rectangles() -> None:
    for i in range(30):
        mask = draw_mask(rng(i), 64, "box")
        if np.array_equal(mask, np.outer(mask.any(1), mask.any(0))):  # a single rectangle
            assert min(mask.any(0).sum(), mask.any(1).sum()) >= int(64 * PRESETS["box"].box_side[0])
            return
    pytest.fail("no draw of thirty was one rectangle")


def test_a_preset_means_the_same_share_at_any_size() -> None:
    small, large = (np.mean([draw_mask(rng(i), size, "thick").mean() for i in range(80)]) for size in (64, 256))
    assert abs(small - large) < 0.05


def test_sampled_masks_cover_what_is_asked() -> None:
    shares = [sample_mask(rng(i), 64, (0.1, 0.2)).mean() for i in range(30)]
    assert min(shares) >= 0.1 and max(shares) <= 0.2


def test_a_range_that_no_preset_reaches_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no mask of presets \('thin',\) covers \(0.95, 1.0\) .* after 5 draws"):
        sample_mask(rng(0), 64, (0.95, 1.0), ("thin",), attempts=5)


def test_noise_has_unit_deviation_and_the_spectrum_asked_for() -> None:
    noise = power_law_noise(rng(1), 128, 1.5)
    assert noise.dtype == np.float32 and noise.shape == (128, 128)
    assert abs(noise.mean()) < 1e-5 and abs(noise.std() - 1) < 1e-4
    amplitude = np.abs(np.fft.rfft2(noise))
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(128)[None])
    inside = (radius > 0.03) & (radius < 0.4)
    slope = np.polyfit(np.log(radius[inside]), np.log(amplitude[inside]), 1)[0]
    assert slope == pytest.approx(-1.5, abs=0.1)


def test_stripes_stay_within_one() -> None:
    for i in range(10):
        wave = stripes(rng(i), 64)
        assert wave.shape == (64, 64) and np.abs(wave).max() <= 1 and wave.std() > 0.3


def test_colours_are_within_the_cube_and_mostly_muted() -> None:
    colours = np.stack([random_colour(rng(i)) for i in range(200)])
    assert colours.shape == (200, 3) and colours.min() >= 0 and colours.max() <= 1
    assert np.median(colours.max(1) - colours.min(1)) < 0.3


def test_a_surface_carries_its_texture() -> None:
    flat, busy = np.zeros((1, 32, 32), np.float32), power_law_noise(rng(2), 32, 0.5)[None]
    surfaces = [np.stack([textured(rng(i), 32, shared) for i in range(20)]) for shared in (flat, busy)]
    plain, rough = (np.abs(np.diff(s, axis=1)).mean() for s in surfaces)
    assert rough > 2 * plain > 0


@pytest.mark.parametrize("size", [32, 64, 100])
def test_scenes_are_pictures_that_repeat_and_vary(size: int) -> None:
    scenes = [draw_scene(rng(i), size) for i in range(6)]
    assert all(s.shape == (size, size, 3) and s.dtype == np.uint8 for s in scenes)
    assert np.array_equal(scenes[0], draw_scene(rng(0), size))
    assert len({s.tobytes() for s in scenes}) == 6
    assert np.mean([s.std() for s in scenes]) > 15  # neither black nor all clipped


def test_training_and_held_out_photographs_are_apart() -> None:
    files = [{(package, file) for package, file, _ in group.values()} for group in (TRAINING, HELD_OUT)]
    assert not set(TRAINING) & set(HELD_OUT) and not files[0] & files[1]
    assert all(licence for _, _, licence in (*TRAINING.values(), *HELD_OUT.values()))


@pytest.mark.parametrize("name", [*TRAINING, *HELD_OUT])
def test_every_photograph_loads_as_rgb(name: str) -> None:
    image = load_photograph(name)
    assert image.dtype == np.uint8 and image.shape[2] == 3 and min(image.shape[:2]) >= 256
    assert image.std() > 5


def test_a_photograph_is_rgb_not_bgr() -> None:
    sky = load_photograph("rocket")[:40].mean((0, 1))
    assert np.abs(sky - skimage.data.rocket()[:40].mean((0, 1))).max() < 2


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(MachineError, match=r'training needs skimage.data: pip install "moebius-edge\[train\]"'):
        load_photograph("coffee")


def test_a_missing_or_damaged_photograph_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photographs, "files", lambda package: tmp_path)
    with pytest.raises(MachineError, match=r"skimage.data lacks the photograph coffee.png: pip install"):
        load_photograph("coffee")
    for content in (b"", b"no image"):
        (tmp_path / "coffee.png").write_bytes(content)
        with pytest.raises(MachineError, match=r"photograph coffee.png of skimage.data is damaged: pip install"):
            load_photograph("coffee")


def test_crops_have_the_size_asked_for_and_repeat() -> None:
    image = rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    for size in (32, 64, 128):  # also larger than the picture
        crops = [random_crop(rng(i), image, size) for i in range(12)]
        assert all(c.shape == (size, size, 3) and c.dtype == np.uint8 and c.flags.c_contiguous for c in crops)
        assert np.array_equal(crops[3], random_crop(rng(3), image, size))
        assert len({c.tobytes() for c in crops}) == 12


def test_the_source_mixes_scenes_and_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius_edge.training import data

    monkeypatch.setattr(data, "load_photograph", lambda name: np.full((64, 64, 3), 1, np.uint8))
    monkeypatch.setattr(data, "random_crop", lambda rng, image, size: np.full((size, size, 3), 255, np.uint8))
    monkeypatch.setattr(data, "draw_scene", lambda rng, size: np.zeros((size, size, 3), np.uint8))
    for share in (0.0, 0.25, 1.0):
        source = PictureSource(8, share)
        white = np.mean([source(rng(i)).max() == 255 for i in range(400)])
        assert white == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)
    weights = dict(zip(TRAINING, source.weights, strict=True))
    assert source.weights.sum() == pytest.approx(1) and weights["china"] == max(source.weights) > weights["moon"]


def test_pictures_of_the_bundled_model_repeat_by_number() -> None:
    source = MaskedSource(lambda rng: rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), 64, 3, {"photo_share": 0.5})
    image, masks = source.sample_masks(5, 2)
    assert masks.shape == (2, 64, 64) and masks.dtype == bool and not np.array_equal(*masks)
    np.testing.assert_array_equal(image, np.random.default_rng([3, 5]).integers(0, 256, (64, 64, 3)))
    np.testing.assert_array_equal(source.sample_masks(5, 1)[1][0], masks[0])
    assert source.identity() == {"size": 64, "seed": 3, "photo_share": 0.5}


def test_network_input_spans_minus_one_to_one() -> None:
    pictures = np.zeros((2, 4, 6, 3), np.uint8)
    pictures[1, 2, 3] = (255, 127, 0)
    tensor = to_network(pictures)
    assert tensor.shape == (2, 3, 4, 6) and tensor.dtype == np.float32
    assert tensor[0].max() == -1.0
    assert tensor[1, :, 2, 3] == pytest.approx([1.0, 127 / 127.5 - 1, -1.0], abs=1e-6)


def test_crops_are_cut_from_one_picture_and_say_nothing_else() -> None:
    """A picture whose pixels name their places."""
    y, x = np.mgrid[0:32, 0:32].astype(np.uint8)
    picture = np.stack([y, x, 0 * x], -1)
    crops = CropSource(lambda rng: picture, 8, 50)(np.random.default_rng(0))
    assert crops.shape == (50, 8, 8, 3) and crops.dtype == np.uint8
    for crop in crops:
        top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        np.testing.assert_array_equal(crop, picture[top : top + 8, left : left + 8])
    corners = crops[:, 0, 0, :2]
    assert corners.min() == 0 and corners.max() == 24  # every place is reached, the last too
    whole = CropSource(lambda rng: picture, 32, 2)(np.random.default_rng(0))
    np.testing.assert_array_equal(whole, np.stack([picture, picture]))
