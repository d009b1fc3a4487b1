"""Where the squares lie, what the network sees in them, and that stitching touches nothing else."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from moebius_edge.imaging import Picture, read_picture, write_picture
from moebius_edge.masks import distance_outside
from moebius_edge.regions import Region, extract, extract_mask, plan_regions, prefill
from moebius_edge.stitching import default_feather, seam, stitch

R = 64  # the model's resolution in these tests


def boxes(height: int, width: int, *holes: tuple[int, int, int, int]) -> np.ndarray:
    """A mask with rectangles (top, left, height, width)."""
    mask = np.zeros((height, width), bool)
    for top, left, h, w in holes:
        mask[top : top + h, left : left + w] = True
    return mask


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Boxes, discs, lines and specks."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 6)):
        y, x, size = int(rng.integers(height)), int(rng.integers(width)), int(rng.integers(1, 40))
        kind = rng.integers(4)
        if kind == 0:
            mask[y : y + size, x : x + size // 2 + 1] = 1
        elif kind == 1:
            cv2.circle(mask, (x, y), size, 1, -1)
        elif kind == 2:
            cv2.line(mask, (x, y), (int(rng.integers(width)), int(rng.integers(height))), 1, 2)
        else:
            mask[y, x] = 1
    return mask.astype(bool)


def test_a_small_hole_gets_a_native_square_round_it() -> None:
    (region,) = plan_regions(boxes(300, 400, (100, 200, 20, 30)), R)
    assert region == Region(110 - 32, 215 - 32, R, (100, 200, 120, 230))


@pytest.mark.parametrize(
    ("hole", "side", "top", "left"),
    [
        ((0, 0, 20, 20), 64, 0, 0),  # moved inside at a corner
        ((290, 390, 10, 10), 64, 236, 336),
        ((100, 100, 32, 32), 64, 84, 84),  # half the resolution still is native
        ((100, 100, 40, 40), 80, 80, 80),  # more is twice as large
        ((20, 20, 140, 140), 280, 0, 0),  # as much context as the picture has, moved inside
        ((50, 50, 200, 200), 300, 0, 0),  # no larger than the picture's short side,
        ((0, 0, 300, 300), 375, -37, 0),  # unless the hole is nearly as large as that,
        ((0, 0, 300, 400), 400, -50, 0),  # and never larger than its long side
    ],
)
def test_squares(hole: tuple[int, int, int, int], side: int, top: int, left: int) -> None:
    (region,) = plan_regions(boxes(300, 400, hole), R)
    assert (region.side, region.top, region.left) == (side, top, left)


def test_a_picture_smaller_than_the_model_is_centred_in_the_square() -> None:
    (region,) = plan_regions(boxes(30, 41, (10, 10, 5, 5)), R)
    assert region == Region(-17, -11, R, (10, 10, 15, 15))


def test_distant_holes_stay_apart_and_near_ones_are_taken_together() -> None:
    apart = plan_regions(boxes(300, 400, (20, 20, 10, 10), (250, 300, 10, 10)), R)
    assert [r.hole for r in apart] == [(20, 20, 30, 30), (250, 300, 260, 310)]
    (together,) = plan_regions(boxes(300, 400, (100, 100, 5, 5), (110, 140, 5, 5)), R)
    assert together.hole == (100, 100, 115, 145)
    assert together.side == R, "two specks need the context of a speck, not of their distance"


def test_merging_goes_on_until_nothing_overlaps() -> None:
    """A chain: the union of the first two reaches the third, which neither of them does."""
    first, second, third = (100, 100, 60, 60), (130, 210, 4, 4), (20, 225, 4, 4)
    assert len(plan_regions(boxes(400, 400, first, third), R)) == 2
    assert len(plan_regions(boxes(400, 400, second, third), R)) == 2
    (region,) = plan_regions(boxes(400, 400, first, second, third), R)
    assert region.hole == (20, 100, 160, 229)


@pytest.mark.parametrize("seed", range(60))
def test_planned_regions_keep_their_promises(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 700, 2)
    mask = random_mask(rng, height, width)
    regions = plan_regions(mask, R)
    seen = np.zeros(mask.shape, int)
    for r in regions:
        assert r.side >= R
        for start, length in ((r.top, height), (r.left, width)):
            if r.side <= length:
                assert 0 <= start <= length - r.side
            else:
                assert start <= 0 and start + r.side >= length
        top, left, bottom, right = r.hole
        assert max(0, r.top) <= top < bottom <= min(height, r.top + r.side)
        assert max(0, r.left) <= left < right <= min(width, r.left + r.side)
        assert r.side == R or r.room(height, width) >= max(bottom - top, right - left) // 10
        seen[max(0, r.top) : r.top + r.side, max(0, r.left) : r.left + r.side] += 1
        assert mask[top:bottom, left:right].any()
    assert seen.max() <= 1, "squares overlap"
    covered = np.zeros_like(mask)
    for r in regions:
        covered[r.hole[0] : r.hole[2], r.hole[1] : r.hole[3]] = True
    assert not (mask & ~covered).any(), "a masked pixel is in no hole"
    assert regions == sorted(regions, key=lambda r: (r.top, r.left))


def test_no_hole_no_region() -> None:
    assert plan_regions(np.zeros((50, 60), bool), R) == []


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.5])
def test_a_million_specks_take_no_time(density: float) -> None:
    mask = np.random.default_rng(0).random((4000, 6000)) < density
    start = time.process_time()  # of this process alone: the machine may be busy
    regions = plan_regions(mask, 256)
    assert time.process_time() - start < 2, "on an idle machine it is a tenth of a second"
    assert 1 <= len(regions) <= 24e6 / 256**2
    for a, b in itertools.combinations(regions, 2):
        assert abs(a.top - b.top) >= min(a.side, b.side) or abs(a.left - b.left) >= min(a.side, b.side)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_extract_at_native_scale_is_exact(dtype: type, channels: int) -> None:
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, top, (200, 180, channels), dtype=dtype, endpoint=True)
    image = extract(pixels, Region(30, 40, R, (50, 60, 52, 62)), R)
    assert image.shape == (R, R, 3) and image.dtype == np.float32
    np.testing.assert_array_equal(image, np.broadcast_to(pixels[30:94, 40:104], (R, R, 3)) / np.float32(top))


def test_extract_scales_down_by_averaging() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (300, 300, 3), dtype=np.uint16)
    image = extract(pixels, Region(10, 20, 4 * R, (100, 100, 200, 200)), R)
    expected = pixels[10:266, 20:276].reshape(R, 4, R, 4, 3).mean(axis=(1, 3)) / 65535
    np.testing.assert_allclose(image, expected, atol=1 / 65535)


@pytest.mark.parametrize("size", [(30, 41), (1, 1), (1, 200), (63, 3), (9, 500)])
def test_a_square_beyond_the_picture_is_reflected(size: tuple[int, int]) -> None:
    """As numpy pads it. What is under the mask must not come back in its reflection."""
    pixels = np.random.default_rng(0).integers(1, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, bool)
    mask[size[0] // 2, size[1] // 2] = True
    (region,) = plan_regions(mask, R)
    before = [(max(0, -s)) for s in (region.top, region.left)]
    after = [max(0, s + R - n) for s, n in zip((region.top, region.left), size, strict=True)]
    padded = np.pad(pixels, (*zip(before, after, strict=True), (0, 0)), "reflect")
    y, x = max(0, region.top), max(0, region.left)
    np.testing.assert_allclose(extract(pixels, region, R) * 255, padded[y : y + R, x : x + R], rtol=1e-6)
    hidden = np.where(mask[..., None], 0, pixels).astype(np.uint8)
    hole = extract_mask(mask, region, R)
    np.testing.assert_array_equal(hole, (extract(hidden, region, R) == 0).all(axis=2))


def test_a_mask_scaled_down_covers_all_it_touches() -> None:
    mask = boxes(400, 400, (100, 100, 150, 150))
    mask[100, 255] = True  # a single pixel, 1/25 of a pixel of the model
    (region,) = plan_regions(mask, R)
    assert region.side > 4 * R
    hole = extract_mask(mask, region, R)
    y, x = ((np.array([100, 255]) - [region.top, region.left]) * R) // region.side
    assert hole[y, x]
    picture = np.where(mask[..., None], 255, 0).astype(np.uint8)  # nothing of it shows outside of the hole
    assert extract(picture, region, R)[~hole].max() == 0


def test_seam_falls_smoothly_from_one_to_exactly_zero() -> None:
    mask = boxes(60, 60, (25, 25, 10, 10))
    alpha = seam(mask, 12)
    distance = distance_outside(mask)
    assert (alpha[mask] == 1).all() and (alpha[distance >= 12] == 0).all()
    between = (distance > 0) & (distance < 12)
    assert (alpha[between] > 0).all() and (alpha[between] < 1).all()
    along = alpha[30, 34:47]  # from the last masked pixel outwards
    assert (np.diff(along) < 0).all() and np.abs(np.diff(along)).max() < 0.2 and along[-2] < 0.02
    sigma, d = 12 / 3, np.arange(13)
    gauss = np.exp(-(d**2) / (2 * sigma**2))
    np.testing.assert_allclose(along, (gauss - gauss[-1]) / (1 - gauss[-1]), atol=1e-6)
    np.testing.assert_array_equal(seam(mask, 0), mask)


@pytest.mark.parametrize("seed", range(40))
def test_beyond_the_seam_every_byte_is_kept_through_png(tmp_path: Path, seed: int) -> None:
    """Random sizes, masks, depths and channels; what comes back from the file, compared bit for bit."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    dtype, channels = (np.uint8, np.uint16)[seed % 2], (1, 3, 2, 4)[seed // 2 % 4]
    top = np.iinfo(dtype).max
    original = rng.integers(0, top, (height, width, channels), dtype=dtype, endpoint=True)
    write_picture(tmp_path / "in.png", Picture.from_array(original))
    picture = read_picture(tmp_path / "in.png")
    mask, feather = random_mask(rng, height, width), int(rng.integers(0, 20))
    canvas = picture.pixels.copy()
    for region in plan_regions(mask, R):
        stitch(canvas, np.full((R, R, 3), 0.25, np.float32), region, mask, feather)
    write_picture(tmp_path / "out.png", Picture(canvas, picture.alpha))
    result = read_picture(tmp_path / "out.png")
    distance = distance_outside(mask) if mask.any() else np.full(mask.shape, np.inf)
    beyond = distance >= feather if feather else ~mask
    np.testing.assert_array_equal(result.samples[beyond], original[beyond])
    colours = canvas.shape[2]
    np.testing.assert_array_equal(result.samples[..., colours:], original[..., colours:], "alpha")
    assert np.abs(result.pixels[mask].astype(int) - round(0.25 * top)).max(initial=0) <= 1


