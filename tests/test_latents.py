"""Encoded pictures: what is encoded, what a cache is kept by, encodings cut short; rows of files and crops."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from training_toys import small_vae

from moebius_edge.data.samples import Unreadable
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.training import latents
from moebius_edge.training.latents import LatentCache, encode_batch, encode_latents, vae_hash

torch.set_num_threads(1)


def make_cache(folder: Path, count: int, rows: int, size: int = 8) -> dict[str, np.ndarray]:
    """A folder as ``encode_latents`` writes it, of noise; what it should give."""
    rng = np.random.default_rng(0)
    whole = {
        "clean": rng.standard_normal((count, 4, size, size)).astype(np.float16),
        "masked": rng.standard_normal((count, 2, 4, size, size)).astype(np.float16),
        "mask": (rng.random((count, 2, size, size)) < 0.3).astype(np.uint8),
    }
    write_cache(folder, whole, rows)
    return whole


def write_cache(folder: Path, arrays: dict[str, np.ndarray], rows: int) -> None:
    count = len(arrays["clean"])
    for number, start in enumerate(range(0, count, rows)):
        shard = folder / f"{number:06d}"
        shard.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(shard / f"{name}.npy", array[start : start + rows])
    index = {"format": 1, "parts": {"count": count, "shard_size": rows}}
    (folder / "index.json").write_text(json.dumps(index))


def test_thousands_of_files_need_no_thousands_of_descriptors(tmp_path: Path) -> None:
    make_cache(tmp_path, 100, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        cache = LatentCache(tmp_path)
        for i in range(200):
            cache.draw(0, np.random.default_rng(i))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_pairs_belong_together_and_reach_every_picture_and_mask(tmp_path: Path) -> None:
    whole = make_cache(tmp_path, 7, 3)
    cache = LatentCache(tmp_path)
    assert len(cache) == 7
    seen = set()
    for k in range(150):
        clean, masked, mask = cache.draw(0, np.random.default_rng(k))
        assert (clean.shape, masked.shape, mask.shape) == ((4, 8, 8), (4, 8, 8), (1, 8, 8))
        assert {clean.dtype, masked.dtype, mask.dtype} == {np.dtype(np.float32)}
        (i,) = np.flatnonzero((whole["clean"] == clean).all((1, 2, 3)))
        (j,) = np.flatnonzero((whole["masked"][i] == masked).all((1, 2, 3)))
        np.testing.assert_array_equal(whole["mask"][i, j], mask[0])
        seen.add((int(i), int(j)))
    assert len(seen) == 14


def place_cache(folder: Path, mask: np.ndarray, side: int) -> LatentCache:
    """One picture whose latents name their places."""
    y, x = np.mgrid[0 : len(mask), 0 : len(mask)].astype(np.float16)
    clean = np.stack([y, x, y, x])[None]
    write_cache(folder, {"clean": clean, "masked": -clean[:, None], "mask": mask[None, None].astype(np.uint8)}, 1)
    return LatentCache(folder, side)


def test_crops_are_cut_alike_and_hold_a_fair_share_of_the_hole(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), bool)
    mask[3:9, 4:12] = True  # 48 of 1024 cells: most random crops of 8 would miss it
    mask[31, 31] = True
    shares, corners = [], []
    cache = place_cache(tmp_path, mask, 8)
    for k in range(100):
        clean, masked, hole = cache.draw(0, np.random.default_rng(k))
        assert (clean.shape, masked.shape, hole.shape) == ((4, 8, 8), (4, 8, 8), (1, 8, 8))
        y, x = int(clean[0, 0, 0]), int(clean[1, 0, 0])
        np.testing.assert_array_equal(masked, -clean)
        np.testing.assert_array_equal(clean[0], np.mgrid[y : y + 8, x : x + 8][0])
        np.testing.assert_array_equal(hole[0], mask[y : y + 8, x : x + 8])
        shares.append(hole.mean())
        corners.append((y, x))
    assert min(shares) >= 0.05 and max(shares) <= 0.7 and len(set(corners)) > 30


def test_where_no_crop_is_fair_the_nearest_is_taken(tmp_path: Path) -> None:
    spot = np.zeros((32, 32), bool)
    spot[31, 0] = True
    for hole, share in ((spot, 1 / 64), (np.ones((32, 32), bool), 1), (np.zeros((32, 32), bool), 0)):
        cache = place_cache(tmp_path / str(share), hole, 8)
        assert {float(cache.draw(0, np.random.default_rng(k))[2].mean()) for k in range(9)} == {share}


def test_a_cache_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_cache(folder, 7, 3)
    with pytest.raises(UsageError, match=r"a crop of 33 does not fit into latents of 8x8"):
        LatentCache(folder, 33)
    shard = folder / "000001"
    good = (shard / "mask.npy").read_bytes()
    shorter = (folder / "000002" / "mask.npy").read_bytes()
    for content in (good[:-1], b"", b"text", shorter):
        (shard / "mask.npy").write_bytes(content)
        with pytest.raises(BundleError, match=r"latents .*a are damaged \(.*\): remove .*a, and the same command"):
            LatentCache(folder)
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"a lack 1 of 3 shards: encode on with the same command as before"):
        LatentCache(folder)
    for index in ("{", '{"format": 2, "parts": {}}'):
        (folder / "index.json").write_text(index)
        with pytest.raises(BundleError, match=r"index.json: .*: remove .*a, and encode anew"):
            LatentCache(folder)
    with pytest.raises(MachineError, match=r"cannot read .*gone.index.json: No such file"):
        LatentCache(tmp_path / "gone")


SIZE = 32


class Drawn:
    """Noise with boxes as masks; every third picture passes over one that cannot be read."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.unreadable = seed, Unreadable()

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if index % 3 == 0:
            self.unreadable.add(f"{index}.png", "damaged")
        rng = np.random.default_rng([self.seed, index])
        masks = np.zeros((count, SIZE, SIZE), bool)
        for mask in masks:
            y, x = rng.integers(0, SIZE - 12, 2)
            mask[y : y + 12, x : x + 12] = True
        return rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), masks

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "transform": {"size": SIZE}}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae(scaling_factor=2.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected_latents(vae: AutoencoderKL, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        tensor = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        return (2 * vae.encode(tensor).latent_dist.mean[0]).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() < 0.05 * np.abs(b).max())  # bfloat16


def test_a_batch_is_encoded_with_and_without_its_holes(vae: AutoencoderKL) -> None:
    images, masks = zip(*(Drawn().sample_masks(i, 1) for i in range(3)), strict=True)
    clean, masked, mask = encode_batch(vae, np.stack(images), np.stack(masks))
    assert (clean.shape, masked.shape, mask.shape) == ((3, 4, 4, 4), (3, 1, 4, 4, 4), (3, 1, 4, 4))
    assert {t.dtype for t in (clean, masked, mask)} == {torch.float32} and not clean.requires_grad
    for i in range(3):
        scaled = images[i] / 127.5 - 1
        assert close(clean[i].numpy(), expected_latents(vae, scaled))
        grey = np.where(masks[i][0][..., None], 0.0, scaled)
        assert close(masked[i, 0].numpy(), expected_latents(vae, grey))
        assert not close(masked[i, 0].numpy(), clean[i].numpy())
        np.testing.assert_array_equal(mask[i, 0].numpy() > 0, latent_mask(masks[i][0], 4))


def test_a_folder_holds_what_batches_would_give(vae: AutoencoderKL, tmp_path: Path) -> None:
    cache = encode_latents(vae, Drawn(), tmp_path / "new" / "run", 7, 2, shard_size=3)
    assert len(cache) == 7 and cache.masks == 2
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "000000", "000001", "000002", "index.json", "unreadable.txt",
    ]  # fmt: skip
    for i in range(7):
        image, masks = Drawn().sample_masks(i, 2)
        clean, masked, mask = encode_batch(vae, image[None], masks[None])
        for j in range(2):
            assert close(cache.read("clean", i), clean[0].numpy())
            assert close(cache.read("masked", i, j), masked[0, j].numpy())
            np.testing.assert_array_equal(cache.read("mask", i, j), mask[0, j].numpy())
    assert cache.read("clean", 0).dtype == np.float16 and cache.read("mask", 0, 0).dtype == np.uint8
    lines = (tmp_path / "new" / "run" / "unreadable.txt").read_text().splitlines()
    assert lines == ["0.png\tdamaged", "3.png\tdamaged", "6.png\tdamaged"]


