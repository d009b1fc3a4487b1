"""Crops with masks that follow from their number, epochs that see every picture, pictures passed over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from moebius_edge.data.masks import sample_mask
from moebius_edge.data.pictures import Pictures, Place
from moebius_edge.data.samples import MaskedPictures, Transform, _crop, listed_names, note_unreadable
from moebius_edge.errors import UsageError
from moebius_edge.training.loop import draw_batches, plain

SMALL = Transform(resolution=16)


class InMemory(Pictures):
    """Arrays in place of files; None cannot be read."""

    def __init__(
        self,
        images: Sequence[np.ndarray | None],
        holes: Sequence[np.ndarray | None] | None = None,
        branches: Sequence[int | None] | None = None,
    ) -> None:
        places = [Place(str(i), f"/gone/{i}") for i in range(len(images))]
        super().__init__("memory", places, [None] * len(images), branches)
        self.images, self.holes = images, holes or [None] * len(images)
        self.asked: list[int] = []

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        self.asked.append(i)
        image = self.images[i]
        if image is None:
            raise UsageError(f"picture {i} is damaged")
        return image, self.holes[i]


def flat(*values: int | None) -> InMemory:
    """Pictures of one colour each, by which a sample tells whose it is."""
    return InMemory([None if v is None else np.full((20, 30, 3), v, np.uint8) for v in values])


def drawn(samples: MaskedPictures, indices: Sequence[int]) -> list[int]:
    return [int(samples.sample(i)[0][0, 0, 0]) for i in indices]


def test_a_sample_is_a_function_of_seed_and_number_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3)).astype(np.uint8)
    whole = [MaskedPictures(InMemory(noise), SMALL, 3).sample(i) for i in range(12)]
    samples = MaskedPictures(InMemory(noise), SMALL, 3)
    for i in (11, 0, 7, 6, 7):
        image, mask, branch = samples.sample(i)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((16, 16, 3), np.uint8, (16, 16), bool)
        assert image.flags.c_contiguous and branch == -1
        np.testing.assert_array_equal(image, whole[i][0])
        np.testing.assert_array_equal(mask, whole[i][1])
    assert len({image.tobytes() for image, _, _ in whole}) == len({mask.tobytes() for _, mask, _ in whole}) == 12
    other = MaskedPictures(InMemory(noise), SMALL, 4)
    assert all(not np.array_equal(other.sample(i)[0], whole[i][0]) for i in range(12))


def test_every_epoch_sees_every_picture_once_in_an_order_of_its_own() -> None:
    samples = MaskedPictures(flat(*range(10)), SMALL, 0)
    epochs = [drawn(samples, range(10 * e, 10 * e + 10)) for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_picture_that_cannot_be_read_gives_its_place_to_the_next_and_is_listed_once(tmp_path: Path) -> None:
    readable = flat(0, 1, 2, 3, 4, 5)
    samples = MaskedPictures(readable, SMALL, 1)
    order = drawn(samples, range(12))
    broken = flat(*(None if v in (2, 5) else v for v in range(6)))
    listed = tmp_path / "unreadable.txt"
    passing = MaskedPictures(broken, SMALL, 1, listed)
    expected = []
    for epoch in (order[:6], order[6:]):
        for turn in range(6):
            expected.append(next(v for v in (epoch + epoch)[turn:] if v not in (2, 5)))
    assert drawn(passing, range(12)) == expected
    assert sorted(listed.read_text().splitlines()) == ["2\tpicture 2 is damaged", "5\tpicture 5 is damaged"]
    assert broken.asked.count(2) == broken.asked.count(5) == 1
    assert [drawn(MaskedPictures(broken, SMALL, 1), [i])[0] for i in (11, 4)] == [expected[11], expected[4]]


def test_what_loading_processes_pass_over_is_known_outside_of_them(tmp_path: Path) -> None:
    samples = MaskedPictures(flat(0, None, 2, None, 4), SMALL, 0, tmp_path / "list.txt")
    numbers = [range(5), range(5, 10)]
    with closing(draw_batches(samples.sample, numbers, workers=2)) as batches:
        images, masks, branches = next(batches)
        next(batches)
    assert (images.shape, masks.shape, masks.dtype, branches.shape) == ((5, 16, 16, 3), (5, 16, 16), bool, (5,))
    assert images[:, 0, 0, 0].tolist() == drawn(samples, range(5))
    assert listed_names(tmp_path / "list.txt") == {"1", "3"}


def test_pictures_none_of_which_can_be_read_are_an_error() -> None:
    with pytest.raises(UsageError, match=r"none of the 4 pictures of memory can be read: picture . is damaged; pic"):
        MaskedPictures(flat(None, None, None, None), SMALL, 0).sample(0)
    assert drawn(MaskedPictures(flat(None, None, 7, None), SMALL, 0), range(8)) == [7] * 8


def test_crops_are_squares_of_the_picture_at_scales_within_the_range() -> None:
    """A picture whose pixels name their places shows by its corners what was cut."""
    y, x = np.mgrid[0:100, 0:160].astype(np.uint8)
    image = np.stack([y, x, 0 * x], -1)
    sides, corners = [], []
    transform, tall = Transform(resolution=32, min_scale=0.4), Transform(resolution=40, min_scale=0.1)
    for i in range(150):
        crop, _, _ = _crop(np.random.default_rng(i), image, None, transform)
        height, width = (float(crop[-1, -1, c]) - float(crop[0, 0, c]) for c in (0, 1))
        assert height == pytest.approx(width, abs=3)
        sides.append(height * 32 / 31)
        corners.append(crop[0, 0, :2])
    assert min(sides) == pytest.approx(40, abs=3) and max(sides) == pytest.approx(100, abs=3)
    assert (np.max(corners, 0) > (50, 100)).all()
    for i in range(20):  # no crop is smaller than the sample where the picture is not
        crop, _, _ = _crop(np.random.default_rng(i), image[:40], None, tall)
        assert (crop[0, 0, 0], crop[-1, -1, 0]) == (0, 39)
    crop, _, _ = _crop(np.random.default_rng(0), image[:10, :12], None, transform)
    assert crop.shape == (32, 32, 3)  # a small picture is enlarged


def test_half_of_the_samples_are_mirrored_with_their_masks_or_none() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    hole = np.zeros((16, 16), bool)
    hole[:, :8] = True
    shares = {}
    for flip in (True, False):
        samples = MaskedPictures(
            InMemory([image], [hole]), Transform(resolution=16, min_scale=1, flip=flip, widen=False), 0
        )
        pairs = [samples.sample(i)[:2] for i in range(200)]
        assert all(np.array_equal(image[..., 0] == 255, mask) for image, mask in pairs)
        shares[flip] = np.mean([not mask[0, 0] for _, mask in pairs])
    assert shares[False] == 0 and 0.4 < shares[True] < 0.6


def test_drawn_masks_are_of_the_presets_and_the_range_asked_for() -> None:
    transform = Transform(resolution=32, presets=("box",), coverage=(0.1, 0.2), widen=False)
    samples = MaskedPictures(flat(1, 2, 3), transform, 0)
    shares = [samples.sample(i)[1].mean() for i in range(60)]
    assert min(shares) >= 0.1 and max(shares) <= 0.2 and len(set(shares)) > 20


def test_default_masks_cover_as_much_as_upstream_s() -> None:
    """34% of a square picture in the mean and more than half in a fifth, as measured on upstream's own generator."""
    samples = MaskedPictures(InMemory([np.zeros((512, 512, 3), np.uint8)]), Transform(), 0)
    shares = np.array([samples.sample(i)[1].mean() for i in range(600)])
    assert shares.mean() == pytest.approx(0.34, abs=0.02) and np.mean(shares > 0.5) == pytest.approx(0.19, abs=0.04)
    wide = MaskedPictures(InMemory([np.zeros((512, 768, 3), np.uint8)]), Transform(min_scale=1.0), 0)
    thinner = np.array([wide.sample(i)[1].mean() for i in range(300)])  # drawn over all of a picture, cut with it
    assert thinner.mean() == pytest.approx(0.26, abs=0.02) and not (thinner == 0).any()