def test_stitching_pastes_what_was_made_and_blends_by_the_seam() -> None:
    rng = np.random.default_rng(0)
    original = rng.integers(0, 65536, (200, 220, 3), dtype=np.uint16)
    mask = boxes(200, 220, (90, 100, 16, 12))
    (region,) = plan_regions(mask, R)
    made = rng.random((R, R, 3), np.float32)
    canvas = original.copy()
    stitch(canvas, made, region, mask, 9)
    full = np.zeros(original.shape)
    full[region.top : region.top + R, region.left : region.left + R] = made * 65535.0
    alpha = seam(mask, 9)[..., None].astype(float)
    np.testing.assert_allclose(canvas, alpha * full + (1 - alpha) * original, atol=0.6)


def test_stitching_back_what_was_extracted_changes_nothing() -> None:
    """At native scale the way there and back is exact, seam included, at both depths and in grey."""
    for dtype, channels in itertools.product((np.uint8, np.uint16), (1, 3)):
        top = np.iinfo(dtype).max
        pixels = np.random.default_rng(0).integers(0, top, (190, 200, channels), dtype=dtype, endpoint=True)
        mask = boxes(190, 200, (30, 0, 20, 25), (180, 170, 10, 30))
        canvas = pixels.copy()
        for region in plan_regions(mask, R):
            stitch(canvas, extract(pixels, region, R), region, mask, 7)
        np.testing.assert_array_equal(canvas, pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_enlarged_crop_is_smooth_and_in_place(dtype: type) -> None:
    """A ramp survives being averaged down and interpolated up, so nothing is shifted."""
    top = np.iinfo(dtype).max
    ramp = np.linspace(0.1, 0.9, 500) * top
    pixels = np.repeat(np.rint(ramp)[None, :, None], 500, axis=0).repeat(3, axis=2).astype(dtype)
    mask = boxes(500, 500, (150, 150, 200, 200))
    (region,) = plan_regions(mask, R)
    assert region.side > 6 * R
    canvas = pixels.copy()
    stitch(canvas, extract(pixels, region, R), region, mask, 12)
    error = (canvas.astype(int) - pixels)[mask]
    assert np.abs(error).max() <= max(1, 0.003 * top)


def test_the_seam_never_reaches_the_edge_of_its_square() -> None:
    """A feather wider than the room is narrowed: no step where the square ends."""
    mask = boxes(400, 400, (180, 180, 32, 32))
    (region,) = plan_regions(mask, R)
    assert region.room(400, 400) == 16
    canvas = np.zeros((400, 400, 1), np.uint8)
    stitch(canvas, np.ones((R, R, 3), np.float32), region, mask, 1000)
    row = canvas[196, :, 0].astype(int)
    assert np.abs(np.diff(row)).max() < 45 and row[region.left] == 0 and row[200] == 255


def test_room_ignores_edges_of_the_picture() -> None:
    assert Region(0, 0, R, (0, 0, 20, 30)).room(200, 200) == R - 30
    assert Region(-10, -10, R, (0, 0, 44, 44)).room(44, 44) == R  # no inner edge at all


def test_default_feather_grows_with_the_square() -> None:
    assert [default_feather(Region(0, 0, side, (0, 0, 1, 1))) for side in (64, 256, 512, 2000)] == [
        4,
        8,
        15,
        60,
    ]


def test_prefill_changes_only_the_hole_and_takes_its_surroundings() -> None:
    image = np.random.default_rng(0).random((R, R, 3), np.float32) * 0.01 + np.float32(0.6)
    hole = np.zeros((R, R), bool)
    hole[20:40, 20:40] = True
    image[hole] = (1, 0, 0)
    filled = prefill(image, hole)
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    assert np.abs(filled[hole] - 0.605).max() < 0.02
    assert (prefill(image, np.ones((R, R), bool)) == 0.5).all()
    np.testing.assert_array_equal(prefill(image, np.zeros((R, R), bool)), image)
