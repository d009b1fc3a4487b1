"""Reading encoded pictures: rows of files as one array, crops over the hole, caches that are not whole."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.training.latents import ARRAYS, LatentCache, Rows


def make_files(folder: Path, array: np.ndarray, rows: int) -> list[Path]:
    files = []
    for i in range(0, len(array), rows):
        files.append(folder / f"{i}.npy")
        np.save(files[-1], array[i : i + rows])
    return files


def make_cache(folder: Path, count: int, rows: int, size: int = 8) -> dict[str, np.ndarray]:
    """A folder as ``encode_latents`` writes it, of noise; what it should give."""
    rng = np.random.default_rng(0)
    whole = {
        "clean": rng.standard_normal((count, 4, size, size)).astype(np.float16),
        "masked": rng.standard_normal((count, 2, 4, size, size)).astype(np.float16),
        "mask": (rng.random((count, 2, size, size)) < 0.3).astype(np.uint8),
    }
    for number, start in enumerate(range(0, count, rows)):
        shard = folder / f"{number:06d}"
        shard.mkdir(parents=True)
        for name, array in whole.items():
            np.save(shard / f"{name}.npy", array[start : start + rows])
    index = {"format": 1, "key": "0" * 64, "parts": {"count": count, "shard_size": rows}}
    (folder / "index.json").write_text(json.dumps(index))
    return whole


def test_rows_of_several_files_read_as_one_array(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (8, 2, 3, 5)).astype(np.uint8)
    rows = Rows(make_files(tmp_path, array, 3), 3, 8)
    assert rows.shape == array.shape and len(rows) == 8
    np.testing.assert_array_equal(np.stack(list(rows)), array)
    for i in range(8):
        for j in range(2):
            np.testing.assert_array_equal(rows[i, j], array[i, j])
            np.testing.assert_array_equal(rows[i, j, 1], array[i, j, 1])
    for place in (8, -1, (0, 2), (7, -1)):
        with pytest.raises(IndexError, match="lies outside of"):
            rows[place]


def test_thousands_of_files_need_no_thousands_of_descriptors(tmp_path: Path) -> None:
    make_cache(tmp_path, 100, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        cache = LatentCache.open(tmp_path)
        for i in range(200):
            cache.pair(np.random.default_rng(i))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_pairs_belong_together_and_reach_every_picture_and_mask(tmp_path: Path) -> None:
    whole = make_cache(tmp_path, 7, 3)
    cache = LatentCache.open(tmp_path)
    assert len(cache) == 7
    seen = set()
    for k in range(150):
        clean, masked, mask = cache.pair(np.random.default_rng(k))
        assert (clean.shape, masked.shape, mask.shape) == ((4, 8, 8), (4, 8, 8), (1, 8, 8))
        assert {clean.dtype, masked.dtype, mask.dtype} == {np.dtype(np.float32)}
        (i,) = np.flatnonzero((whole["clean"] == clean).all((1, 2, 3)))
        (j,) = np.flatnonzero((whole["masked"][i] == masked).all((1, 2, 3)))
        np.testing.assert_array_equal(whole["mask"][i, j], mask[0])
        seen.add((int(i), int(j)))
    assert len(seen) == 14
    memory = LatentCache(**whole)
    for k in range(5):
        for size in (None, 4):
            pairs = (c.pair(np.random.default_rng(k), size) for c in (cache, memory))
            for a, b in zip(*pairs, strict=True):
                np.testing.assert_array_equal(a, b)


def place_cache(mask: np.ndarray) -> LatentCache:
    """One picture whose latents name their places."""
    y, x = np.mgrid[0 : len(mask), 0 : len(mask)].astype(np.float16)
    clean = np.stack([y, x, y, x])
    return LatentCache(clean[None], -clean[None, None], mask[None, None].astype(np.uint8))


def test_crops_are_cut_alike_and_hold_a_fair_share_of_the_hole() -> None:
    mask = np.zeros((32, 32), bool)
    mask[3:9, 4:12] = True  # 48 of 1024 cells: most random crops of 8 would miss it
    mask[31, 31] = True
    shares, corners = [], []
    for k in range(300):
        clean, masked, hole = place_cache(mask).pair(np.random.default_rng(k), 8)
        assert (clean.shape, masked.shape, hole.shape) == ((4, 8, 8), (4, 8, 8), (1, 8, 8))
        y, x = int(clean[0, 0, 0]), int(clean[1, 0, 0])
        np.testing.assert_array_equal(masked, -clean)
        np.testing.assert_array_equal(clean[0], np.mgrid[y : y + 8, x : x + 8][0])
        np.testing.assert_array_equal(hole[0], mask[y : y + 8, x : x + 8])
        shares.append(hole.mean())
        corners.append((y, x))
    assert min(shares) >= 0.05 and max(shares) <= 0.7 and len(set(corners)) > 50


def test_where_no_crop_is_fair_the_nearest_is_taken() -> None:
    spot = np.zeros((32, 32), bool)
    spot[31, 0] = True
    for hole, share in ((spot, 1 / 64), (np.ones((32, 32), bool), 1), (np.zeros((32, 32), bool), 0)):
        assert {float(place_cache(hole).pair(np.random.default_rng(k), 8)[2].mean()) for k in range(9)} == {share}
    whole = place_cache(spot).pair(np.random.default_rng(0), 32)
    for a, b in zip(whole, place_cache(spot).pair(np.random.default_rng(0)), strict=True):
        np.testing.assert_array_equal(a, b)
    for size in (0, 33):
        with pytest.raises(UsageError, match=rf"a crop of {size} does not fit into latents of 32x32: give 1 to 32"):
            place_cache(spot).pair(np.random.default_rng(0), size)


def test_a_cache_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "a", 7, 3)
    shard = tmp_path / "a" / "000001"
    good = (shard / "mask.npy").read_bytes()
    for content in (good[:-1], good + b"0", b""):
        (shard / "mask.npy").write_bytes(content)
        with pytest.raises(BundleError, match=r"latents .*a are damaged \(.*mask.npy has .*bytes, not .*\): remove"):
            LatentCache.open(tmp_path / "a")
    (shard / "mask.npy").unlink()
    with pytest.raises(MachineError, match=r"there are no latents .*mask.npy: encode them, or check the path"):
        LatentCache.open(tmp_path / "a")
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"a have 2 of 3 shards: encode on with the same command as before"):
        LatentCache.open(tmp_path / "a")
    for index in ("{", "[]", '{"format": 1}', '{"format": 1, "parts": {"count": 3, "shard_size": 0}}'):
        (tmp_path / "a" / "index.json").write_text(index)
        with pytest.raises(BundleError, match=r"latents .*a are damaged"):
            LatentCache.open(tmp_path / "a")
    (tmp_path / "a" / "index.json").write_text('{"format": 2}')
    with pytest.raises(BundleError, match=r"latents .*a have format 2, not 1: remove .*a, and the same command"):
        LatentCache.open(tmp_path / "a")


def test_a_first_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path, 2, 2)
    for content in (b"", b"text", (tmp_path / "000000" / "mask.npy").read_bytes()[:50]):
        (tmp_path / "000000" / "clean.npy").write_bytes(content)
        with pytest.raises(BundleError, match=r"latents .* are damaged \("):
            LatentCache.open(tmp_path)
    np.savez(tmp_path / "000000" / "clean.npz", x=np.zeros(3))
    (tmp_path / "000000" / "clean.npz").rename(tmp_path / "000000" / "clean.npy")
    with pytest.raises(BundleError, match=r"latents .* are damaged \("):
        LatentCache.open(tmp_path)


def test_single_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "folder", 3, 3)
    np.savez(tmp_path / "latents.npz", **whole)
    cache = LatentCache.open(tmp_path / "latents.npz")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(cache, name), whole[name])
    with pytest.raises(MachineError, match=r"there are no latents .*gone.npz: encode them, or check the path"):
        LatentCache.open(tmp_path / "gone.npz")
    np.savez(tmp_path / "lacking.npz", clean=np.zeros(1))
    damaged = {"cut": (tmp_path / "latents.npz").read_bytes()[:-50], "text": b"text", "empty": b""}
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    for name in (*damaged, "lacking"):
        with pytest.raises(BundleError, match=rf"{name}.npz are damaged .*: remove .*{name}.npz, and the same command"):
            LatentCache.open(tmp_path / f"{name}.npz")