def test_every_sample_of_a_picture_has_a_crop_and_a_mask_of_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    samples = MaskedPictures(InMemory([image]), Transform(resolution=32), 0)
    seen = [samples.sample(i) for i in range(20)]
    assert len({image.tobytes() for image, _, _ in seen}) == len({mask.tobytes() for _, mask, _ in seen}) == 20


def test_background_and_foreground_samples_have_their_branch_and_masks() -> None:
    """The foreground's mask is its own; the background's its own or a drawn one, or what lies in a foreground's."""
    left, right = np.zeros((2, 64, 64), bool)
    left[:, :40], right[:, 32:] = True, True
    transform = Transform(resolution=64, min_scale=1.0, flip=False, widen=False)
    pictures = InMemory([np.full((64, 64, 3), v, np.uint8) for v in (0, 1)], [left, right], [0, 1])
    samples = MaskedPictures(pictures, transform, 0)
    seen = [samples.sample(i) for i in range(200)]
    assert all(branch == image[0, 0, 0] for image, _, branch in seen)
    assert all(np.array_equal(mask, right) for _, mask, branch in seen if branch == 1)
    background = [mask for _, mask, branch in seen if branch == 0]
    cut = np.mean([not (mask & ~right).any() for mask in background])
    own = np.mean([np.array_equal(mask, left) or np.array_equal(mask, left & right) for mask in background])
    assert 0.35 < cut < 0.65 and 0.35 < own < 0.65 and all(mask.any() for mask in background)