def test_a_cache_of_anything_else_is_refused_with_what_differs(vae: AutoencoderKL, tmp_path: Path) -> None:
    encode_latents(vae, Drawn(), tmp_path, 2)
    cases: dict[str, tuple[Any, ...]] = {
        r"\(vae is '\w{64}' there, '\w{64}' here\)": (small_vae(1, 2.0), Drawn(), tmp_path, 2),
        r"\(samples.seed is 0 there, 5 here\)": (vae, Drawn(5), tmp_path, 2),
        r"\(count is 2 there, 3 here\)": (vae, Drawn(), tmp_path, 3),
    }
    before = contents(tmp_path)
    for message, given in cases.items():
        with pytest.raises(UsageError, match=rf"holds other latents {message}: name a new folder, or remove"):
            encode_latents(*given)
    assert contents(tmp_path) == before


def test_the_hash_of_a_vae_is_of_its_weights_and_settings(vae: AutoencoderKL) -> None:
    named, nudged = small_vae(0, 2.0), small_vae(0, 2.0)
    named.register_to_config(_name_or_path="elsewhere")
    assert vae_hash(named) == vae_hash(vae)
    with torch.no_grad():
        list(nudged.parameters())[-1][0] += 1e-6
    others = [small_vae(1, 2.0), small_vae(0, 3.0), nudged, small_vae(0, 2.0).half()]
    assert len({vae_hash(model) for model in (vae, *others)}) == 5


def test_folders_of_other_things_are_left_alone(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "000000").mkdir()
    with pytest.raises(UsageError, match=r"is not empty and holds no index.json: name a new folder for latents"):
        encode_latents(vae, Drawn(), tmp_path, 2)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(BundleError, match=r"index.json: this is not valid JSON .*: remove"):
        encode_latents(vae, Drawn(), tmp_path, 2)
    with pytest.raises(UsageError, match=r"index.json is, or lies in, a file: name a folder"):
        encode_latents(vae, Drawn(), tmp_path / "index.json", 2)


def test_an_encoding_cut_short_by_a_full_disk_goes_on_to_the_same_result(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_latents(vae, Drawn(), tmp_path / "whole", 8, shard_size=3)
    write, calls = Path.write_bytes, 0

    def full(path: Path, data: bytes) -> int:
        nonlocal calls
        calls += path.suffix == ".npy"
        if calls == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MachineError, match=r"cannot write .*000001: the disk is full: free space in"):
            encode_latents(vae, Drawn(), tmp_path / "cut", 8, shard_size=3)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["000000", "index.json", "unreadable.txt"]
    with pytest.raises(UsageError, match=r"cut lack 2 of 3 shards: encode on with the same command"):
        LatentCache(tmp_path / "cut")
    shutil.copytree(tmp_path / "whole" / "000002", tmp_path / "cut" / "000002")
    encoded: list[int] = []
    encode = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda *given: encoded.append(len(given[1])) or encode(*given))
    for _ in range(2):  # the second time nothing is missing
        encode_latents(vae, Drawn(), tmp_path / "cut", 8, shard_size=3)
        assert sum(encoded) == 3
    whole, again = (contents(tmp_path / name) for name in ("whole", "cut"))
    del whole["unreadable.txt"], again["unreadable.txt"]
    assert again == whole


def test_latents_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"latents that are not finite in float16: its weights are damaged"):
        encode_latents(small_vae(0, 1e9), Drawn(), tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