def test_a_given_mask_is_cut_with_its_picture() -> None:
    rng = np.random.default_rng(0)
    hole = np.zeros((60, 90), bool)
    hole[20:50, 10:60] = True
    image = rng.integers(0, 200, (60, 90, 3)).astype(np.uint8)
    image[hole] = 255
    samples = MaskedPictures(InMemory([image], [hole]), Transform(resolution=16, min_scale=0.7, widen=False), 0)
    for i in range(40):
        crop, mask, _ = samples.sample(i)
        assert mask.any() and not mask.all()
        # shrunk by areas, a wholly masked pixel is white, and what is not masked has no part in the hole
        assert crop[~mask].max() < 200 and crop[mask].max() == 255


def test_a_hole_that_random_crops_miss_is_aimed_at() -> None:
    """Small crops would meet a spot once in a hundred, and the same holds for what little a large hole leaves."""
    image = np.zeros((200, 200, 3), np.uint8)
    spot, corner = (np.zeros((200, 200), bool) for _ in range(2))
    spot[123, 45] = corner[0, 0] = True
    left = np.ones((200, 200), bool)
    left[:30, :30] = False
    transform = Transform(resolution=24, min_scale=0.1)
    for hole in (spot, corner, left):
        parts = [_crop(np.random.default_rng(i), image, hole, transform)[1] for i in range(60)]
        assert all(part is not None and part.any() and not part.all() for part in parts)
        if hole is not left:
            assert max(part.sum() for part in parts if part is not None) <= 4  # all that a spot touches, no more


def test_identities_differ_with_whatever_decides_a_sample() -> None:
    def identity(values: Sequence[int], transform: Transform, seed: int) -> object:
        return plain(MaskedPictures(flat(*values), transform, seed).identity())

    ours = identity([1, 2], SMALL, 0)
    assert identity([1, 2], Transform(resolution=16), 0) == ours
    for other in (identity([1, 2, 3], SMALL, 0), identity([1, 2], SMALL, 1), identity([1, 2], Transform(24), 0)):
        assert other != ours


def test_a_range_that_no_preset_reaches_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"none of 5 masks of the presets thin covers 0.95 to 1.0 of the picture: wid"):
        sample_mask(np.random.default_rng(0), 64, (0.95, 1.0), ("thin",), attempts=5)


def test_a_later_run_adds_to_the_list(tmp_path: Path) -> None:
    path = tmp_path / "unreadable.txt"
    assert listed_names(path) == set()
    for names in ("ba", "ac"):
        for name in names:
            note_unreadable(path, name, f"is damaged\nin {names}")
    assert path.read_text() == "b\tis damaged\\nin ba\na\tis damaged\\nin ba\nc\tis damaged\\nin ac\n"
    for name in ("tab\tline\nend", "\udcff.png", "ä 日.png") * 2:  # any name takes one line, once
        note_unreadable(tmp_path / "u.txt", name, "x")
    assert (tmp_path / "u.txt").read_bytes() == b"tab\\tline\\nend\tx\n\xff.png\tx\n" + "ä 日.png\tx\n".encode()
